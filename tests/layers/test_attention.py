"""Attention: a plain softmax over the past, apart by document, exact with a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.layers.attention import CACHE, SPECS, attention

SIZES = {"embed": 6, "kv_heads": 2, "q_per_kv": 3, "head_dim": 4}
TIGHT = {"rtol": 1e-11, "atol": 1e-13}


@pytest.fixture
def params(weights):
    return weights(SPECS, SIZES)


def random(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


@jax.jit
def run(params, x, masks=None, **options):
    return attention(params, x, masks or {}, **options)


def plain(params, x):
    """One document [t, d], query by query and head by head."""
    w = {name: np.asarray(value) for name, value in params.items()}
    x, y = np.asarray(x), np.zeros(x.shape)
    for i in range(len(x)):
        for k in range(2):
            keys, values = x[: i + 1] @ w["k"][:, k], x[: i + 1] @ w["v"][:, k]
            for g in range(3):
                scores = keys @ (x[i] @ w["q"][:, k, g]) / np.sqrt(4)
                weights = np.exp(scores - scores.max())
                y[i] += weights / weights.sum() @ values @ w["o"][k, g]
    return y


def empty(rows, length):
    sizes = SIZES | {"batch": rows, "length": length}
    held = {n: jnp.zeros([sizes[d] for d in s.dims]) for n, s in CACHE.items()}
    return held | {"filled": jnp.zeros(rows, int)}


def test_it_is_a_softmax_over_the_past(params):
    x = random(2, 7, 6)
    y, cache = run(params, x)
    np.testing.assert_allclose(y, [plain(params, row) for row in x], **TIGHT)
    assert cache is None


def test_no_token_sees_a_later_one(params):
    """By gradient, also through the backward pass's own tiles."""
    x, at = random(1, 70, 6), 65  # in the second tile

    @jax.jit
    @jax.grad
    def gradient(x):
        return jnp.sum(jnp.sin(attention(params, x, {})[0][:, at]))

    seen = gradient(x)[0].any(axis=-1)
    assert seen[: at + 1].all() and not seen[at + 1 :].any()


def test_documents_are_read_apart(params):
    lengths = (3, 1, 4)
    ids = jnp.repeat(jnp.array([4, -2, 0]), jnp.array(lengths))[None]
    x = random(1, 8, 6)
    y, _ = run(params, x, segment_ids=ids)
    documents = np.split(x[0], np.cumsum(lengths)[:-1])
    want = np.concatenate([plain(params, document) for document in documents])
    np.testing.assert_allclose(y[0], want, **TIGHT)


def test_the_past_has_no_order(params):
    x = random(1, 7, 6)
    shuffled = x[:, jnp.array([3, 0, 5, 1, 4, 2, 6])]
    last = [run(params, rows)[0][:, -1] for rows in (x, shuffled)]
    np.testing.assert_allclose(*last, **TIGHT)


def test_a_prefix_of_every_group_is_kept(params):
    mask, x = jnp.array([1.0, 1.0, 0.0]), random(2, 7, 6)
    fewer = params | {"q": params["q"][:, :, :2], "o": params["o"][:, :2]}
    np.testing.assert_allclose(
        run(params, x, {"q_per_kv": mask})[0], run(fewer, x)[0], **TIGHT
    )


@pytest.mark.parametrize("padding", [np.nan, 1e9])
def test_a_cache_holds_valid_tokens_and_no_others(params, padding):
    """Ragged chunks equal one document per row; padding leaves no trace."""
    text, cache = random(3, 8, 6), empty(3, 9)
    want = [plain(params, row) for row in text]
    at = np.zeros(3, int)
    for lengths in ([4, 1, 0], [2, 4, 1], [0, 3, 4]):
        x = np.full((3, 4, 6), padding)
        for row, n in enumerate(lengths):
            x[row, :n] = text[row, at[row] : at[row] + n]
        y, held = run(params, x, cache=cache, lengths=jnp.array(lengths))
        for row, n in enumerate(lengths):
            now = slice(at[row], at[row] + n)
            np.testing.assert_allclose(y[row, :n], want[row][now], **TIGHT)
        at += lengths
        cache = held | {"filled": jnp.asarray(at)}

    equations = {"k": "td,dkh->tkh", "v": "td,dkh->tkh"}
    for name, equation in equations.items():
        for row, n in enumerate(at):
            stored = np.einsum(equation, text[row, :n], params[name])
            np.testing.assert_allclose(cache[name][row, :n], stored, **TIGHT)
            assert not cache[name][row, n:].any()


def test_what_does_not_fit_is_dropped_not_clamped(params):
    full = empty(2, 4) | {"filled": jnp.array([3, 1])}
    full |= {"k": full["k"] + 7, "v": full["v"] + 7}
    _, cache = run(params, random(2, 3, 6), cache=full)
    for stored in (cache["k"], cache["v"]):
        assert (stored[0, :3] == 7).all() and (stored[1, :1] == 7).all()
        assert (stored[0, 3:] != 7).all() and (stored[1, 1:] != 7).all()


def test_a_row_of_a_batch_is_that_row_alone(params):
    x = random(2, 7, 6)
    step = functools.partial(run, params)
    for row in range(2):
        other = x.at[1 - row].multiply(1e3)
        np.testing.assert_array_equal(step(other)[0][row], step(x)[0][row])
