"""The arrays that a quantized weight is stored as: shapes, dtypes, and what is valid.

    values        packed along the last contracted dimension, two a byte in NVFP4
    block_scale   one per 16 weights along it; NVFP4 alone
    scale         one, or one for each member of a stack
    input_scale   alike; only where activations were calibrated

The arrow of the parameter and the format say all of it, so what a file claims can be
held against it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from elastic_jax.axes import ParamSpec
from elastic_kernels.quant_array import BLOCK, FORMATS

E4M3 = np.dtype(jnp.float8_e4m3fn)
SCALES = ("block_scale", "scale", "input_scale")
OPTIONAL = "input_scale"


@dataclass(frozen=True)
class Part:
    """One array.

    Attributes:
      dims: names of its dimensions.
      shape: its sizes.
      dtype: of its elements; None is any.
      per: dimension -> weights that one element spans, where that is not one.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype | None
    per: Mapping[str, int]


def packed_axis(spec: ParamSpec) -> int:
    """The last contracted dimension, counted from the end."""
    return -len(spec.produced) - 1


def parts(spec: ParamSpec, shape: tuple[int, ...], format: str) -> dict[str, Part]:
    """Every array of a weight of `shape` in `format`, as `QuantArray` names them.

    Raises:
      ValueError: no such format, a parameter that is no weight of a product, or a
        width that is not made of whole blocks.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r}, expected one of {FORMATS}")
    if not spec.decays:
        raise ValueError(f"{format}, but it meets no activations in a product")
    axis = packed_axis(spec)
    dim, size = spec.dims[axis], shape[axis]
    if format == "nvfp4" and size % BLOCK:
        raise ValueError(f"{dim} {size} would cut a block of {BLOCK} quantized values")

    def along(per: int, dtype) -> Part:
        stored = list(shape)
        stored[axis] //= per
        spans = {dim: per} if per > 1 else {}
        return Part(spec.dims, tuple(stored), np.dtype(dtype), spans)

    batch = len(spec.batch)
    scale = Part(spec.batch, tuple(shape[:batch]), np.dtype(np.float32), {})
    if format == "fp8":
        return {"values": along(1, E4M3), "scale": scale, "input_scale": scale}
    return {
        "values": along(2, np.uint8),
        "scale": scale,
        "block_scale": along(BLOCK, E4M3),
        "input_scale": scale,
    }


def invalid_scales(scales: np.ndarray) -> int:
    """How many are NaN, infinite, zero or negative: no scale of a quantized weight."""
    if scales.dtype == E4M3:
        # As bytes: 0 is zero, 0x7f is NaN, and from 0x80 on the sign is set.
        codes = np.ascontiguousarray(scales).view(np.uint8)
        return int(np.count_nonzero((codes - np.uint8(1)) >= 0x7E))
    with np.errstate(invalid="ignore"):
        return int(np.count_nonzero(~((scales > 0) & (scales < np.inf))))
