"""Generation: greedy, ragged, stopped, and every row as if it were alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import axes, decoding
from elastic_jax.decoding import _read, _write
from elastic_jax.generate import generate

CFG = ej.ModelConfig(
    pattern="M*E",
    vocab=11,
    embed=32,
    ssm_groups=2,
    heads_per_group=2,
    ssm_head_dim=4,
    ssm_state=4,
    kv_heads=2,
    q_per_kv=2,
    head_dim=4,
    experts=4,
    expert_ffn=6,
    shared_ffn=6,
    ffn=6,
    top_k=2,
    routed_scaling_factor=2.5,
)
PROMPTS = np.array([[3, 1, 4, 1, 5, 9], [2, 7, 1, 0, 0, 0], [8, 0, 0, 0, 0, 0]])
LENGTHS = np.array([6, 3, 1])
NEW = 9


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def params():
    """Random weights, loud enough that the argmax wanders over the vocabulary."""
    specs, rng = ej.param_specs(CFG), np.random.default_rng(7)

    def draw(path, spec):
        noise = rng.standard_normal(axes.shape(CFG, specs, path, spec))
        fan = np.prod([getattr(CFG, dim) for dim in spec.contracted])
        return jnp.asarray(noise * (1 if path == ("embedding",) else fan**-0.5))

    return axes.map_specs(draw, specs)


run = functools.partial(generate, cfg=CFG, max_new_tokens=NEW)


@jax.jit
def next_tokens(params, text, lengths):
    logits = ej.apply(params, text, CFG, lengths=lengths)
    last = jnp.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)
    return jnp.argmax(last[:, 0], axis=-1)


def recomputed(params, prompts, lengths):
    """The argmax of a full forward pass without a cache, once per new token."""
    rows, at = np.arange(len(prompts)), np.array(lengths)
    text = np.pad(prompts, ((0, 0), (0, NEW)))
    tokens = []
    for _ in range(NEW):
        token = np.asarray(next_tokens(params, text, at))
        text[rows, at], at = token, at + 1
        tokens.append(token)
    return np.stack(tokens, axis=1)


def test_greedy_is_the_argmax_of_the_full_forward(params):
    out = run(params, PROMPTS, lengths=LENGTHS)
    assert len(np.unique(out.tokens)) > 4  # Not a fixed point by chance.
    np.testing.assert_array_equal(out.tokens, recomputed(params, PROMPTS, LENGTHS))
    assert out.lengths.tolist() == [NEW] * 3


def test_without_lengths_every_token_is_read(params):
    whole = run(params, PROMPTS)
    spelled = run(params, PROMPTS, lengths=np.full(3, 6))
    np.testing.assert_array_equal(whole.tokens, spelled.tokens)
    assert (whole.tokens != run(params, PROMPTS, lengths=LENGTHS).tokens).any()


def test_padding_may_hold_anything(params):
    want = run(params, PROMPTS, lengths=LENGTHS)
    padding = np.arange(6) >= LENGTHS[:, None]
    for value in (-1, 11, 10**6):
        ragged = np.where(padding, value, PROMPTS)
        got = run(params, ragged, lengths=LENGTHS)
        np.testing.assert_array_equal(got.tokens, want.tokens)


def test_a_stop_token_ends_its_row_only(params):
    """Up to its stop token a row is what it was; then it repeats the stop token."""
    free = np.asarray(run(params, PROMPTS, lengths=LENGTHS).tokens)
    ends = []
    for stop in range(CFG.vocab):
        out = run(params, PROMPTS, lengths=LENGTHS, stop_tokens=stop)
        for row in range(3):
            found = np.flatnonzero(free[row] == stop)
            end = found[0] + 1 if len(found) else NEW
            np.testing.assert_array_equal(out.tokens[row, :end], free[row, :end])
            assert (out.tokens[row, end:] == stop).all()
            assert out.lengths[row] == end
            ends.append(end)
    assert {1, NEW} < set(ends)  # At once, never, and something between.


def test_requests_of_a_batch_do_not_influence_one_another(params):
    out = run(params, PROMPTS, lengths=LENGTHS)
    turned = run(params, PROMPTS[::-1], lengths=LENGTHS[::-1])
    np.testing.assert_array_equal(turned.tokens[::-1], out.tokens)
    for row in range(3):
        alone = run(params, PROMPTS[row : row + 1], lengths=LENGTHS[row : row + 1])
        np.testing.assert_array_equal(alone.tokens[0], out.tokens[row])
        others = np.random.default_rng(row).integers(0, 11, (3, 6))
        others[row] = PROMPTS[row]
        stop = int(out.tokens[row, -1])  # The others may stop earlier, or never.
        here = np.where(np.arange(3) == row, LENGTHS, 6)
        got, want = (
            run(params, prompts, lengths=lengths, stop_tokens=stop)
            for prompts, lengths in ((others, here), (PROMPTS, LENGTHS))
        )
        np.testing.assert_array_equal(got.tokens[row], want.tokens[row])


def test_masks_generate_what_the_slice_generates(params):
    counts = ej.counts(CFG, embed=16, heads_per_group=1, q_per_kv=1, experts=3)
    masks = ej.masks_from_counts(CFG, counts)
    small = ej.slice_params(params, ej.param_specs(CFG), counts)
    masked = run(params, PROMPTS, lengths=LENGTHS, masks=masks)
    cut = run(small, PROMPTS, cfg=ej.slice_config(CFG, counts), lengths=LENGTHS)
    np.testing.assert_array_equal(masked.tokens, cut.tokens)
    assert (masked.tokens != run(params, PROMPTS, lengths=LENGTHS).tokens).any()


def test_sampled_rows_do_not_depend_on_their_batch(params):
    """Nor on the padding; another seed draws other tokens."""
    options = {"temperature": 1.5, "top_p": 0.95}
    seeds = np.arange(len(PROMPTS)) + 1
    together = run(params, PROMPTS, lengths=LENGTHS, seeds=seeds, **options)
    for i, n in enumerate(LENGTHS):
        prompt = np.asarray(PROMPTS)[i : i + 1, :n]
        alone = run(params, prompt, seeds=int(seeds[i]), **options)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
    other = run(params, PROMPTS, lengths=LENGTHS, seeds=seeds + 9, **options)
    assert (other.tokens != together.tokens).any()
    with pytest.raises(ValueError, match="temperature"):
        run(params, PROMPTS, temperature=-1)


def test_masks_along_time_are_refused(params):
    masks = {"embed": jnp.ones((3, 6, CFG.embed))}
    with pytest.raises(ValueError, match="masks change along time"):
        run(params, PROMPTS, masks=masks)


def compiled():
    return _read._cache_size(), _write._cache_size()


def test_a_bucket_is_compiled_once(params):
    """Whatever the requests: 20 random ones after a rehearsal."""
    fresh = ej.ModelConfig.from_dict(CFG.to_dict())
    largest = functools.partial(generate, params, np.ones((4, 16), int), fresh)
    out = largest(max_new_tokens=16, stop_tokens=(1, 2), rehearse=True)
    assert not out.lengths.any()
    before, rng = compiled(), np.random.default_rng(0)
    for _ in range(20):
        rows, time = rng.integers(3, 5), rng.integers(9, 17)
        out = run(
            params,
            rng.integers(0, 11, (rows, time)),
            lengths=rng.integers(1, time + 1, rows),
            max_new_tokens=rng.integers(7, 16, rows),
            stop_tokens=rng.integers(0, 11, 2).tolist(),
            temperature=rng.random(rows) * rng.integers(0, 2),
            seeds=rng.integers(0, 99, rows),
        )
        assert (out.lengths > 0).all()
    assert compiled() == before


def test_limits_are_per_row(params):
    free = run(params, PROMPTS, lengths=LENGTHS)
    out = run(params, PROMPTS, lengths=LENGTHS, max_new_tokens=np.array([2, 9, 5]))
    assert out.lengths.tolist() == [2, 9, 5] and not out.stopped.any()
    for row, n in enumerate(out.lengths):
        np.testing.assert_array_equal(out.tokens[row, :n], free.tokens[row, :n])


def test_counts_are_cut_inside_the_call(params):
    counts = ej.counts(CFG, embed=16, heads_per_group=1, q_per_kv=1, experts=3)
    small = ej.slice_params(params, ej.param_specs(CFG), counts)
    cut = run(small, PROMPTS, cfg=ej.slice_config(CFG, counts), lengths=LENGTHS)
    inside = run(params, PROMPTS, lengths=LENGTHS, counts=counts)
    np.testing.assert_array_equal(inside.tokens, cut.tokens)
    masks = ej.masks_from_counts(CFG, counts)
    with pytest.raises(ValueError, match="counts or masks, not both"):
        run(params, PROMPTS, counts=counts, masks=masks)
    with pytest.raises(ValueError, match="counts: expected the counts of one submodel"):
        run(params, PROMPTS, counts=[counts, None, None])


def test_long_prompts_are_read_in_chunks(params, monkeypatch):
    """The text is the same, and so are the logits, to rounding."""
    prompts = np.random.default_rng(3).integers(0, 11, (2, 70))
    given = {"lengths": np.array([70, 33]), "keep_logits": True}
    whole = run(params, prompts, **given)
    monkeypatch.setattr(decoding, "CHUNK", 32)
    chunks = run(params, prompts, **given)
    np.testing.assert_array_equal(chunks.tokens, whole.tokens)
    np.testing.assert_allclose(chunks.logits, whole.logits, rtol=1e-5, atol=1e-5)
    text = np.concatenate([prompts, whole.tokens], axis=1)
    want = ej.apply(params, jnp.asarray(text), CFG)[0, 69:-1]
    np.testing.assert_allclose(whole.logits[0], want, rtol=1e-5, atol=1e-5)


def test_a_listener_hears_every_token_and_may_end_rows(params):
    free = run(params, PROMPTS, lengths=LENGTHS)
    heard = [[], [], []]

    def listen(tokens, lengths):
        for row, n in enumerate(lengths):
            heard[row] += tokens[row, :n].tolist()
        return np.array([len(heard[0]) == 4, False, False])

    out = run(params, PROMPTS, lengths=LENGTHS, listener=listen)
    assert out.lengths.tolist() == [4, NEW, NEW] and not out.stopped.any()
    for row, n in enumerate(out.lengths):
        assert heard[row] == out.tokens[row, :n].tolist()
        np.testing.assert_array_equal(out.tokens[row, :n], free.tokens[row, :n])


def test_a_listener_that_fails_is_heard(params):
    def fail(tokens, lengths):
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        run(params, PROMPTS, listener=fail)


def test_a_text_can_be_continued(params):
    """With the same seeds: the random numbers go on where they were."""
    given = {"temperature": 1.2, "seeds": [4, 5, 6]}
    whole = run(params, PROMPTS, **given)
    first = run(params, PROMPTS, max_new_tokens=4, **given)
    text = np.concatenate([PROMPTS, first.tokens], axis=1)
    rest = run(params, text, max_new_tokens=NEW - 4, drawn=4, **given)
    np.testing.assert_array_equal(rest.tokens, whole.tokens[:, 4:])


def test_stop_strings_end_rows_across_tokens(params):
    free = run(params, PROMPTS, lengths=LENGTHS)
    pieces = [bytes([97 + i, 97 + i]) for i in range(11)]
    spelled = [b"".join(pieces[t] for t in row) for row in free.tokens.tolist()]
    string = spelled[0][3:6]  # of the second, third and fourth token
    out = run(
        params, PROMPTS, lengths=LENGTHS, stop_strings=[string, "zz"], pieces=pieces
    )
    for row, text in enumerate(spelled):
        at = text.find(string)
        n = NEW if at < 0 else -(-(at + len(string)) // 2)
        assert out.lengths[row] == n and out.stopped[row] == (at >= 0)
    with pytest.raises(ValueError, match="need the bytes of every token"):
        run(params, PROMPTS, stop_strings="a")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": [[1.0, 2.0]]}, r"integers \[b, t\], got float64 \(1, 2\)"),
        ({"prompts": [1, 2]}, r"integers \[b, t\], got int64 \(2,\)"),
        ({"prompts": np.zeros((0, 3), int)}, r"prompts are empty: shape \(0, 3\)"),
        ({"prompts": np.zeros((2, 0), int)}, r"prompts are empty: shape \(2, 0\)"),
        ({"prompts": [[1, 11]]}, "row 0: token 11 is outside the vocabulary of 11"),
        ({"prompts": [[1, 2], [3, -1]]}, "row 1: token -1 is outside the vocabulary"),
        ({"lengths": [6, 3]}, r"lengths: expected integers of shape \(3,\), got int64"),
        ({"lengths": [6.0, 3, 1]}, "lengths: expected integers .* got float64"),
        ({"lengths": [6, 0, 1]}, "row 1: length 0 is not in 1..6"),
        ({"lengths": [6, 3, 7]}, "row 2: length 7 is not in 1..6"),
        (
            {"max_new_tokens": 0},
            "max_new_tokens: expected ints from 1 on, one or 3, got 0",
        ),
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected ints .* got 2.5"),
        ({"stop_tokens": 11}, "stop token 11: expected one in 0..10"),
        ({"stop_tokens": (3, -1)}, "stop token -1: expected one in 0..10"),
        ({"stop_tokens": (2.0,)}, "stop token 2.0: expected one in 0..10"),
        ({"draft": {"embed": 16}}, "draft: expected the counts of one submodel"),
    ],
)
def test_mistakes_are_named(wrong, message):
    arguments = {"prompts": PROMPTS, "cfg": CFG, "max_new_tokens": NEW} | wrong
    with pytest.raises(ValueError, match=message):
        generate({}, **arguments)


def test_all_mistakes_come_together():
    with pytest.raises(ValueError) as error:
        generate(
            {},
            [[1, 99], [1, 2]],
            CFG,
            max_new_tokens=-1,
            lengths=[2, 3],
            stop_tokens=50,
        )
    for part in ("token 99", "row 1: length 3", "max_new_tokens", "stop token 50"):
        assert part in str(error.value)
