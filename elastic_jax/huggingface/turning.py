"""How a parameter turns into rows of a matrix over there, and back.

Theirs have produced dimensions first and both sides flattened. The arrow says which
dimensions those are; what is packed along the last contracted one stays together.
"""

import functools
import math
from collections.abc import Iterable

import numpy as np

from elastic_jax.axes import ParamSpec
from elastic_jax.lazy import LazyArray


def outer_shape(spec: ParamSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter over there: batch, rows, columns."""
    batch, columns, rows = sides(spec, shape)
    if spec.init == "embedding":  # a lookup: its rows are what it is indexed by
        return columns, rows
    if spec.contracted == ("conv_width",):  # depthwise: one input channel each
        return rows, 1, columns
    return (*batch, rows, columns) if spec.contracted else (*batch, rows)


def inner(value: np.ndarray, spec: ParamSpec, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter from its rows over there."""
    if spec.init == "embedding" or not spec.contracted:
        return value.reshape(shape)
    batch, columns, rows = sides(spec, shape)
    turned = np.swapaxes(value.reshape(*batch, rows, columns), -1, -2)
    return np.ascontiguousarray(turned).reshape(shape)


def outer(value: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """A parameter as rows over there: the inverse of `inner`."""
    shape = outer_shape(spec, value.shape)
    if spec.contracted and spec.init != "embedding":
        batch, columns, rows = sides(spec, value.shape)
        value = np.swapaxes(value.reshape(*batch, columns, rows), -1, -2)
    return value.reshape(shape)


def sides(spec: ParamSpec, shape: tuple[int, ...]) -> tuple[tuple, int, int]:
    """Batch dimensions, and both sides of the arrow flattened: contracted, produced."""
    size = dict(zip(spec.dims, shape, strict=True))
    batch = tuple(size[dim] for dim in spec.batch)
    sides = (spec.contracted, spec.produced)
    columns, rows = (math.prod(size[dim] for dim in side) for side in sides)
    return batch, columns, rows


def widest(tensors: Iterable[LazyArray]) -> np.dtype:
    """A dtype that holds every value of all; NumPy has none for the two of 16 bits."""

    def wider(one: np.dtype, other: np.dtype) -> np.dtype:
        halves = {one.name, other.name} == {"bfloat16", "float16"}
        return np.dtype(np.float32) if halves else np.promote_types(one, other)

    return functools.reduce(wider, (tensor.dtype for tensor in tensors))
