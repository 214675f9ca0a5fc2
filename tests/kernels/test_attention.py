"""Tiles compute the softmax over exactly the keys a query may see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_kernels.attention import cases, xla
from elastic_kernels.attention.api import causal_attention

attend = jax.jit(causal_attention, static_argnames="implementation")


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@functools.partial(jax.jit, static_argnames="implementation")
def run(q, k, v, options, implementation="xla"):
    """The output and the gradients of queries, keys and values."""
    f = functools.partial(causal_attention, implementation=implementation, **options)
    y, pull = jax.vjp(f, q, k, v)
    cotangent = np.random.default_rng(3).standard_normal(y.shape)
    return y, pull(jnp.asarray(cotangent, y.dtype))


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)


def assert_close(actual, expected, bound):
    for got, want in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert error(got, want) < bound


@pytest.mark.parametrize("name", cases.TESTED)
def test_values_and_gradients(name, float64):
    inputs = cases.inputs(cases.TESTED[name], dtype=np.float64)
    assert_close(run(*inputs), run(*inputs, "reference"), 1e-12)


def test_one_token_gets_its_own_value(float64):
    q, k, v, _ = cases.inputs(cases.Case(b=2, t=1, k=2, q=3, h=4), dtype=np.float64)
    y, (dq, dk, _) = run(q, k, v, {})
    assert_close(y, jnp.broadcast_to(v[:, :, :, None], y.shape), 1e-12)
    assert max(np.abs(dq).max(), np.abs(dk).max()) < 1e-14


def test_float32():
    inputs = cases.inputs(cases.TESTED["documents"])
    assert_close(run(*inputs), run(*inputs, "reference"), 1e-5)


def test_bfloat16_stays_in_the_error_budget():
    """Against float32: at most twice the error of the reference run in bfloat16."""
    q, k, v, options = cases.inputs(cases.TESTED["documents"])
    narrow = [a.astype(jnp.bfloat16) for a in (q, k, v)]
    exact = run(*(a.astype(jnp.float32) for a in narrow), options, "reference")
    plain, got = run(*narrow, options, "reference"), run(*narrow, options)
    for e, p, g in zip(*map(jax.tree.leaves, (exact, plain, got)), strict=True):
        assert g.dtype == jnp.bfloat16
        assert error(g, e) <= 2 * error(p, e)


@pytest.mark.parametrize("name, block", [("documents", 5), ("prefill", 200)])
def test_any_block_size_computes_the_same(name, block, float64, monkeypatch):
    inputs = cases.inputs(cases.TESTED[name], dtype=np.float64)
    want = run(*inputs, "reference")
    monkeypatch.setattr(xla, "BLOCK", block)
    assert_close(run.__wrapped__(*inputs), want, 1e-12)


def test_no_query_sees_a_later_key(float64):
    """By gradient: what a query does not see has exactly no influence on it."""
    q, k, v, _ = cases.inputs(cases.TESTED["uneven_blocks"], dtype=np.float64)
    at = 66  # inside the second of three blocks

    def one(k, v):
        return jnp.sum(jnp.sin(causal_attention(q, k, v)[:, at]))

    for gradient in jax.jit(jax.grad(one, (0, 1)))(k, v):
        assert not gradient[:, at + 1 :].any()
        assert gradient[:, : at + 1].any(axis=(0, 2, 3)).all()


def test_documents_are_computed_apart(float64):
    q, k, v, _ = cases.inputs(cases.TESTED["uneven_blocks"], dtype=np.float64)
    lengths = 70, 3, 58
    ids = jnp.asarray(np.repeat([5, -1, 5 - 3], lengths), jnp.int32)
    packed = attend(q, k, v, segment_ids=jnp.broadcast_to(ids, q.shape[:2]))
    start = 0
    for length in lengths:
        here = slice(start, start + length)
        assert_close(packed[:, here], attend(q[:, here], k[:, here], v[:, here]), 1e-12)
        start += length


@pytest.mark.parametrize("chunks", [(1,) * 20, (7, 1, 12)])
def test_a_cache_continues_the_sequence(chunks, float64):
    """Chunks over a longer cache, its end full of nonsense, equal one whole pass."""
    case = cases.Case(b=2, t=20, k=2, q=3, h=4)
    q, k, v, _ = cases.inputs(case, dtype=np.float64)
    stale = jnp.full((2, 110, 2, 4), 1e6)
    k_cache, v_cache = (jnp.concatenate([a, stale], axis=1) for a in (k, v))
    parts, held = [], 0
    for t in chunks:
        offset = jnp.full((2,), held)
        part = q[:, held : held + t]
        parts.append(attend(part, k_cache, v_cache, offset=offset))
        held += t
    assert_close(jnp.concatenate(parts, axis=1), attend(q, k, v), 1e-12)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("t", [1, 70])
def test_a_query_that_sees_nothing_gets_zeros(t, implementation):
    case = cases.Case(b=2, t=t, k=1, q=2, h=4, s=90, offset=(-t, 3))
    q, k, v, options = cases.inputs(case)
    y, gradients = run(q, k, v, options, implementation)
    assert not y[0].any() and y[1].any()
    if implementation == "xla":
        for gradient in gradients:
            assert np.isfinite(gradient).all() and not gradient[0].any()


def test_huge_scores_stay_finite():
    q, k, v, options = cases.inputs(cases.TESTED["documents"])
    leaves = jax.tree.leaves(run(1e4 * q, 1e4 * k, v, options))
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_composes_with_vmap_and_checkpoint(float64):
    for name in ("documents", "prefill"):
        inputs = [cases.inputs(cases.TESTED[name], seed, np.float64) for seed in (0, 1)]
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *inputs)
        got = jax.jit(jax.vmap(jax.checkpoint(run)))(*stacked)
        for i, row in enumerate(inputs):
            mine = jax.tree.map(lambda a, i=i: a[i], got)
            assert_close(mine, run(*row, "reference"), 1e-12)


def test_memory_and_program_do_not_grow_with_pairs():
    """Twice the length: about twice the temporaries, and the very same program."""

    def compiled(t):
        q, k, v, options = cases.inputs(cases.Case(b=1, t=t, k=1, q=2, h=8))
        return run.lower(q, k, v, options).compile()

    short, long = compiled(1024), compiled(2048)
    sizes = [c.memory_analysis().temp_size_in_bytes for c in (short, long)]
    assert sizes[1] < 2.2 * sizes[0] < 1024**2 * 4
    assert abs(len(long.as_text()) / len(short.as_text()) - 1) < 0.1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": (2, 16, 1, 5)}, "pass offset"),
        ({"v": (2, 17, 1, 4)}, r"v has .* \(2, 17, 1, 4\), expected \(2, 17, 1, 5\)"),
        ({"segment_ids": (17,)}, r"segment_ids has shape \(17,\), expected \(2, 17\)"),
        ({"offset": (17,)}, r"offset has shape \(17,\), expected \(2,\)"),
        ({"offset": (2,), "segment_ids": (2, 17)}, "at most one"),
    ],
)
def test_mistakes_are_named(change, message):
    q, k, v, _ = cases.inputs(cases.TESTED["one_block"])
    named = {"q": q, "k": k, "v": v}
    named |= {name: jnp.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        causal_attention(**named)
