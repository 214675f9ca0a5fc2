"""Arrays that are read when they are needed: how a model larger than memory moves.

Whatever writes a tree leaf by leaf (`save_nested`, `to_hf`) takes lazy leaves beside
arrays, and holds one of them at a time.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class LazyArray:
    """An array that is known by shape and dtype, and read by a call.

    Attributes:
      shape: sizes of its dimensions.
      dtype: of its elements.
      read: gives the array, in this shape and dtype; it may be called again.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = field(repr=False)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read(), dtype=dtype)

    def astype(self, dtype: Any) -> "LazyArray":
        """The same array, cast as it is read."""
        if np.dtype(dtype) == self.dtype:
            return self
        return self.derived(self.shape, lambda value: value.astype(dtype), dtype)

    def derived(
        self,
        shape: tuple[int, ...],
        change: Callable[[np.ndarray], np.ndarray],
        dtype: Any = None,
    ) -> "LazyArray":
        """What `change` makes of the array, which must be of `shape` (and `dtype`)."""
        kind = self.dtype if dtype is None else np.dtype(dtype)
        return LazyArray(tuple(shape), kind, lambda: change(self.read()))


def lazy(value: Any) -> LazyArray:
    """Any array as a lazy one; one on a device is fetched when it is read."""
    if isinstance(value, LazyArray):
        return value
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        value = np.asarray(value)
    return LazyArray(
        tuple(value.shape), np.dtype(value.dtype), lambda: np.asarray(value)
    )


def pieces(
    value: np.ndarray, *, size_bytes: int = 2**26, multiple: int = 1
) -> Iterator[np.ndarray]:
    """`value` cut along its first dimension, in views of about `size_bytes` each.

    Args:
      multiple: pieces, but for the last one, have this many rows or a multiple of it.
    """
    if not value.ndim:
        yield value
        return
    row_bytes = max(1, value.nbytes // max(1, len(value)))
    rows = max(1, size_bytes // row_bytes // multiple) * multiple
    for start in range(0, len(value), rows):
        yield value[start : start + rows]


class LastRead:
    """Keeps the array that was read last, for parts that are cut from it in turn."""

    def __init__(self):
        self.forget()

    def __call__(self, source: LazyArray) -> np.ndarray:
        if source is not self._source:
            self.forget()  # before the next one is read: only one is held
            self._source, self._value = source, source.read()
        return self._value

    def forget(self) -> None:
        """Lets go of the array."""
        self._source, self._value = None, None
