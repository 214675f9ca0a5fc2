"""The one place where weights meet activations, however a weight is stored.

A weight is an array, a `QuantArray`, or, while it is trained or looked at, one of the
two forms here. Layers never ask which. A quantized weight that knows the scale of its
inputs has them rounded as well, as hardware does that multiplies in FP8 or NVFP4.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from elastic_kernels import quant_array
from elastic_kernels.dispatch import require_capability, select
from elastic_kernels.quant_array import QuantArray

# The first GPUs that multiply a format: Ada for E4M3, Blackwell for E2M1.
SCALED_CAPABILITY = {"fp8": 89, "nvfp4": 100}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FakeQuant:
    """A weight in training: used as it will be once quantized, learning as if exact.

    Attributes:
      weight: what the optimiser moves.
      quantized: the same, rounded; no gradient comes through it.
    """

    weight: jax.Array
    quantized: QuantArray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def ndim(self) -> int:
        return self.weight.ndim

    @property
    def dtype(self):
        return self.weight.dtype

    @property
    def steps(self) -> tuple[int, ...]:
        return self.quantized.steps

    @property
    def format(self) -> str:
        return self.quantized.format

    @property
    def axis(self) -> int:
        return self.quantized.axis

    @property
    def input_scale(self) -> jax.Array | None:
        return self.quantized.input_scale

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, index) -> "FakeQuant":
        return FakeQuant(self.weight[index], self.quantized[index])

    def astype(self, dtype) -> jax.Array:
        """Exactly the rounded values; the gradient passes straight to `weight`."""
        rounded = jax.lax.stop_gradient(self.quantized.astype(dtype))
        return _straight_through(self.weight.astype(dtype), rounded)


@dataclass(frozen=True)
class Observed:
    """A weight that tells what it meets; it lives within one trace, and is no pytree.

    Attributes:
      weight: what computes.
      see: called with the activations, and, where a stack of weights is met by rows
        that choose, with the choice of each row.
    """

    weight: jax.Array
    see: Callable[..., None]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self):
        return self.weight.dtype


Weight = jax.Array | QuantArray | FakeQuant | Observed


def contract(
    equation: str, x: jax.Array, w: Weight, *, implementation: str | None = None
) -> jax.Array:
    """Einsum of activations `x` with one weight `w`, in the activations' dtype.

    A quantized weight becomes an array here, one at a time, so that the whole model
    never is one. Gradients pass through every rounding as if it were none.

    Args:
      equation: of two terms; no letter of `w` is a stack.
      implementation: of a product whose factors are both rounded. "xla" multiplies what
        they stand for; "scaled" the FP8 or E2M1 numbers themselves, scales behind,
        which units for them do several times faster. None is the device's default.
    """
    if isinstance(w, Observed):
        w.see(x)
        w = w.weight
    if isinstance(w, QuantArray):
        w = _not_before(x, w)
    if input_scale(w) is None:
        return jnp.einsum(equation, x, w.astype(x.dtype))
    available = {"xla": _rounded_product, "scaled": _scaled_product}
    if isinstance(w, FakeQuant):
        del available["scaled"]  # its numbers have no gradient for the weight
    return select("contract", implementation, available)(equation, x, w)


def input_scale(w: Weight) -> jax.Array | None:
    """Of the activations that `w` meets; None where they stay as they are."""
    return w.input_scale if isinstance(w, QuantArray | FakeQuant) else None


def met(x: jax.Array, w: Weight, axis: int = -1) -> jax.Array:
    """Activations as the product with `w` has them, rounded where its inputs are.

    Args:
      axis: the dimension of `x` that meets the last contracted one; negative.
    """
    scale = input_scale(w)
    if scale is None:
        return x
    exact = jax.lax.stop_gradient(x)
    rounded = quant_array.rounded(exact, w.format, axis=axis, scale=scale)
    return _straight_through(x, rounded)


def met_by_choice(
    x: Float[Array, "m c d"], w: Weight, experts: Int[Array, "m c"]
) -> Float[Array, "m c d"]:
    """As `met`, where each row meets the one of a stack of weights that it chose."""
    scale = input_scale(w)
    if scale is None:
        return x
    of_row = functools.partial(quant_array.rounded, format=w.format, axis=-1)
    by_row = jax.vmap(jax.vmap(lambda row, scale: of_row(row, scale=scale)))
    return _straight_through(x, by_row(jax.lax.stop_gradient(x), scale[experts]))


def _not_before(x: jax.Array, w: QuantArray) -> QuantArray:
    """`w`, which cannot become an array before `x` is known.

    Weights are known before all else: XLA would make arrays of all of them first, or
    outside the loop that writes a text, and hold a whole dequantized model. A barrier
    alone is gone when a CPU's schedule is made, so the scale asks `x` a question there
    whose answer only we know.
    """
    x, w = jax.lax.optimization_barrier((jax.lax.stop_gradient(x), w))
    if jax.default_backend() != "cpu" or not x.size:
        return w
    first = x[(0,) * x.ndim]
    never = (first != first) & (first == first)
    return dataclasses.replace(w, scale=jnp.where(never, 0.0, w.scale))


def _rounded_product(equation: str, x: jax.Array, w: QuantArray | FakeQuant):
    rounded = met(x, w, _met_axis(equation, w))
    return jnp.einsum(equation, rounded, w.astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scaled_product(equation: str, x: jax.Array, w: QuantArray):
    """The product of the numbers themselves, summed in float32, then the scales."""
    require_capability("contract", SCALED_CAPABILITY[w.format])
    scale = w.input_scale
    if w.format == "fp8":
        wide = quant_array.divided(x.astype(jnp.float32), scale)
        numbers = quant_array.to_e4m3(wide), w.values
        y = jnp.einsum(equation, *numbers, preferred_element_type=jnp.float32)
        return (y * (scale * w.scale)).astype(x.dtype)
    ahead, behind = _free_dims(equation, x, w)
    rows = x.reshape(math.prod(ahead), -1)
    left = quant_array.quantize(rows, w.format, axis=-1, scale=scale)
    flat = lambda stored: stored.reshape(-1, math.prod(behind))
    y = jax.lax.scaled_dot(
        quant_array.e2m1_numbers(left.values, -1)[None],
        quant_array.e2m1_numbers(flat(w.values), -2)[None],
        lhs_scale=left.block_scale[None],
        rhs_scale=flat(w.block_scale)[None],
        preferred_element_type=jnp.float32,
    )
    return (y * (scale * w.scale)).reshape(*ahead, *behind).astype(x.dtype)


def _scaled_forward(equation, x, w):
    return _scaled_product(equation, x, w), (x, w)


def _scaled_backward(equation, saved, dy):
    x, w = saved
    _, pull = jax.vjp(lambda x: _rounded_product(equation, x, w), x)
    return (*pull(dy), None)


_scaled_product.defvjp(_scaled_forward, _scaled_backward)


def _free_dims(equation: str, x: jax.Array, w: QuantArray) -> tuple[tuple, tuple]:
    """What is not contracted: the leading dims of `x`, the last ones of `w`."""
    terms, result = equation.split("->")
    x_dims, w_dims = terms.split(",")
    summed = [dim for dim in w_dims if dim not in result]
    ahead, behind = x_dims[: -len(summed)], w_dims[len(summed) :]
    if (x_dims, w_dims, result) != (
        ahead + "".join(summed),
        "".join(summed) + behind,
        ahead + behind,
    ):
        raise NotImplementedError(
            f"contract: {equation!r} is no product of matrices as it stands; expected "
            "the contracted dimensions last in the activations and first in the weight"
        )
    return x.shape[: x.ndim - len(summed)], w.shape[len(summed) :]


def _met_axis(equation: str, w: QuantArray | FakeQuant) -> int:
    """The dimension of the activations that meets the weight's last contracted one."""
    x_dims, w_dims = equation.split("->")[0].split(",")
    return x_dims.index(w_dims[w.axis]) - len(x_dims)


@jax.custom_jvp
def _straight_through(exact, rounded):
    del exact
    return rounded


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return _straight_through(*primals), tangents[0]
