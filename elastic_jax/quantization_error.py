"""What quantizing did to each parameter: how far off, what saturated, what vanished."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from elastic_jax import axes
from elastic_jax.axes import ParamSpecs, Path
from elastic_kernels import QuantArray
from elastic_kernels.quant_array import BLOCK, LARGEST_E2M1, LARGEST_E4M3

# Half a step beyond the largest number: what lies farther was cut off, not rounded.
SATURATED = {"fp8": LARGEST_E4M3 + 16, "nvfp4": LARGEST_E2M1 + 1}


class Error(NamedTuple):
    """One parameter, or one stack of them, after quantizing.

    Attributes:
      path: where it is.
      format: "fp8" or "nvfp4".
      relative: root of summed squares of the error, over that of the weights.
      worst: the same of the worst member of a stack.
      saturated: share of the weights that lie beyond the largest number of their scale.
      zeroed: share of the weights that became zero, and were not.
      dead_blocks: share of NVFP4's blocks of 16 that became zeros, and were not; 0 in
        FP8.
    """

    path: Path
    format: str
    relative: float
    worst: float
    saturated: float
    zeroed: float
    dead_blocks: float


def quantization_errors(
    params: Any, quantized: Any, specs: ParamSpecs
) -> Iterator[Error]:
    """One row for every quantized parameter, in the order of `specs`.

    Weights are compared one at a time, and the members of a stack one by one.

    Args:
      params: arrays that `quantized` was made from.

    Raises:
      ValueError: `params` are quantized, or of other shapes.
    """
    for path, spec in specs:
        weight, stored = axes.leaf(params, path), axes.leaf(quantized, path)
        if not isinstance(stored, QuantArray):
            continue
        if isinstance(weight, QuantArray) or weight.shape != stored.shape:
            raise ValueError(
                f"{'/'.join(map(str, path))}: expected the array of shape "
                f"{stored.shape} that was quantized, got "
                f"{type(weight).__name__} {weight.shape}"
            )
        sums = jax.device_get(_sums(weight, stored, len(spec.batch)))
        error, power = (np.sqrt(sums[name]) for name in ("error", "power"))
        size = weight.size
        yield Error(
            path,
            stored.format,
            relative=float(np.linalg.norm(error) / (np.linalg.norm(power) or 1)),
            worst=float(np.max(error / np.where(power == 0, 1, power))),
            saturated=float(sums["saturated"].sum() / size),
            zeroed=float(sums["zeroed"].sum() / size),
            dead_blocks=float(sums["dead_blocks"].sum() / (size // BLOCK or 1)),
        )


@functools.partial(jax.jit, static_argnums=2)
def _sums(weight: Array, stored: QuantArray, stacked: int) -> dict[str, Array]:
    """Sums over one weight, or over each member of a stack."""
    if stacked:
        member = lambda pair: _sums(*pair, stacked - 1)
        return jax.lax.map(member, (weight, stored))
    exact, rounded = (w.astype(jnp.float32) for w in (weight, stored))
    gone = (rounded == 0) & (exact != 0)
    blocks = jnp.zeros((), bool)
    step = jnp.full(weight.shape, stored.scale)
    if stored.format == "nvfp4":
        lost, dead = (_blocks(x, stored.axis) for x in (gone, rounded == 0))
        blocks = jnp.any(lost, axis=stored.axis) & jnp.all(dead, axis=stored.axis)
        scales = stored.block_scale.astype(jnp.float32)
        step = step * jnp.repeat(scales, BLOCK, axis=stored.axis)
    return {
        "error": jnp.sum((rounded - exact) ** 2),
        "power": jnp.sum(exact**2),
        "saturated": jnp.sum(jnp.abs(exact) > SATURATED[stored.format] * step),
        "zeroed": jnp.sum(gone),
        "dead_blocks": jnp.sum(blocks),
    }


def _blocks(x: Array, axis: int) -> Array:
    """`axis` as two dimensions, the one within a block at `axis` again."""
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], -1, BLOCK, *x.shape[at + 1 :])
