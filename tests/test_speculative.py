"""Drafts change how fast a text is written, and nothing about the text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import model

NEW, K = 40, 3
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
RNG = np.random.default_rng(3)
LENGTHS = np.array([9, 1, 5, 12])
PROMPTS = RNG.integers(0, 97, (4, 12))


@pytest.fixture(scope="module")
def cfg(talker):
    return talker[1]


@pytest.fixture(scope="module")
def small(cfg):
    return ej.counts(cfg, embed=48, heads_per_group=1, expert_ffn=16, experts=3)


@pytest.fixture(scope="module")
def run(talker):
    params, cfg = talker
    given = {"cfg": cfg, "max_new_tokens": NEW, "lengths": LENGTHS, "draft_tokens": K}
    return functools.partial(ej.generate, params, PROMPTS, **given)


def assert_same(out, want):
    for name in ("tokens", "lengths", "stopped"):
        np.testing.assert_array_equal(getattr(out, name), getattr(want, name))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": [0.0, 1.0, 0.7, 1.5], "top_p": 0.9, "seeds": range(4)},
        {"max_new_tokens": np.array([1, 40, 7, 2])},
    ],
    ids=["greedy", "sampled", "limits"],
)
def test_the_text_is_the_larger_models_own(run, small, options):
    if "seeds" in options:
        options = options | {"seeds": np.arange(4)}
    want = run(**options)
    assert_same(run(draft=small, **options), want)


def test_rows_end_where_they_would(run, small):
    free = run()
    for stop in (int(free.tokens[0, 5]), int(free.tokens[1, 0])):
        assert_same(run(draft=small, stop_tokens=stop), run(stop_tokens=stop))


def test_a_perfect_draft_is_always_accepted(run, cfg):
    out = run(draft=ej.counts(cfg))
    assert (out.rounds == -(-NEW // (K + 1))).all()
    heated = run(draft=ej.counts(cfg), temperature=1.0, seeds=np.arange(4))
    assert (heated.rounds == -(-NEW // (K + 1))).all()


def test_a_draft_is_accepted_as_often_as_it_is_right(run, small, talker):
    """The rounds are those of a count by hand: draft, compare, take."""
    params, cfg = talker
    out = run(draft=small)
    for row, n in enumerate(LENGTHS):
        text, rounds, written = list(PROMPTS[row, :n]), 0, 0
        true = out.tokens[row].tolist()
        while written < NEW:
            guess = ej.generate(
                params, [text], cfg, counts=small, max_new_tokens=K
            ).tokens[0]
            right = 0
            while (
                right < K
                and written + right < NEW
                and guess[right] == true[written + right]
            ):
                right += 1
            took = min(right + 1, NEW - written)
            text += true[written : written + took]
            written, rounds = written + took, rounds + 1
            if rounds > 12:  # some are enough
                break
        else:
            assert out.rounds[row] == rounds


def test_the_distribution_is_the_larger_models(talker):
    """The second sampled token, given the first, over many seeds."""
    params, cfg = talker
    rows, near = 2048, ej.counts(cfg, shared_ffn=32)
    prompt = np.tile(PROMPTS[:1, :5], (rows, 1))
    options = {"temperature": 1.0, "top_k": 4, "seeds": np.arange(rows)}
    out = ej.generate(
        params, prompt, cfg, max_new_tokens=2, draft=near, draft_tokens=2, **options
    )
    assert 1 < np.mean(out.lengths / out.rounds) < 2  # Some drafts were taken.
    best = int(np.bincount(out.tokens[:, 0]).argmax())
    seconds = out.tokens[out.tokens[:, 0] == best][:, 1]
    text = jnp.asarray([[*PROMPTS[0, :5], best]])
    logits = np.asarray(ej.apply(params, text, cfg)[0, -1], np.float64)
    kept = np.argsort(-logits)[:4]
    shares = np.exp(logits[kept] - logits[kept].max())
    shares /= shares.sum()
    found = np.array([(seconds == token).mean() for token in kept])
    assert np.isclose(found.sum(), 1)
    spread = np.sqrt(shares * (1 - shares) / len(seconds))
    assert (np.abs(found - shares) < 4.5 * spread).all(), (found, shares)


def test_thoughts_and_answers_are_drafted_too(talker, small):
    params, cfg = talker
    given = {
        "think": ej.counts(cfg, expert_ffn=16),
        "end_of_thinking": (95, 96),
        "thinking_cap": np.array([3, 9, 1, 6]),
        "grace": 3,
        "newline": 11,
        "max_answer": 12,
        "stop_tokens": 7,
        "lengths": LENGTHS,
        "temperature": 0.8,
        "seeds": np.arange(4),
    }
    run = functools.partial(ej.think_and_answer, params, PROMPTS, cfg, **given)
    for hand_over in ("reprefill", "transplant"):
        want = run(hand_over=hand_over)
        out = run(hand_over=hand_over, draft=small, draft_tokens=K)
        for name in ("thoughts", "answers", "capped", "thought_lengths"):
            np.testing.assert_array_equal(getattr(out, name), getattr(want, name))


@functools.partial(jax.jit, static_argnames=("cfg", "tentative"))
def extend(params, tokens, cache, lengths, cfg, tentative=False):
    return ej.extend(params, tokens, cache, cfg, lengths=lengths, tentative=tentative)


def test_what_is_taken_back_leaves_no_trace(talker):
    """Reading tentatively and keeping n tokens is reading n tokens."""
    params, cfg = talker
    settle = jax.jit(functools.partial(model.settle, cfg=cfg))
    draw = lambda rng: jnp.asarray(rng.integers(0, 97, (3, 5)))
    every = jnp.full(3, 5)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        empty = ej.init_cache(cfg, 3, 32)
        _, cache = extend(params, draw(rng), empty, every, cfg)
        ahead, kept = draw(rng), jnp.asarray(rng.integers(0, 6, 3))
        want, after = extend(params, ahead, cache, kept, cfg)
        got, held = extend(params, ahead, cache, every, cfg, tentative=True)
        settled = settle(params, held, lengths=kept)
        assert jax.tree.structure(settled) == jax.tree.structure(after)
        for row, n in enumerate(kept.tolist()):
            np.testing.assert_allclose(got[row, :n], want[row, :n], **CLOSE)
        more = draw(rng)
        a, b = (extend(params, more, c, every, cfg)[0] for c in (settled, after))
        np.testing.assert_allclose(a, b, **CLOSE)
        for name in ("conv_x", "conv_B", "conv_C", "state"):
            a, b = (c["layers"][0][name] for c in (settled, after))
            np.testing.assert_allclose(a, b, **CLOSE)
