"""The same bits of every logit, however the text came to be (RELIABILITY, row 27)."""

import functools

import jax
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import exact, model

ROWS, NEW = 8, 230  # some 20,000 tokens in all tests together
RNG = np.random.default_rng(5)
LENGTHS = RNG.integers(1, 41, ROWS)
PROMPTS = RNG.integers(0, 97, (ROWS, 40))


@pytest.fixture(scope="module")
def run(talker):
    params, cfg = talker
    return functools.partial(
        ej.generate, params, cfg=cfg, max_new_tokens=NEW, exact=True, keep_logits=True
    )


@pytest.fixture(scope="module")
def want(run):
    out = run(PROMPTS, lengths=LENGTHS)
    assert len(np.unique(out.tokens)) > 20
    return out


def assert_same(out, want, rows, start=0):
    np.testing.assert_array_equal(out.tokens, want.tokens[rows][:, start:])
    bits = lambda a: np.ascontiguousarray(a).view(np.int32)
    np.testing.assert_array_equal(bits(out.logits), bits(want.logits[rows][:, start:]))


def test_ordinary_reading_gives_other_bits(talker, want):
    """So that the tests below have something to show."""
    params, cfg = talker
    out = ej.generate(
        params,
        PROMPTS[:3],
        cfg,
        max_new_tokens=NEW,
        lengths=LENGTHS[:3],
        keep_logits=True,
    )
    near = np.abs(out.logits[:, 0] - want.logits[:3, 0]).max()
    assert 0 < near < 1e-4


@pytest.mark.parametrize("rows", range(1, 9))
def test_any_batch(run, want, rows):
    chosen = np.random.default_rng(rows).permutation(ROWS)[:rows]
    out = run(PROMPTS[chosen], lengths=LENGTHS[chosen])
    assert_same(out, want, chosen)


@pytest.mark.parametrize("cut", [1, 37, 150])
def test_stopped_and_resumed(run, want, cut):
    """From the text alone: another prompt, another cache."""
    text = np.zeros((ROWS, 40 + cut), int)
    for row, n in enumerate(LENGTHS):
        text[row, :n] = PROMPTS[row, :n]
        text[row, n : n + cut] = want.tokens[row, :cut]
    out = run(text, lengths=LENGTHS + cut, max_new_tokens=NEW - cut)
    assert_same(out, want, np.arange(ROWS), start=cut)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_speculation(run, want, talker, k):
    """With a bad draft; and with a perfect one, of which every token is accepted."""
    _, cfg = talker
    small = ej.counts(cfg, embed=32, heads_per_group=1, expert_ffn=16)
    rows = np.arange(ROWS)
    given = {"lengths": LENGTHS, "draft_tokens": k}
    out = run(PROMPTS, draft=small, **given)
    assert_same(out, want, rows)
    if k == 8:
        out = run(PROMPTS, draft=ej.counts(cfg), **given)
        assert_same(out, want, rows)
        assert (out.rounds == -(-NEW // (k + 1))).all()


def test_any_split_of_the_reading(talker, want):
    """A whole text in random pieces, every row in pieces of its own."""
    params, cfg = talker
    text = np.zeros((8, 40 + NEW), int)
    for row, n in enumerate(LENGTHS):
        text[row, :n] = PROMPTS[row, :n]
        text[row, n : n + NEW] = want.tokens[row]

    @jax.jit
    def read(params, tokens, lengths, cache):
        logits, cache = exact.extend(params, tokens, cache, cfg, lengths=lengths)
        return logits, exact.settle(params, cache, cfg, lengths=lengths)

    ends, rng = LENGTHS + NEW - 1, np.random.default_rng(2)
    at, cache = np.zeros(8, int), model.init_cache(cfg, 8, 512)
    while (at < ends).any():
        lengths = np.minimum(rng.integers(0, 17, 8), ends - at)
        piece = np.stack([np.resize(text[r, at[r] :], 16) for r in range(8)])
        logits, cache = read(params, piece, lengths, cache)
        for row, n in enumerate(LENGTHS):
            for j in range(lengths[row]):
                if (number := at[row] + j - n + 1) >= 0:
                    found = np.asarray(logits[row, j])
                    assert (found == want.logits[row, number]).all()
        at += lengths


def test_what_does_not_fit_is_named(talker):
    params, cfg = talker
    cache = model.init_cache(cfg, 8, 200)
    for rows, time, words in (
        (16, 2, "16 rows of 2 tokens"),
        (8, 17, "8 rows of 17 tokens"),
        (8, 2, "a cache of length 200, expected a multiple of 256"),
    ):
        with pytest.raises(ValueError, match=words):
            tokens, lengths = np.zeros((rows, time), int), np.ones(rows, int)
            exact.extend(params, tokens, cache, cfg, lengths=lengths)
    given = {"max_new_tokens": 1, "exact": True, "draft": ej.counts(cfg)}
    with pytest.raises(ValueError) as error:
        ej.generate(params, np.ones((9, 2), int), cfg, draft_tokens=16, **given)
    for words in ("at most 8 rows in a call, got 9", "expected an int in 1..15"):
        assert words in str(error.value)
