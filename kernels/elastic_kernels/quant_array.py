"""How a quantized weight is stored, and what rounding to its format does.

    k the last contracted dimension   b block of 16 along it

A quantized weight keeps its dimensions apart like any other, so a submodel is a prefix
of it too: `values` and `block_scale` are cut along the same dimensions, and the scale
of the tensor is inherited. What is packed is packed along the last contracted
dimension, the fastest in the rows of an exported matrix, and counted from the
end, where an index into a stack of experts does not move it.

FP8 is E4M3 with one float32 scale a tensor. NVFP4 is E2M1, two values a byte, with one
E4M3 scale per 16 values and one float32 scale a tensor: 4.5 bits a weight. The layouts
and roundings are those of NVIDIA ModelOpt.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

FORMATS = ("fp8", "nvfp4")
BLOCK = 16  # values that share one scale
BLOCK_SCALES = ("max", "four_over_six")

LARGEST_E2M1, LARGEST_E4M3, SMALLEST_E4M3 = 6.0, 448.0, 2.0**-9
LARGEST = {"fp8": LARGEST_E4M3, "nvfp4": LARGEST_E2M1 * LARGEST_E4M3}
# Times the smallest E4M3 number it is still normal in float32: no division by zero.
SMALLEST_SCALE = 2.0**-117

static = functools.partial(field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantArray:
    """A weight in packed storage, a pytree node; made by `quantize`.

    Attributes:
      values: float8_e4m3fn in the shape of the weight, or uint8 with two E2M1 values
        a byte along `axis`, the first in the low nibble.
      scale: float32, one for the tensor, or one for each member of a stack.
      block_scale: float8_e4m3fn, one per 16 values along `axis`; None is FP8.
      input_scale: float32 like `scale`, of the activations that the weight meets:
        they are rounded to the same format before the product. None leaves them.
      axis: the last contracted dimension, negative: counted from the end.
      dtype: what it is used in where nobody says otherwise; computing is in float32.
    """

    values: jax.Array
    scale: jax.Array
    block_scale: jax.Array | None
    input_scale: jax.Array | None
    axis: int = static()
    dtype: Any = static()

    @property
    def format(self) -> str:
        return "fp8" if self.block_scale is None else "nvfp4"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, not of what is stored."""
        return tuple(
            n * s for n, s in zip(self.values.shape, self._per(2), strict=True)
        )

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def size_bytes(self) -> int:
        """What is stored, scales included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def steps(self) -> tuple[int, ...]:
        """A prefix along each dimension is a multiple of these."""
        return self._per(BLOCK)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> "QuantArray":
        """One member of a stack, `w[e]`, or a prefix, a tuple of `slice(n)` per dim.

        Raises:
          ValueError: a prefix that cuts a block, or any other index.
        """
        if isinstance(index, tuple):
            return self._prefix(index)
        if not self.scale.ndim:
            raise ValueError(
                f"a quantized weight of shape {self.shape} is no stack; dequantize it "
                "to take it apart"
            )
        return jax.tree.map(lambda leaf: leaf[index], self)

    def astype(self, dtype) -> jax.Array:
        """The weight as an array: values times scales in float32, then cast."""
        return dequantize(self, dtype)

    def padded(self, widths: list[tuple[int, int]]) -> "QuantArray":
        """Extended by zeros at the end of each dimension, as `jnp.pad` would.

        Zeros have a scale of 1, as `quantize` gives them.
        """
        if any(n % step for (_, n), step in zip(widths, self.steps, strict=True)):
            raise ValueError(f"padding {widths} would cut a block; steps {self.steps}")

        def extended(leaf, per, fill):
            if leaf is None:
                return None
            pairs = zip(widths[: leaf.ndim], per, strict=False)
            for dim, ((_, n), s) in enumerate(pairs):
                more = (*leaf.shape[:dim], n // s, *leaf.shape[dim + 1 :])
                more = jnp.full(more, fill, leaf.dtype)
                leaf = jnp.concatenate([leaf, more], axis=dim)
            return leaf

        return QuantArray(
            values=extended(self.values, self._per(2), 0),
            scale=extended(self.scale, (1,) * self.ndim, 1),
            block_scale=extended(self.block_scale, self._per(BLOCK), 1),
            input_scale=extended(self.input_scale, (1,) * self.ndim, 1),
            axis=self.axis,
            dtype=self.dtype,
        )

    def _prefix(self, index: tuple[slice, ...]) -> "QuantArray":
        if len(index) != self.ndim or any(
            not isinstance(i, slice) or i.start or i.step for i in index
        ):
            raise ValueError(
                f"a quantized weight is cut to a prefix, slice(n) of each of its "
                f"{self.ndim} dimensions; got {index}"
            )
        pairs = zip(index, self.shape, strict=True)
        sizes = [n if i.stop is None else min(i.stop, n) for i, n in pairs]
        if any(n % step for n, step in zip(sizes, self.steps, strict=True)):
            raise ValueError(
                f"{tuple(sizes)} of {self.shape} would cut a block of {BLOCK}; "
                f"prefixes are multiples of {self.steps}"
            )

        def cut(leaf, per):
            if leaf is None:
                return None
            pairs = zip(sizes, per, strict=True)
            return leaf[tuple(slice(n // s) for n, s in pairs)[: leaf.ndim]]

        return QuantArray(
            values=cut(self.values, self._per(2)),
            scale=cut(self.scale, (1,) * self.ndim),
            block_scale=cut(self.block_scale, self._per(BLOCK)),
            input_scale=cut(self.input_scale, (1,) * self.ndim),
            axis=self.axis,
            dtype=self.dtype,
        )

    def _per(self, along: int) -> tuple[int, ...]:
        """Weights per stored entry of each dimension: `along` on the packed one."""
        per = [1] * self.ndim
        per[self.axis] = 1 if self.format == "fp8" else along
        return tuple(per)


def quantize(
    array: jax.Array,
    format: str,
    *,
    axis: int,
    scale: jax.Array,
    input_scale: jax.Array | None = None,
    block_scale: str | jax.Array = "max",
) -> QuantArray:
    """`array` rounded to `format` under the scale of its tensor.

    With the tensor's scale s, a block's scale is `s_b = e4m3(amax(block) / (6 s))`,
    clamped to 2^-9 .. 448, and 1 for a block of zeros; values are
    `e2m1(w / (s_b s))`, or `e4m3(w / s)` in FP8. This is ModelOpt's arithmetic, in
    float32. What is not finite gives NaN: look for it before.

    Args:
      axis: the last contracted dimension; negative.
      scale: from `tensor_scale`, of this array, of all that share one tensor, or
        inherited from a parent. Its dimensions are the leading ones of `array`.
      block_scale: `"max"` fits each block's largest value to 6. `"four_over_six"`
        (after arXiv 2512.02010) fits it to 4 where that has a smaller squared error.
        An array takes those block scales as they are.

    Raises:
      ValueError: an unknown format or rule, or blocks that do not fit.
    """
    given = not isinstance(block_scale, str)
    if format not in FORMATS or not (given or block_scale in BLOCK_SCALES):
        raise ValueError(
            f"quantize: format {format!r} of {FORMATS}, block_scale {block_scale!r} of "
            f"{BLOCK_SCALES}: choose one of each"
        )
    if axis >= 0 or -axis > array.ndim - scale.ndim:
        raise ValueError(
            f"quantize: axis {axis} of shape {array.shape} with scales {scale.shape}; "
            "count it from the end, behind the dimensions of the scales"
        )
    if format == "nvfp4" and array.shape[axis] % BLOCK:
        raise ValueError(
            f"quantize: {array.shape[axis]} values along the contracted dimension, no "
            f"multiple of {BLOCK}; keep this weight as it is, or use fp8"
        )
    if format == "fp8":
        values, blocks = _fp8(array, scale), None
    elif given:
        values, blocks = _nvfp4_under(array, scale, block_scale, axis), block_scale
    else:
        values, blocks = _nvfp4(array, scale, axis, block_scale)
    return QuantArray(values, scale, blocks, input_scale, axis, jnp.dtype(array.dtype))


@functools.partial(jax.jit, static_argnums=1)
def dequantize(array: QuantArray, dtype=None) -> jax.Array:
    """The weight that `array` stands for, in its own dtype or in `dtype`."""
    scale = _spread(array.scale, array.ndim)
    if array.format == "fp8":
        weight = array.values.astype(jnp.float32) * scale
    else:
        blocks = _blocked(e2m1_values(_unpacked(array.values, array.axis)), array.axis)
        scales = array.block_scale.astype(jnp.float32) * scale
        weight = blocks * jnp.expand_dims(scales, array.axis)
        weight = weight.reshape(array.shape)
    return weight.astype(array.dtype if dtype is None else dtype)


@functools.partial(jax.jit, static_argnames=("format", "axis"))
def rounded(x: jax.Array, format: str, *, axis: int, scale: jax.Array) -> jax.Array:
    """`x` quantized and back, in its dtype: activations as a product takes them.

    NVFP4's blocks get the scales of what they hold now. What is beyond the reach of
    `scale` becomes the largest number that it has.

    Args:
      axis: the last contracted dimension; negative.
      scale: from `tensor_scale`, a scalar: of activations seen in a calibration.
    """
    if format == "fp8":
        wide = to_e4m3(divided(x.astype(jnp.float32), scale)).astype(jnp.float32)
        return (wide * scale).astype(x.dtype)
    codes, _, whole = _fitted_blocks(x, scale, axis, "max")
    return (e2m1_values(codes) * whole).reshape(x.shape).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=1)
def tensor_scale(largest: jax.Array, format: str) -> jax.Array:
    """The float32 scale that fits magnitudes up to `largest`; 1 where that is zero."""
    scale = divided(largest.astype(jnp.float32), jnp.float32(LARGEST[format]))
    scale = jnp.where(largest == 0, 1.0, jnp.maximum(scale, SMALLEST_SCALE))
    return jnp.where(jnp.isfinite(largest), scale, jnp.nan)


@functools.partial(jax.jit, static_argnums=1)
def largest_magnitude(array: jax.Array, batch: int = 0) -> jax.Array:
    """max |w| in float32, for each member of a stack over `batch` leading dims.

    NaN where any weight is not finite.
    """
    over = tuple(range(batch, array.ndim))
    return _largest(array, over, keepdims=False).astype(jnp.float32)


def to_e4m3(x: jax.Array) -> jax.Array:
    """The nearest float8_e4m3fn, ties to even; beyond 448 it is 448, not NaN."""
    return jnp.clip(x, -LARGEST_E4M3, LARGEST_E4M3).astype(jnp.float8_e4m3fn)


def e2m1_codes(x: jax.Array) -> jax.Array:
    """uint8 in 0 .. 15, sign << 3 | code, of the nearest of 0 .5 1 1.5 2 3 4 6.

    A tie goes to the even code; beyond 6 it is 6.
    """
    size = jnp.abs(x)
    down, up = (0.25, 1.25, 2.5, 5.0), (0.75, 1.75, 3.5)
    above = [size > bound for bound in down] + [size >= bound for bound in up]
    code = sum(passed.astype(jnp.uint8) for passed in above)
    return code | jnp.signbit(x).astype(jnp.uint8) << 3


def e2m1_values(codes: jax.Array) -> jax.Array:
    """The float32 numbers that 4-bit codes stand for."""
    last, exponent = codes & 1, codes >> 1 & 3
    twice = jnp.where(exponent == 0, last, (2 | last) << jnp.maximum(exponent, 1) - 1)
    size = twice.astype(jnp.float32) * 0.5
    return jnp.where(codes >> 3 == 1, -size, size)


def e2m1_numbers(values: jax.Array, axis: int) -> jax.Array:
    """Packed bytes as float4_e2m1fn, twice as many along `axis`."""
    last = jnp.moveaxis(values, axis, -1)
    pairs = jax.lax.bitcast_convert_type(last, jnp.float4_e2m1fn)  # low nibble first
    return jnp.moveaxis(pairs.reshape(*last.shape[:-1], -1), -1, axis)


@jax.jit
def _fp8(array, scale):
    if scale.ndim:  # temporaries of one member, not of the stack
        return jax.lax.map(lambda member: _fp8(*member), (array, scale))
    wide = array.astype(jnp.float32)
    wide = jnp.where(jnp.isfinite(wide), wide, jnp.nan)
    return to_e4m3(divided(wide, scale))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _nvfp4(array, scale, axis, rule):
    if scale.ndim:
        return jax.lax.map(lambda member: _nvfp4(*member, axis, rule), (array, scale))
    codes, scales, _ = _fitted_blocks(array, scale, axis, rule)
    return _packed(codes.reshape(array.shape), axis), jnp.squeeze(scales, axis)


@functools.partial(jax.jit, static_argnums=3)
def _nvfp4_under(array, scale, block_scale, axis):
    """The packed values under scales of blocks that are known."""
    if scale.ndim:
        each = array, scale, block_scale
        return jax.lax.map(lambda member: _nvfp4_under(*member, axis), each)
    blocks = _blocked(array.astype(jnp.float32), axis)
    whole = jnp.expand_dims(block_scale.astype(jnp.float32), axis) * scale
    codes = e2m1_codes(divided(blocks, whole))
    return _packed(codes.reshape(array.shape), axis)


def _fitted_blocks(array, scale, axis, rule):
    """Codes, block scales, and block times tensor scales; of `array` in blocks."""
    blocks = _blocked(array.astype(jnp.float32), axis)
    largest = _largest(blocks, axis, keepdims=True)

    def fitted(top):
        scales = divided(largest, top * scale)
        scales = jnp.clip(scales, SMALLEST_E4M3, LARGEST_E4M3)
        scales = jnp.where(largest == 0, 1.0, scales)
        scales = jnp.where(jnp.isnan(largest), jnp.nan, scales)
        scales = scales.astype(jnp.float8_e4m3fn)
        whole = scales.astype(jnp.float32) * scale
        return e2m1_codes(divided(blocks, whole)), scales, whole

    codes, scales, whole = fitted(LARGEST_E2M1)
    if rule == "four_over_six":
        other_codes, other_scales, other_whole = fitted(4.0)
        better = _error(blocks, other_codes, other_whole, axis) < _error(
            blocks, codes, whole, axis
        )
        codes = jnp.where(better, other_codes, codes)
        scales = jnp.where(better, other_scales, scales)
        whole = jnp.where(better, other_whole, whole)
    return codes, scales, whole


def divided(x, y):
    """`x / y`, rounded once.

    XLA divides by what was broadcast by multiplying with its reciprocal, which is off
    by a rounding in a quarter of all cases; it does not see through the barrier.
    """
    return x / jax.lax.optimization_barrier(jnp.broadcast_to(y, x.shape))


def _largest(array, over, *, keepdims):
    """max |w|, NaN where any is not finite: a maximum on a CPU passes over NaN."""
    finite = jnp.all(jnp.isfinite(array), axis=over, keepdims=keepdims)
    largest = jnp.max(jnp.abs(array), axis=over, keepdims=keepdims)
    return jnp.where(finite, largest, jnp.nan)


def _error(blocks, codes, whole, axis):
    """Sum of squares over each block, added in halves: the same order in any shape."""
    square = (e2m1_values(codes) * whole - blocks) ** 2
    while square.shape[axis] > 1:
        first, second = jnp.split(square, 2, axis)
        square = first + second
    return square


def _packed(codes, axis):
    pairs = codes.reshape(_split(codes.shape, axis, 2))
    first, second = jnp.split(pairs, 2, axis)
    return jnp.squeeze(first | second << 4, axis)


def _unpacked(values, axis):
    pairs = jnp.stack([values & 15, values >> 4], axis=axis + values.ndim + 1)
    shape = list(values.shape)
    shape[axis] *= 2
    return pairs.reshape(shape)


def _blocked(array, axis):
    """The dimension `axis` as two: which block, and, at `axis`, where in the block."""
    return array.reshape(_split(array.shape, axis, BLOCK))


def _split(shape, axis, parts):
    at = len(shape) + axis
    return (*shape[:at], shape[at] // parts, parts, *shape[at + 1 :])


def _spread(scale, ndim):
    """`scale`, shaped to broadcast from the left."""
    return scale.reshape(scale.shape + (1,) * (ndim - scale.ndim))
