"""Mamba-2: the recurrence token by token, and what may outlive a token.

What a row keeps between calls (convolution tails, scan state) must be exactly what
the submodel that wrote it would have kept: nothing of padding, of an earlier document
or of a masked unit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.axes import CacheSpec
from elastic_jax.layers.mamba2 import CACHE, SPECS, mamba2

SIZES = {
    "embed": 6,
    "ssm_groups": 2,
    "heads_per_group": 3,
    "ssm_head_dim": 4,
    "ssm_state": 5,
    "conv_width": 4,
}
SMALL = {"heads_per_group": 1, "ssm_head_dim": 2, "ssm_state": 3}
EPS = 1e-5
TIGHT = {"rtol": 1e-10, "atol": 1e-13}


@pytest.fixture
def params(weights):
    return weights(SPECS, SIZES)


def random(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


@jax.jit
def run(params, x, masks=None, **options):
    return mamba2(params, x, masks or {}, norm_eps=EPS, **options)


def silu(x):
    return x / (1 + np.exp(-x))


def plain(params, x):
    """One document [t, d] by the recurrence; returns its update and final state."""
    w, x = {n: np.asarray(v) for n, v in params.items()}, np.asarray(x)
    project = lambda name: np.tensordot(x, w[name], 1)

    def conv(name):
        inputs, kernel = project(name), w[f"conv_{name}"]
        y = np.zeros(inputs.shape) + w[f"conv_{name}_bias"]
        for t in range(len(x)):
            for back in range(min(t, 3) + 1):
                y[t] += kernel[-1 - back] * inputs[t - back]
        return silu(y)

    u, B, C = conv("x"), conv("B"), conv("C")
    dt = np.log1p(np.exp(project("dt") + w["dt_bias"]))
    state = np.zeros((*u.shape[1:], B.shape[-1]))
    ys = []
    for t in range(len(x)):
        decay = np.exp(-dt[t] * np.exp(w["A_log"]))[..., None, None]
        write = (dt[t][..., None] * u[t])[..., None] * B[t][:, None, None]
        state = decay * state + write
        ys.append(np.einsum("grpn,gn->grp", state, C[t]) + w["D"][..., None] * u[t])
    y = np.stack(ys) * silu(project("z"))
    y = y / np.sqrt(np.mean(y**2, axis=(2, 3), keepdims=True) + EPS)
    return np.einsum("tgrp,grpd->td", y * w["gate_norm"], w["out"]), state


def empty(rows, sizes=SIZES):
    shape = lambda spec: [{"batch": rows, **sizes}[dim] for dim in spec.dims]
    return {name: jnp.zeros(shape(spec)) for name, spec in CACHE.items()}


def resize(array, spec, sizes=SIZES):
    """Prefixes along the small dimensions, or zeros behind them."""
    for i, dim in enumerate(spec.dims):
        if dim in SMALL:
            array = np.moveaxis(np.asarray(array), i, 0)[: sizes[dim]]
            more = [(0, sizes[dim] - len(array))] + [(0, 0)] * (array.ndim - 1)
            array = np.moveaxis(np.pad(array, more), 0, i)
    return jnp.asarray(array)


def resized(tree, specs, sizes):
    return {name: resize(tree[name], spec, sizes) for name, spec in specs.items()}


def hard_masks():
    return {a: (jnp.arange(SIZES[a]) < n).astype(float) for a, n in SMALL.items()}


def test_it_is_the_recurrence(params):
    x = random(2, 40, 6)  # The scan goes by chunks of 32.
    y, cache = run(params, x)
    np.testing.assert_allclose(y, [plain(params, row)[0] for row in x], **TIGHT)
    assert cache is None


def test_no_token_sees_a_later_one(params):
    x, at = random(1, 40, 6), 34

    @jax.jit
    @jax.grad
    def gradient(x):
        return jnp.sum(jnp.sin(mamba2(params, x, {}, norm_eps=EPS)[0][:, at]))

    seen = gradient(x)[0].any(axis=-1)
    assert seen[: at + 1].all() and not seen[at + 1 :].any()


def test_documents_are_read_apart(params):
    """Convolution and state: some documents are shorter than the kernel."""
    lengths = (2, 1, 3, 25, 9)
    ids = np.repeat([7, 3, 9, -1, 0], lengths)[None]
    x = random(1, 40, 6)
    y, _ = run(params, x, segment_ids=jnp.asarray(ids))
    documents = np.split(x[0], np.cumsum(lengths)[:-1])
    want = np.concatenate([plain(params, document)[0] for document in documents])
    np.testing.assert_allclose(y[0], want, **TIGHT)


def test_groups_do_not_mix_before_the_output(params):
    """Each has its own B, C and gate statistic: one alone is unmoved by the other."""
    x, alone = random(1, 5, 6), params | {"out": params["out"].at[1].set(0)}
    other = random(*params["x"][:, 1].shape, seed=2)
    moved = alone | {name: alone[name].at[:, 1].set(other) for name in ("x", "z")}
    y, cache = run(alone, x, cache=empty(1))
    z, changed = run(moved, x, cache=empty(1))
    np.testing.assert_array_equal(y, z)
    assert (cache["state"][:, 1] != changed["state"][:, 1]).all()


@pytest.mark.parametrize("padding", [0.0, 1e6])
def test_a_cache_holds_valid_tokens_and_no_others(params, padding):
    """Ragged chunks equal one document per row, and so does the state they leave."""
    text, cache, at = random(3, 8, 6), empty(3), np.zeros(3, int)
    want = [plain(params, row)[0] for row in text]
    for lengths in ([4, 1, 0], [2, 4, 1], [0, 3, 4]):
        x = np.full((3, 4, 6), padding)
        for row, n in enumerate(lengths):
            x[row, :n] = text[row, at[row] : at[row] + n]
        y, held = run(params, x, cache=cache, lengths=jnp.array(lengths))
        for row, n in enumerate(lengths):
            now = slice(at[row], at[row] + n)
            np.testing.assert_allclose(y[row, :n], want[row][now], **TIGHT)
            if n == 0:
                for name in CACHE:
                    np.testing.assert_array_equal(held[name][row], cache[name][row])
        at, cache = at + lengths, held

    for row, n in enumerate(at):
        _, state = plain(params, text[row, :n])
        np.testing.assert_allclose(cache["state"][row], state, **TIGHT)
        for name in ("x", "B", "C"):
            inputs = np.tensordot(text[row, :n], params[name], 1)[-4:]
            tail = cache[f"conv_{name}"][row]
            np.testing.assert_allclose(tail[4 - len(inputs) :], inputs, **TIGHT)
            assert not tail[: 4 - len(inputs)].any()


def test_single_steps_equal_one_chunk(params):
    x, cache = random(2, 6, 6), empty(2)
    whole, last = run(params, x, cache=cache)
    for t in range(6):
        y, cache = run(params, x[:, t : t + 1], cache=cache)
        np.testing.assert_allclose(y[:, 0], whole[:, t], **TIGHT)
    for name in CACHE:
        np.testing.assert_allclose(cache[name], last[name], **TIGHT)


def test_masked_units_leave_nothing_in_the_cache(params):
    """Not even through a convolution's bias: the cache is the submodel's, extended."""
    biases = ("conv_x_bias", "conv_B_bias", "conv_C_bias")
    params = params | {name: 5 + params[name] for name in biases}
    sizes, x = SIZES | SMALL, random(2, 6, 6)
    y, cache = run(params, x, hard_masks(), cache=empty(2))
    small = resized(params, SPECS, sizes)
    want, small_cache = run(small, x, cache=empty(2, sizes))
    np.testing.assert_allclose(y, want, **TIGHT)
    for name, extended in resized(small_cache, CACHE, SIZES).items():
        np.testing.assert_allclose(cache[name], extended, **TIGHT)
        dead = extended == 0
        assert dead.any() and not cache[name][dead].any()


@pytest.mark.parametrize("grows", [True, False])
def test_masks_that_change_move_the_cache_between_models(params, grows):
    """One pass equals: run one model, resize its cache, continue with the other."""
    x, switch = random(2, 9, 6), (3, 6)
    full = {axis: jnp.ones(SIZES[axis]) for axis in SMALL}
    before, after = (hard_masks(), full) if grows else (full, hard_masks())
    early = jnp.arange(9)[:, None] < jnp.array(switch)[:, None, None]
    varying = {a: jnp.where(early, before[a], after[a]) for a in SMALL}
    y, _ = run(params, x, varying)

    sizes = [SIZES | SMALL, SIZES] if grows else [SIZES, SIZES | SMALL]
    first, second = (resized(params, SPECS, s) for s in sizes)
    head, cache = run(first, x, cache=empty(2, sizes[0]), lengths=jnp.array(switch))
    cache = resized(cache, CACHE, sizes[1])
    rest = jnp.stack([jnp.roll(row, -n, 0) for row, n in zip(x, switch, strict=True)])
    tail, _ = run(second, rest, cache=cache)
    for row, n in enumerate(switch):
        np.testing.assert_allclose(y[row, :n], head[row, :n], **TIGHT)
        np.testing.assert_allclose(y[row, n:], tail[row, : 9 - n], **TIGHT)


def test_a_constant_mask_may_be_spelled_out_in_time(params):
    x, soft = random(2, 9, 6), np.random.default_rng(4)
    masks = {a: jnp.asarray(soft.random(SIZES[a])).at[-1].set(0) for a in SMALL}
    spelled = {a: jnp.broadcast_to(m, (2, 9, len(m))) for a, m in masks.items()}
    np.testing.assert_allclose(run(params, x, spelled)[0], run(params, x, masks)[0])


def test_the_state_is_float32_for_narrow_activations(params):
    narrow = {n: w.astype(jnp.bfloat16) for n, w in params.items()}
    cache = {n: a.astype(jnp.bfloat16) for n, a in empty(1).items()}
    cache["state"] = cache["state"].astype(jnp.float32)
    assert CACHE["state"] == CacheSpec(CACHE["state"].arrow, dtype="float32")
    x = random(1, 5, 6).astype(jnp.bfloat16)
    y, after = jax.eval_shape(functools.partial(run, cache=cache), narrow, x)
    assert y.dtype == jnp.bfloat16
    assert {n: a.dtype for n, a in after.items()} == {
        n: a.dtype for n, a in cache.items()
    }
