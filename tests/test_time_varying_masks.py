"""Masks that change along time: one pass moves a sequence from model to model.

What a token wrote under one mask is read under another. The meaning is fixed by the
slices: run the one, resize its cache (zeros behind what a smaller model never had),
continue with the other.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import axes

CFG = ej.ModelConfig(
    pattern="M*E-",
    vocab=13,
    embed=32,
    ssm_groups=2,
    heads_per_group=3,
    ssm_head_dim=32,
    ssm_state=32,
    kv_heads=2,
    q_per_kv=3,
    head_dim=4,
    experts=4,
    expert_ffn=32,
    shared_ffn=32,
    ffn=32,
    top_k=2,
    routed_scaling_factor=2.5,
)
SMALL = {
    "embed": 16,
    "heads_per_group": 1,
    "ssm_head_dim": 16,
    "ssm_state": 16,
    "q_per_kv": 1,
    "experts": 3,
    "expert_ffn": 16,
    "shared_ffn": 16,
    "ffn": 16,
}
TIME = 9
TEXT = np.random.default_rng(3).integers(0, CFG.vocab, (2, TIME))
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@functools.cache
def model(name):
    """(params, cfg) of "large" or of its slice "small"."""
    specs, rng = ej.param_specs(CFG), np.random.default_rng(1)

    def draw(path, spec):
        noise = rng.standard_normal(axes.shape(CFG, specs, path, spec))
        if spec.contracted:
            return noise / np.sqrt(np.prod([getattr(CFG, d) for d in spec.contracted]))
        return (spec.init == "ones") + 0.3 * noise

    params, counts = axes.map_specs(draw, specs), ej.counts(CFG, **SMALL)
    if name == "large":
        return params, CFG
    return ej.slice_params(params, specs, counts), ej.slice_config(CFG, counts)


def masks_of(name):
    kept = SMALL if name == "small" else {axis: getattr(CFG, axis) for axis in SMALL}
    return {a: (jnp.arange(getattr(CFG, a)) < n).astype(float) for a, n in kept.items()}


def varying(names, ends):
    """The masks of each model until the position where its phase ends, per row."""
    masks, later = masks_of(names[-1]), list(zip(names, ends, strict=True))[:-1]
    masks = {a: jnp.broadcast_to(m, (2, TIME, m.size)) for a, m in masks.items()}
    for name, end in reversed(later):
        early = (jnp.arange(TIME) < jnp.array(end)[:, None])[..., None]
        masks = {a: jnp.where(early, m, masks[a]) for a, m in masks_of(name).items()}
    return masks


@functools.partial(jax.jit, static_argnums=2)
def forward(params, text, cfg, masks):
    return ej.apply(params, text, cfg, masks=masks)


@functools.partial(jax.jit, static_argnums=3)
def extend(params, text, cache, cfg, lengths, masks=None):
    return ej.extend(params, text, cache, cfg, lengths=lengths, masks=masks)


def empty(cfg):
    return ej.init_cache(cfg, 2, TIME, dtype=jnp.float64)


def resize(cache, cfg):
    """A cache for `cfg`: prefixes, or zeros behind what there is."""

    def fit(array, like):
        cut = array[tuple(map(slice, like.shape))]
        more = [(0, n - m) for n, m in zip(like.shape, cut.shape, strict=True)]
        return jnp.pad(cut, more)

    return jax.tree.map(fit, cache, empty(cfg))


def relay(names, ends):
    """Logits of the models taking turns, and the cache of the last one."""
    logits, start, cache = np.zeros((2, TIME, CFG.vocab)), np.zeros(2, int), None
    for name, end in zip(names, ends, strict=True):
        params, cfg = model(name)
        cache = empty(cfg) if cache is None else resize(cache, cfg)
        ahead = np.stack([np.roll(t, -n) for t, n in zip(TEXT, start, strict=True)])
        y, cache = extend(params, ahead, cache, cfg, np.array(end) - start)
        for row in range(2):
            logits[row, start[row] : end[row]] = y[row, : end[row] - start[row]]
        start = np.array(end)
    return logits, cache


@pytest.mark.parametrize(
    ("names", "ends"),
    [
        (("small", "large"), ((3, 6), (9, 9))),
        (("large", "small"), ((1, 7), (9, 9))),
        (("small", "large", "small"), ((2, 5), (4, 8), (9, 9))),
    ],
    ids=["grows", "shrinks", "there_and_back"],
)
def test_one_pass_equals_models_taking_turns(names, ends):
    want, _ = relay(names, ends)
    params, _ = model("large")
    got = forward(params, TEXT, CFG, varying(names, ends))
    np.testing.assert_allclose(got, want, **TIGHT)
    constant = forward(params, TEXT, CFG, varying(names[-1:], ends[-1:]))
    for row, end in enumerate(ends[0]):  # What came before is not forgotten.
        assert np.abs(constant - got)[row, end:].max() > 1e-3


def test_a_cache_written_under_masks_is_the_extended_one_of_the_slice():
    """Masks that change inside a call, or from call to call, leave the same cache."""
    names, ends = ("small", "large"), ((3, 6), (9, 9))
    params, (switch, _) = model("large")[0], np.array(ends)
    want, cache = relay(names, ends)

    inside = extend(params, TEXT, empty(CFG), CFG, np.full(2, 9), varying(names, ends))
    ahead = np.stack([np.roll(t, -n) for t, n in zip(TEXT, switch, strict=True)])
    _, before = extend(params, TEXT, empty(CFG), CFG, switch, masks_of("small"))
    y, between = extend(params, ahead, before, CFG, 9 - switch, masks_of("large"))
    np.testing.assert_allclose(inside[0], want, **TIGHT)
    for row, n in enumerate(switch):
        np.testing.assert_allclose(y[row, : 9 - n], want[row, n:], **TIGHT)
    for held in (inside[1], between):
        for a, b in zip(*map(jax.tree.leaves, (held, cache)), strict=True):
            np.testing.assert_allclose(a, b, **TIGHT)

    params, cfg = model("small")
    _, small = extend(params, TEXT, empty(cfg), cfg, switch)
    for a, b in zip(*map(jax.tree.leaves, (before, resize(small, CFG))), strict=True):
        np.testing.assert_allclose(a, b, **TIGHT)


@pytest.mark.parametrize("soft", [False, True])
def test_a_constant_mask_may_be_spelled_out_in_time(soft):
    masks = masks_of("small")
    if soft:
        rng = np.random.default_rng(4)
        masks = {a: jnp.asarray(rng.random(m.size)).at[-2:].multiply(m[-2:])
                 for a, m in masks.items()}
    spelled = {a: jnp.broadcast_to(m, (2, TIME, m.size)) for a, m in masks.items()}
    params = model("large")[0]
    got, want = (forward(params, TEXT, CFG, m) for m in (spelled, masks))
    np.testing.assert_allclose(got, want, **TIGHT)
    assert np.abs(want - forward(params, TEXT, CFG, masks_of("large"))).max() > 1e-2


def test_depth_may_vary_along_time():
    """A block whose mask is zero at a token leaves the residual there as it was."""
    params, ones = model("large")[0], jnp.ones((2, TIME, 4))
    # The last two blocks look at one token only: nothing else changes.
    some, none = ones.at[0, 4:, 2:].set(0), ones.at[:, :, 2:].set(0)
    got, whole, without = (
        forward(params, TEXT, CFG, {"layers": keep}) for keep in (some, ones, none)
    )
    np.testing.assert_allclose(got[0, 4:], without[0, 4:], **TIGHT)
    np.testing.assert_allclose(got[0, :4], whole[0, :4], **TIGHT)
    np.testing.assert_allclose(got[1], whole[1], **TIGHT)
