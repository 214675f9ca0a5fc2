"""Arrays that are read when they are needed, and once where that is promised."""

import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.lazy import LastRead, LazyArray, lazy


def counted(value: np.ndarray) -> tuple[LazyArray, list]:
    """A lazy array, and the list that grows when it is read."""
    reads = []

    def read():
        reads.append(1)
        return value

    return LazyArray(value.shape, value.dtype, read), reads


@pytest.mark.parametrize(
    "value",
    [np.ones((2, 3), "f4"), jnp.ones(3, jnp.bfloat16), 1.5, [[1, 2]], np.zeros((0, 4))],
)
def test_what_arrays_say_lazy_ones_say(value):
    array, have = np.asarray(value), lazy(value)
    assert (have.shape, have.dtype) == (array.shape, array.dtype)
    assert (have.ndim, have.size, have.nbytes) == (array.ndim, array.size, array.nbytes)
    np.testing.assert_array_equal(have.read(), array)
    np.testing.assert_array_equal(np.asarray(have), array)
    assert np.asarray(have, np.float64).dtype == np.float64
    assert lazy(have) is have


def test_nothing_is_read_before_it_is_needed():
    array, reads = counted(np.arange(6.0))
    halves = array.astype(np.float16)
    square = halves.derived((2, 3), lambda v: v.reshape(2, 3))
    assert (halves.dtype, halves.nbytes) == (np.float16, 12)
    assert (square.shape, square.dtype) == ((2, 3), np.float16)
    repr(square)
    assert array.astype(float) is array and not reads
    want = np.arange(6, dtype=np.float16).reshape(2, 3)
    np.testing.assert_array_equal(square.read(), want)
    np.testing.assert_array_equal(square.read(), want)
    assert len(reads) == 2, "it may be read again; nothing is kept"


def test_the_last_one_is_read_once():
    (one, first), (other, second) = counted(np.ones(2)), counted(np.zeros(2))
    last = LastRead()
    for source in (one, one, one, other, other, one):
        np.testing.assert_array_equal(last(source), source.read())
    assert (len(first), len(second)) == (2 + 4, 1 + 2)


def test_only_one_is_held():
    """While the next one is read, the one before may already be gone."""
    last, freed = LastRead(), []

    class Held(np.ndarray):
        def __del__(self):
            freed.append(1)

    def read():
        return np.ones(2).view(Held)

    last(LazyArray((2,), np.dtype("f8"), read))
    other = LazyArray((2,), np.dtype("f8"), lambda: np.full(2, len(freed)))
    assert last(other)[0] >= 1
