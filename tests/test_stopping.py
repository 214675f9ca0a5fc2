"""Stop strings are found by their text, however it is cut into tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.stopping import at_stop, stops


def first_end(ending, tokens):
    """The number of tokens until a row ends; None if it does not."""
    state = jnp.zeros(1, jnp.int32)
    for n, token in enumerate(tokens, start=1):
        _, state, ends = at_stop(ending, n, jnp.asarray([token]), state)
        if ends[0]:
            return n
    return None


@pytest.mark.parametrize("seed", range(12))
def test_a_row_ends_with_the_token_that_completes_a_string(seed):
    """Over two letters, so that strings overlap themselves and one another."""
    rng = np.random.default_rng(seed)
    letters = lambda n: bytes(rng.choice(list(b"ab"), n))
    pieces = [b"", *(letters(rng.integers(1, 5)) for _ in range(7))]
    strings = [letters(rng.integers(1, 9)) for _ in range(rng.integers(1, 5))]
    ending = stops(8, strings=strings, pieces=pieces)
    for _ in range(15):
        tokens, text, want = rng.integers(0, 8, 20), b"", None
        for n, token in enumerate(tokens, start=1):
            text += pieces[token]
            if any(string in text for string in strings):
                want = n
                break
        assert first_end(ending, tokens) == want


def test_tokens_end_a_row_beside_strings():
    pieces = [b"x", b"y", b"xy", b"z"]
    ending = stops(6, [3, 5], ["yx", "xxx"], pieces)
    for tokens, n in (
        ([0, 1, 2, 0], 3),
        ([0, 0, 3], 3),
        ([0, 4, 1, 5], 4),
        ([0, 0, 2, 1], 3),
        ([4, 4, 4], None),
    ):
        assert first_end(ending, tokens) == n


def test_text_is_encoded():
    pieces = [bytes([i]) for i in range(256)]
    ending = stops(256, strings="é", pieces=pieces)
    assert first_end(ending, "né".encode()) == 3
    assert first_end(ending, [0xC3, 0xC3, 0xA9]) == 3


def test_nothing_ends_where_nothing_is_given():
    for ending in (stops(4), stops(4, None), stops(4, [], [])):
        assert first_end(ending, [0, 1, 2, 3] * 3) is None


def test_few_sizes_are_compiled():
    pieces = [bytes([97 + i]) for i in range(20)]
    shapes = {
        tuple(a.shape for a in stops(20, list(range(n)), ["abc"[:n]], pieces))
        for n in (3, 2)
    }
    assert stops(20, [1, 2, 3]).tokens.shape == (4,)
    assert shapes == {((4,), (4, 20)), ((2,), (2, 20))}


def test_mistakes_come_together():
    with pytest.raises(ValueError) as error:
        stops(4, [4, True], ["", "a"], [b"a"] * 5)
    for part in ("token 4", "token True", "b'': expected text", "pieces: 5 tokens"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="need the bytes of every token"):
        stops(4, strings=["a"])
