"""Thinking with one size, answering with another: text, cache, caps and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import axes
from elastic_jax.budget_control import think_and_answer
from elastic_jax.decoding import _read, _write

CFG = ej.ModelConfig(
    pattern="ME*M",
    vocab=97,
    embed=32,
    ssm_groups=2,
    heads_per_group=2,
    ssm_head_dim=16,
    ssm_state=32,
    kv_heads=1,
    q_per_kv=2,
    head_dim=8,
    experts=4,
    expert_ffn=32,
    shared_ffn=16,
    ffn=16,
    top_k=2,
)
LARGE = ej.counts(CFG)
# Narrower on axes that leave the cache alone, and on all that shape it.
NARROW = ej.counts(CFG, embed=16, expert_ffn=16, q_per_kv=1)
SMALL = ej.counts(CFG, embed=16, heads_per_group=1, ssm_state=16, experts=3)
PROMPTS = np.random.default_rng(0).integers(0, CFG.vocab, (3, 6))
LENGTHS = np.array([6, 2, 4])
END, STOP = (95, 96), 94
CAP, ANSWER = 5, 7


@pytest.fixture(scope="module")
def params():
    draw, specs = np.random.default_rng(1), ej.param_specs(CFG)

    def value(path, spec):
        noise = draw.standard_normal(axes.shape(CFG, specs, path, spec))
        if spec.contracted:
            return noise / np.sqrt(np.prod([getattr(CFG, d) for d in spec.contracted]))
        return (spec.init == "ones") + 0.3 * noise

    with jax.enable_x64(False):
        return jax.tree.map(jnp.float32, axes.map_specs(value, specs))


def run(params, prompts=PROMPTS, **changes):
    given = {
        "think": SMALL,
        "answer": LARGE,
        "end_of_thinking": END,
        "stop_tokens": STOP,
        "thinking_cap": CAP,
        "max_answer": ANSWER,
        "lengths": LENGTHS,
    }
    return think_and_answer(params, prompts, CFG, **given | changes)


def texts(out, prompts=PROMPTS, lengths=LENGTHS):
    """Per row: the prompt with its thought, and the answer."""
    for row, n in enumerate(lengths):
        thought = out.thoughts[row][: out.thought_lengths[row]]
        answer = out.answers[row][: out.answer_lengths[row]]
        yield np.concatenate([prompts[row][:n], thought]), np.asarray(answer)


def model(params, counts):
    specs = ej.param_specs(CFG)
    return ej.slice_params(params, specs, counts), ej.slice_config(CFG, counts)


def generated(params, counts, prompt, length):
    """What one submodel writes behind a prompt, ended by STOP."""
    small, cfg = model(params, counts)
    out = ej.generate(
        small, np.asarray(prompt)[None], cfg, max_new_tokens=length, stop_tokens=STOP
    )
    return np.asarray(out.tokens[0][: out.lengths[0]])


def test_a_thought_past_its_cap_is_ended(params):
    out = run(params)
    assert out.capped.all() and (out.thought_lengths == CAP + len(END)).all()
    np.testing.assert_array_equal(out.thoughts[:, CAP:], [END] * 3)
    for row, (text, _) in enumerate(texts(out)):
        prompt = PROMPTS[row][: LENGTHS[row]]
        thought = generated(params, SMALL, prompt, CAP)
        np.testing.assert_array_equal(text[len(prompt) :][:CAP], thought)


def test_caps_differ_per_row(params):
    out = run(params, thinking_cap=np.array([1, 5, 3]))
    np.testing.assert_array_equal(out.thought_lengths, [3, 7, 5])
    for row, cap in enumerate([1, 5, 3]):
        np.testing.assert_array_equal(out.thoughts[row][cap : cap + 2], END)


def test_a_thought_may_end_by_itself(params):
    """At the token that ends it, which is then the last."""
    free = np.asarray(run(params).thoughts)[0]
    own = int(free[2])  # what row 0 writes as its third token
    first = int(np.flatnonzero(free == own)[0])
    out = run(params, end_of_thinking=(own,))
    assert not out.capped[0] and out.thought_lengths[0] == first + 1
    assert out.thoughts[0][first] == own and not out.thoughts[0][first + 1 :].any()


def test_the_grace_waits_for_a_newline(params):
    free = np.asarray(run(params, thinking_cap=9).thoughts)[:, :9]
    newline = int(free[1][3])
    out = run(params, thinking_cap=2, grace=4, newline=newline)
    for row in range(3):
        # Ended behind the first newline from the cap on, or when the grace is over.
        n = next((i for i in range(2, 6) if free[row][i - 1] == newline), 6)
        assert out.thought_lengths[row] == n + len(END), row
        np.testing.assert_array_equal(out.thoughts[row][:n], free[row][:n])


@pytest.mark.parametrize(
    ("think", "answer"), [(SMALL, LARGE), (LARGE, SMALL)], ids=["S->L", "L->S"]
)
def test_reprefill_answers_what_the_text_asks(params, think, answer):
    out = run(params, think=think, answer=answer)
    for text, found in texts(out):
        np.testing.assert_array_equal(found, generated(params, answer, text, ANSWER))


@pytest.mark.parametrize(
    ("think", "answer"),
    [(SMALL, LARGE), (NARROW, LARGE), (LARGE, SMALL)],
    ids=["S->L", "N->L", "L->S"],
)
def test_transplant_answers_as_masks_that_change_along_time(params, think, answer):
    """The masked parent, in one pass over the text, agrees with every answer token."""
    out = run(params, think=think, answer=answer, hand_over="transplant")
    before, after = (ej.masks_from_counts(CFG, counts) for counts in (think, answer))
    for text, found in texts(out):
        whole = np.concatenate([text, found])
        early = (jnp.arange(len(whole)) < len(text) - 1)[None, :, None]
        masks = jax.tree.map(
            lambda a, b, early=early: jnp.where(early, a, b),
            *(spelled_out(m, len(whole)) for m in (before, after)),
        )
        logits = ej.apply(params, jnp.asarray(whole)[None], CFG, masks=masks)
        best = np.asarray(jnp.argmax(logits[0], axis=-1))[len(text) - 1 : -1]
        np.testing.assert_array_equal(found, best)


def spelled_out(masks, time):
    """All axes that the test cuts, as masks along time."""
    cut = ("embed", "expert_ffn", "q_per_kv", "heads_per_group", "ssm_state", "experts")
    blocks = {"expert_ffn": 1, "q_per_kv": 1, "experts": 1, "embed": 0}
    found = {}
    for axis in cut:
        mask = masks.get(axis)
        size = getattr(CFG, axis)
        each = mask if isinstance(mask, tuple) else (mask,) * blocks.get(axis, 2)
        full = [jnp.ones(size) if m is None else m for m in each or (mask,)]
        spread = [jnp.broadcast_to(m, (1, time, size)) for m in full]
        found[axis] = spread[0] if axis == "embed" else tuple(spread)
    return found


def test_one_submodel_throughout_is_generate(params):
    """Thought and answer of one size, without a cut: one text in one go."""
    free = generated(params, LARGE, PROMPTS[0], 12)
    end = int(free[4])
    first = int(np.flatnonzero(free == end)[0])
    for hand_over in ("reprefill", "transplant"):
        out = run(
            params,
            PROMPTS[:1],
            lengths=None,
            think=None,
            answer=None,
            end_of_thinking=(end,),
            thinking_cap=20,
            max_answer=12 - first - 1,
            hand_over=hand_over,
        )
        ((text, answer),) = texts(out, PROMPTS[:1], [6])
        written = np.concatenate([text[6:], answer])
        np.testing.assert_array_equal(written, free[: len(written)])
        assert len(written) == len(free)


def test_rows_do_not_influence_one_another(params):
    options = {"temperature": 1.3, "top_k": 8}
    for hand_over in ("reprefill", "transplant"):
        given = functools.partial(run, params, hand_over=hand_over, **options)
        together = given(seeds=np.arange(3))
        for row in range(3):
            prompt = PROMPTS[row : row + 1, : LENGTHS[row]]
            alone = given(prompt, lengths=None, seeds=row)
            for name in ("thoughts", "answers", "thought_lengths", "answer_lengths"):
                a, b = getattr(alone, name), getattr(together, name)
                np.testing.assert_array_equal(a[0], b[row])


def test_a_compiled_submodel_serves_other_requests_and_pairs(params):
    run(params)
    compiled = _read._cache_size(), _write._cache_size()
    run(params, (PROMPTS + 5) % CFG.vocab, lengths=[1, 6, 2], seeds=9)
    run(params, thinking_cap=np.array([5, 1, 2]), temperature=0.7)
    run(params, stop_tokens=7, max_answer=np.array([5, 3, 6]))
    run(params, think=LARGE, answer=SMALL)  # both are known from the pairs above
    assert (_read._cache_size(), _write._cache_size()) == compiled


def test_everything_that_does_not_fit_is_listed(params):
    with pytest.raises(ValueError) as refused:
        run(
            params,
            PROMPTS + 90,
            thinking_cap=0,
            max_answer=0,
            grace=-1,
            newline=199,
            stop_tokens=97,
            end_of_thinking=(),
            hand_over="telepathy",
        )
    for words in (
        "row 0: token",
        "thinking_cap: expected ints from 1 on",
        "max_answer: expected ints from 1 on",
        "grace: expected an int from 0 on, got -1",
        "newline: expected a token in 0..96, got 199",
        "stop token 97: expected one in 0..96",
        "end_of_thinking: expected at least one token",
        "('reprefill', 'transplant'), got 'telepathy'",
    ):
        assert words in str(refused.value)
    shallow = ej.counts(CFG, layers=(1, 1, 1, 0))
    with pytest.raises(ValueError, match="different blocks.*reprefill"):
        run(params, think=shallow, hand_over="transplant")
    out = run(params, think=shallow)
    assert out.answers.shape == (3, ANSWER)
