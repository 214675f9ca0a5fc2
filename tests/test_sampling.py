"""Draws: the right distribution, and nothing but row, seed and number decide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.sampling import draw, sampling

LOGITS = np.log(np.array([0.4, 0.1, 0.25, 0.05, 0.2], np.float32))
DRAWS = 20_000


def frequencies(**options):
    """How often each token comes, over many seeds."""
    rows = jnp.tile(LOGITS, (DRAWS, 1))
    how = sampling(DRAWS, seeds=np.arange(DRAWS), **options)
    tokens = jax.jit(draw)(rows, how, 0)
    return np.bincount(tokens, minlength=5) / DRAWS


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"temperature": 1.0}, [0.4, 0.1, 0.25, 0.05, 0.2]),
        ({"temperature": 0.5}, [0.16, 0.01, 0.0625, 0.0025, 0.04]),
        ({"temperature": 1.0, "top_k": 2}, [0.4, 0, 0.25, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.6}, [0.4, 0, 0.25, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.66}, [0.4, 0, 0.25, 0, 0.2]),
        ({"temperature": 2.0, "top_k": 3}, [0.4**0.5, 0, 0.5, 0, 0.2**0.5]),
        ({"temperature": 1.0, "top_k": 9}, [0.4, 0.1, 0.25, 0.05, 0.2]),
    ],
)
def test_the_distribution(options, shares):
    expected = np.array(shares) / np.sum(shares)
    found = frequencies(**options)
    assert (found[expected == 0] == 0).all()
    spread = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(found - expected) <= 5 * spread).all(), found


def test_certain_draws_are_greedy():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 50)))
    for options in (
        {},
        {"temperature": 0.0, "top_k": 5},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1e-4},
    ):
        tokens = draw(logits, sampling(6, seeds=3, **options), 7)
        np.testing.assert_array_equal(tokens, jnp.argmax(logits, axis=-1))


def test_the_batch_around_a_row_does_not_matter():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(8, 40)))
    heat = np.linspace(0, 2, 8, dtype=np.float32)
    options = {"temperature": heat, "top_k": np.arange(8), "seeds": np.arange(8)}
    numbers = np.arange(8) * 3
    together = draw(logits, sampling(8, **options), numbers)
    for i in range(8):
        own = {name: value[i] for name, value in options.items()}
        alone = draw(logits[i : i + 1], sampling(1, **own), int(numbers[i]))
        assert alone[0] == together[i]


def test_seed_and_number_both_matter():
    logits = jnp.zeros((1, 1000))
    tokens = {
        int(draw(logits, sampling(1, temperature=1.0, seeds=seed), number)[0])
        for seed in range(5)
        for number in range(5)
    }
    assert len(tokens) > 20


def test_everything_out_of_range_is_listed():
    with pytest.raises(ValueError) as refused:
        sampling(2, temperature=[1.0, np.nan], top_k=1.5, top_p=0.0, seeds=[1, 2, 3])
    for name in ("temperature", "top_k", "top_p", "seeds"):
        assert f"{name}: expected" in str(refused.value)
