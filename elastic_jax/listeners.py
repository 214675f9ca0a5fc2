"""Who hears what a compiled loop writes while it writes.

    b batch   k tokens of a round

A compiled call knows its listener by a number only: listeners differ, the call stays.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Int

# (tokens [b, k], how many of them each row wrote [b]) -> rows to end [b], or None.
Listener = Callable[[np.ndarray, np.ndarray], Any]

_LISTENING: dict[int, "_Ear"] = {}
_NUMBERS = itertools.count()


@contextlib.contextmanager
def listening(listener: Listener | None) -> Iterator[np.int32]:
    """The number by which `tell` finds the listener, while it listens.

    An exception of the listener ends all rows, and is raised here.
    """
    number = next(_NUMBERS)
    ear = _LISTENING[number] = _Ear(listener)
    try:
        yield np.int32(number)
        if ear.failed:
            raise ear.failed
    finally:
        del _LISTENING[number]


def tell(
    number: Array, tokens: Int[Array, "b k"], lengths: Int[Array, " b"]
) -> Bool[Array, " b"]:
    """Calls the listener from inside a compiled loop; which rows it ends."""
    shape = jax.ShapeDtypeStruct(lengths.shape, jnp.bool_)
    return io_callback(_hear, shape, number, tokens, lengths)


def _hear(number, tokens, lengths):
    return _LISTENING[int(number)](np.asarray(tokens), np.asarray(lengths))


class _Ear:
    """Calls a listener, and keeps its exception for those outside the loop."""

    def __init__(self, listener: Listener | None):
        self.listener, self.failed = listener, None

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        try:
            ended = self.listener(tokens, lengths)
            nobody = np.zeros(lengths.shape, bool)
            return nobody if ended is None else np.asarray(ended, bool) | nobody
        except BaseException as error:
            self.failed = error
            return np.ones(lengths.shape, bool)
