"""The laws of the house, parametrised over the axis table.

A new row of `AXES` is tested the moment it exists. Everything numerical runs in
float64 where the bound is tight, on random patterns, sizes and per-layer counts.
`LAW_EXAMPLES=20 pytest tests/test_laws.py` tries more of them.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import elastic_jax as ej
from elastic_jax import axes
from elastic_jax.axes import AXES, blocks_with

ORDINARY = settings(
    max_examples=int(os.environ.get("LAW_EXAMPLES", "1")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
WIDTHS = [axis for axis in AXES if axis != "layers"]


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@st.composite
def configs(draw, axis: str | None = None):
    """A small model, with at least one block that has `axis`."""
    kinds = draw(st.lists(st.sampled_from("M*E-"), min_size=1, max_size=2))
    if axis is not None and AXES[axis].blocks:
        kinds.append(AXES[axis].blocks)
    pattern = "".join(draw(st.permutations(kinds)))
    n_group = draw(st.sampled_from([1, 2]))
    return ej.ModelConfig(
        pattern=pattern,
        vocab=draw(st.sampled_from([7, 16])),
        embed=draw(st.sampled_from([32, 48])),
        ssm_groups=draw(st.sampled_from([1, 2])),
        heads_per_group=draw(st.sampled_from([2, 3])),
        ssm_head_dim=32,
        ssm_state=32,
        conv_width=draw(st.sampled_from([2, 4])),
        kv_heads=draw(st.sampled_from([1, 2])),
        q_per_kv=draw(st.sampled_from([2, 3])),
        head_dim=8,
        experts=draw(st.sampled_from([4, 6])),
        expert_ffn=32,
        shared_ffn=48,
        ffn=48,
        top_k=2,
        n_group=n_group,
        topk_group=n_group,
        routed_scaling_factor=2.5,
    )


def allowed(cfg, axis):
    """Every count below the full size."""
    floor = cfg.top_k if axis == "experts" else 1
    step, full = AXES[axis].step, getattr(cfg, axis)
    return [n for n in range(step, full, step) if n >= floor]


@st.composite
def some_counts(draw, cfg, which):
    """Counts on the axes `which` that `cfg` has, different in every layer."""
    chosen = {}
    for axis in which:
        if axis == "layers":
            keep = draw(
                st.lists(
                    st.sampled_from([0, 1]), min_size=cfg.layers, max_size=cfg.layers
                ).filter(any)
            )
            chosen[axis] = tuple(keep)
        elif not AXES[axis].blocks:
            chosen[axis] = draw(st.sampled_from(allowed(cfg, axis)))
        elif blocks := blocks_with(cfg.pattern, axis):
            option = st.sampled_from(allowed(cfg, axis))
            chosen[axis] = tuple(draw(option) for _ in blocks)
    return ej.counts(cfg, **chosen)


@st.composite
def cases(draw, axis):
    """(cfg, counts): on one axis alone, or on all when `axis` is "all"."""
    single = None if axis == "all" else axis
    cfg = draw(configs(single))
    return cfg, draw(some_counts(cfg, AXES if single is None else [axis]))


def parent(cfg, dtype=np.float64):
    """Random parameters; norms, biases and D away from their plain starts."""
    shapes = jax.eval_shape(lambda: ej.init_params(jax.random.key(0), cfg))
    rng = np.random.default_rng(1)

    def draw(path, spec, like):
        noise = rng.normal(size=like.shape)
        fan = np.prod(like.shape[len(spec.batch) :][: len(spec.contracted)])
        if spec.contracted:
            return noise / np.sqrt(fan)
        return (spec.init in ("ones", "A_log")) + 0.2 * noise

    drawn = axes.map_specs(draw, ej.param_specs(cfg), shapes)
    return jax.tree.map(lambda w: jnp.asarray(w, dtype), drawn)


def tokens(cfg, rows=2, time=9):
    return jnp.asarray(np.random.default_rng(3).integers(0, cfg.vocab, (rows, time)))


@functools.partial(jax.jit, static_argnums=2)
def forward(params, text, cfg, masks=None):
    return ej.apply(params, text, cfg, masks=masks)


@pytest.mark.parametrize("axis", WIDTHS)
def test_permuting_changes_nothing(axis):
    @ORDINARY
    @given(configs(axis))
    def law(cfg):
        specs, params = ej.param_specs(cfg), parent(cfg)
        ranks = ej.rank(random_scores(cfg, [axis]))
        permuted = ej.permute_params(params, specs, ranks)
        assert any(
            not np.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (params, permuted)), strict=True)
        )
        want, got = (forward(p, tokens(cfg), cfg) for p in (params, permuted))
        np.testing.assert_allclose(got, want, **TIGHT)

    law()


def random_scores(cfg, which, seed=5):
    """Scores of the right shapes, drawn at random."""
    rng = np.random.default_rng(seed)
    scores = {}
    for axis in which:
        owners = tuple(getattr(cfg, o) for o in AXES[axis].owners)
        draw = lambda o=owners, a=axis: rng.random((*o, getattr(cfg, a)))
        blocks = blocks_with(cfg.pattern, axis)
        if not AXES[axis].blocks:
            scores[axis] = draw()
        elif blocks:
            scores[axis] = tuple(draw() for _ in blocks)
    return scores


@pytest.mark.parametrize("axis", [*AXES, "all"])
def test_masked_equals_sliced(axis):
    """Logits and gradients; the masked gradient is the slice's, zero-padded."""

    @ORDINARY
    @given(cases(axis))
    def law(case):
        cfg, counts = case
        specs, params, text = ej.param_specs(cfg), parent(cfg), tokens(cfg)
        masks = ej.masks_from_counts(cfg, counts)
        small_cfg = ej.slice_config(cfg, counts)

        def masked(p):
            logits = ej.apply(p, text, cfg, masks=masks)
            return jnp.sum(jnp.sin(logits)), logits

        def sliced(p):
            small = ej.slice_params(p, specs, counts)
            logits = ej.apply(small, text, small_cfg)
            return jnp.sum(jnp.sin(logits)), logits

        grad = lambda f: jax.jit(jax.grad(f, has_aux=True))(params)
        (got_grad, got), (want_grad, want) = grad(masked), grad(sliced)
        np.testing.assert_allclose(got, want, **TIGHT)
        scale = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(want_grad))
        for g, w in zip(*map(jax.tree.leaves, (got_grad, want_grad)), strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-12 * scale)

    law()


@pytest.mark.parametrize("axis", ["all"])
def test_masked_equals_sliced_in_float32(axis):
    @ORDINARY
    @given(cases(axis))
    def law(case):
        cfg, counts = case
        params = parent(cfg, jnp.float32)
        small = ej.slice_params(params, ej.param_specs(cfg), counts)
        masks = ej.masks_from_counts(cfg, counts)
        want = forward(small, tokens(cfg), ej.slice_config(cfg, counts))
        got = forward(params, tokens(cfg), cfg, masks)
        scale = float(jnp.max(jnp.abs(want)))
        np.testing.assert_allclose(got, want, atol=1e-5 * scale)

    law()


@pytest.mark.parametrize("axis", [*AXES, "all"])
def test_cached_decoding_equals_full_forward(axis):
    """Ragged rows, chunks, then single steps: masked, sliced and parent agree."""

    @ORDINARY
    @given(cases(axis))
    def law(case):
        cfg, counts = case
        params, text = parent(cfg), tokens(cfg, time=8)
        small = ej.slice_params(params, ej.param_specs(cfg), counts)
        small_cfg = ej.slice_config(cfg, counts)
        masks = ej.masks_from_counts(cfg, counts)
        models = [(params, cfg, masks), (small, small_cfg, None)]
        models += [(params, cfg, None)] if axis == "all" else []
        for p, c, m in models:
            want = forward(p, text, c, m)
            got = decode_ragged(p, c, m, text, chunks=(3, 3, 1, 1))
            np.testing.assert_allclose(got, want, **TIGHT)

    law()


def decode_ragged(params, cfg, masks, text, chunks):
    """Feeds row 1 one token less in the first chunk, one more padding token."""
    step = jax.jit(
        lambda p, x, cache, lengths: ej.extend(
            p, x, cache, cfg, lengths=lengths, masks=masks
        )
    )
    rows, time = text.shape
    cache = ej.init_cache(cfg, rows, time, dtype=jnp.float64)
    logits = np.zeros((rows, time, cfg.vocab))
    at = np.zeros(rows, int)
    for n, size in enumerate([*chunks, 1]):
        lengths = np.full(rows, size)
        lengths[1] -= n == 0
        lengths = np.minimum(lengths, time - at)
        window = [
            np.resize(text[r, at[r] : at[r] + size], size)
            if lengths[r]
            else np.zeros(size, int)
            for r in range(rows)
        ]
        y, cache = step(params, jnp.asarray(np.stack(window)), cache, lengths)
        for r in range(rows):
            logits[r, at[r] : at[r] + lengths[r]] = y[r, : lengths[r]]
        at += lengths
    assert list(cache["filled"]) == [time] * rows
    return logits


@pytest.mark.parametrize("axis", [*AXES, "all"])
def test_cost_equals_counted(axis):
    @ORDINARY
    @given(cases(axis))
    def law(case):
        cfg, counts = case
        specs = ej.param_specs(cfg)
        shapes = jax.eval_shape(lambda: ej.init_params(jax.random.key(0), cfg))
        small = jax.eval_shape(lambda p: ej.slice_params(p, specs, counts), shapes)
        counted = sum(leaf.size for leaf in jax.tree.leaves(small))
        priced = ej.cost(specs, cfg, counts=counts)
        assert isinstance(priced.total_params, int)
        assert priced.total_params == counted
        small_cfg = ej.slice_config(cfg, counts)
        rebuilt = jax.eval_shape(lambda: ej.init_params(jax.random.key(0), small_cfg))
        assert jax.tree.map(jnp.shape, rebuilt) == jax.tree.map(jnp.shape, small)
        masked = ej.cost(specs, cfg, masks=ej.masks_from_counts(cfg, counts))
        for name in ("total_params", "active_params"):
            want = getattr(priced, name)
            np.testing.assert_allclose(float(getattr(masked, name)), want, rtol=1e-6)

    law()


@pytest.mark.parametrize("axis", WIDTHS)
def test_submodels_nest(axis):
    """A submodel of a submodel is the submodel cut at once, and is its prefix."""

    @ORDINARY
    @given(st.data())
    def law(data):
        cfg = data.draw(configs(axis))
        params, specs = parent(cfg), ej.param_specs(cfg)
        smallest = allowed(cfg, axis)[0]
        middle = data.draw(st.sampled_from(allowed(cfg, axis)))
        inner, outer = (ej.counts(cfg, **{axis: n}) for n in (smallest, middle))
        outer_cfg = ej.slice_config(cfg, outer)
        large, small = (ej.slice_params(params, specs, c) for c in (outer, inner))
        again = ej.slice_params(
            large, ej.param_specs(outer_cfg), ej.counts(outer_cfg, **{axis: smallest})
        )
        for a, b, c in zip(*map(jax.tree.leaves, (small, again, large)), strict=True):
            assert np.array_equal(a, b)
            assert np.array_equal(a, c[tuple(slice(n) for n in a.shape)])

    law()


@pytest.mark.parametrize("block_scale", ["max", "four_over_six"])
@pytest.mark.parametrize("axis", [*AXES, "all"])
def test_quantizing_and_slicing_commute(axis, block_scale):
    """Bit for bit, under the parent's scales; submodels of submodels too."""
    rules = (
        ("attention/[qkv]", "nvfp4"),
        ("attention/o", "fp8"),  # heads of 8 hold no block
        ("mamba*/[zxBC]", "fp8"),
        ("mamba*/dt", "fp8"),
        ("mamba*/out", "nvfp4"),
        ("moe/router", "nvfp4"),
        ("model/lm_head", "nvfp4"),
    )

    @ORDINARY
    @given(cases(axis), st.sampled_from(["fp8", "nvfp4"]))
    def law(case, format):
        cfg, counts = case
        recipe = ej.Recipe(format, rules, block_scale)
        specs, params = ej.param_specs(cfg), parent(cfg, np.float32)
        quantized = ej.quantize(params, specs, cfg, recipe)
        got = ej.slice_params(quantized, specs, counts)
        small_cfg = ej.slice_config(cfg, counts)
        small = ej.slice_params(params, specs, counts)
        small_specs = ej.param_specs(small_cfg)
        want = ej.quantize(small, small_specs, small_cfg, recipe, like=got)
        assert_same_bits(got, want)
        dequantized = ej.slice_params(ej.dequantize(quantized), specs, counts)
        assert_same_bits(ej.dequantize(got), dequantized)
        again = ej.slice_params(got, small_specs, ej.counts(small_cfg))
        assert_same_bits(again, got)

    law()


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_slicing_compiles_once_for_equal_counts():
    cfg = ej.presets.tiny()
    params, specs = parent(cfg, jnp.float32), ej.param_specs(cfg)
    slice_fn = jax.jit(ej.slice_params, static_argnums=(1, 2))
    slice_fn(params, specs, ej.counts(cfg, embed=32))
    compiled = slice_fn._cache_size()  # shared by all jits of one function
    slice_fn(params, ej.param_specs(cfg), ej.counts(cfg, embed=32))
    assert slice_fn._cache_size() == compiled
    slice_fn(params, specs, ej.counts(cfg, embed=48))
    assert slice_fn._cache_size() == compiled + 1


def test_every_elastic_dimension_is_in_the_table():
    cfg = ej.presets.tiny(pattern="ME*-")
    named = {dim for _, spec in ej.param_specs(cfg) for dim in spec.dims}
    fixed = {"vocab", "kv_heads", "head_dim", "ssm_groups", "conv_width"}
    assert named == (set(AXES) - {"layers"}) | fixed
    assert axes.layers_with(ej.param_specs(cfg), "experts") == (1,)
