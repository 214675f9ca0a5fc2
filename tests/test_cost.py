"""Costs against published sizes, a formula by hand, and the bytes of real arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax.cost import KINDS, Budget, parse_budget
from elastic_jax.latency_grid import ENDS, Grid, axes_of
from elastic_jax.latency_table import FIXED, LatencyTable

TINY = ej.presets.tiny(pattern="M-E*ME")
SPECS, CACHE = ej.param_specs(TINY), ej.cache_specs(TINY)
COUNTS = {"embed": 48, "experts": (3, 5), "heads_per_group": 2, "expert_ffn": 32}
NANO = ej.presets.nemotron3_nano()


def by_hand(cfg):
    """(total, active) from the layer equations, without names of dimensions."""
    d, groups, heads = cfg.embed, cfg.ssm_groups, cfg.ssm_groups * cfg.heads_per_group
    inner, states = heads * cfg.ssm_head_dim, groups * cfg.ssm_state
    conv = (cfg.conv_width + 1) * (inner + 2 * states)
    mamba = d * (2 * inner + 2 * states + heads) + conv + 3 * heads + inner + inner * d
    queries = cfg.kv_heads * cfg.q_per_kv
    attention = d * cfg.head_dim * 2 * (queries + cfg.kv_heads)
    dense = 2 * d * cfg.ffn
    always = 2 * d * cfg.shared_ffn + (d + 1) * cfg.experts
    expert = 2 * d * cfg.expert_ffn
    each = {"M": mamba, "*": attention, "-": dense, "E": always}
    fixed = 2 * cfg.vocab * d + d + sum(d + each[kind] for kind in cfg.pattern)
    routed = cfg.pattern.count("E") * expert
    return fixed + routed * cfg.experts, fixed + routed * cfg.top_k


@pytest.mark.parametrize(
    ("kept", "total", "active"),
    [
        ({}, 31_577_940_288, 3_580_076_352),
        ({"embed": 2016}, 23_683_657_248, 2_685_259_296),
        ({"embed": 1920, "expert_ffn": 960}, 12_426_658_368, 2_082_619_968),
    ],
)
def test_nemotron3_nano(kept, total, active):
    counts = ej.counts(NANO, **kept)
    cost = ej.cost(ej.param_specs(NANO), NANO, counts=counts)
    assert (cost.total_params, cost.active_params) == (total, active)
    assert type(cost.total_params) is type(cost.active_params) is int
    assert cost.weight_bytes() == 2 * total
    assert cost.weight_bytes("nvfp4") == -(-total * 9 // 16)
    small = ej.slice_config(NANO, counts)
    assert by_hand(small) == (total, active)

    masks = ej.masks_from_counts(NANO, counts)
    soft = ej.cost(ej.param_specs(NANO), NANO, masks=masks)
    np.testing.assert_allclose(float(soft.total_params), total, rtol=1e-6)
    np.testing.assert_allclose(float(soft.active_params), active, rtol=1e-6)


def test_nemotron_nano_v2():
    cfg = ej.presets.nemotron_nano_v2()
    cost = ej.cost(ej.param_specs(cfg), cfg)
    assert cost.total_params == cost.active_params == by_hand(cfg)[0]
    assert round(cost.total_params / 1e9, 3) == 12.310


@pytest.mark.parametrize("pattern", ["M", "*", "E", "-", "EM*-E"])
def test_every_block_agrees_with_the_formula(pattern):
    cfg = dataclasses.replace(ej.presets.tiny(pattern), conv_width=3, ssm_groups=3)
    cost = ej.cost(ej.param_specs(cfg), cfg)
    assert (cost.total_params, cost.active_params) == by_hand(cfg)


def test_cache_bytes_of_nemotron3_nano():
    cost, specs = ej.cost(ej.param_specs(NANO), NANO), ej.cache_specs(NANO)

    def size(batch=1, length=1, precision="bf16"):
        return cost.cache_bytes(specs, batch=batch, length=length, precision=precision)

    assert size(length=1001) - size() == 1000 * 6144  # bytes of keys and values
    assert size(precision="fp8", length=2) - size(precision="fp8") == 3072
    states = 23 * 64 * 64 * 128 * 4
    tails = 23 * 4 * (64 * 64 + 2 * 8 * 128) * 2
    assert size() == 6144 + states + tails + 4
    assert size(batch=3) == 3 * size()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_bytes_are_those_of_the_arrays(dtype):
    counts = ej.counts(TINY, **COUNTS, layers=(1, 1, 1, 1, 0, 1))
    small, real = ej.slice_config(TINY, counts), {"bf16": "bfloat16", "fp32": "float32"}
    params = jax.eval_shape(
        lambda: ej.init_params(jax.random.key(0), small, dtype=real[dtype])
    )
    cache = jax.eval_shape(lambda: ej.init_cache(small, 3, 7, dtype=real[dtype]))
    held = [
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in (params, cache)
    ]
    cost = ej.cost(SPECS, TINY, counts=counts)
    assert cost.weight_bytes(dtype) == held[0]
    assert cost.cache_bytes(CACHE, batch=3, length=7, precision=dtype) == held[1]


def test_a_submodel_costs_the_same_from_either_side():
    layers = (0, 1, 1, 1, 1, 1)
    middle = ej.counts(TINY, **COUNTS, layers=layers)
    smaller = ej.counts(TINY, **COUNTS | {"experts": 3}, layers=layers)
    cfg = ej.slice_config(TINY, middle)
    again = ej.counts(cfg, experts=3)
    for outside, inside in ((middle, None), (smaller, again)):
        a = ej.cost(SPECS, TINY, counts=outside)
        b = ej.cost(ej.param_specs(cfg), cfg, counts=inside)
        assert (a.total_params, a.active_params) == (b.total_params, b.active_params)


def test_masks_cost_what_they_keep():
    counts = ej.counts(TINY, **COUNTS, layers=(1, 0, 1, 1, 0, 1), ssm_head_dim=16)
    hard, soft = (
        ej.cost(SPECS, TINY, counts=counts),
        ej.cost(SPECS, TINY, masks=ej.masks_from_counts(TINY, counts)),
    )
    for measure in (
        lambda c: c.total_params,
        lambda c: c.active_params,
        lambda c: c.weight_bytes("fp8"),
        lambda c: c.cache_bytes(CACHE, batch=2, length=9),
    ):
        assert measure(soft).dtype == jnp.float32
        np.testing.assert_allclose(float(measure(soft)), measure(hard), rtol=1e-6)
    full = ej.cost(SPECS, TINY, masks={"embed": None}).total_params
    assert full.dtype == jnp.float32
    assert full == ej.cost(SPECS, TINY).total_params


def soft_total(masks):
    return ej.cost(SPECS, TINY, masks=masks).total_params


def test_the_gradient_of_a_mask_is_the_price_of_its_unit():
    """Cost is linear in one mask: its gradient is what one more unit costs."""
    ones = {"embed": jnp.ones(96), "expert_ffn": (jnp.ones(64), jnp.ones(64))}
    grads = jax.jit(jax.grad(soft_total))(ones)
    full = ej.cost(SPECS, TINY).total_params

    def price(**kept):
        small = ej.cost(SPECS, TINY, counts=ej.counts(TINY, **kept))
        return (full - small.total_params) / 16

    np.testing.assert_allclose(grads["embed"], price(embed=80), rtol=1e-6)
    for block, kept in enumerate([(48, 64), (64, 48)]):
        np.testing.assert_allclose(
            grads["expert_ffn"][block], price(expert_ffn=kept), rtol=1e-6
        )


def test_depth_masks_are_differentiable():
    grads = jax.grad(soft_total)({"layers": jnp.ones(TINY.layers)})["layers"]
    for i in range(TINY.layers):
        kept = tuple(int(i != j) for j in range(TINY.layers))
        without = ej.cost(SPECS, TINY, counts=ej.counts(TINY, layers=kept))
        block = ej.cost(SPECS, TINY).total_params - without.total_params
        np.testing.assert_allclose(float(grads[i]), block, rtol=1e-6)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"embed": jnp.ones((2, 5, 96))}, "embed: .*constant in time"),
        ({"ffn": (jnp.ones((2, 5, 128)),)}, "ffn: .*constant in time"),
        ({"layers": jnp.ones((2, 5, 6))}, r"layers: .*expected \(6,\)"),
        ({"embed": jnp.ones(64)}, r"embed: .*\(64,\), expected \(96,\)"),
        ({"experts": (jnp.ones(8),)}, "experts: 1 entries for 2 blocks"),
        ({"embd": jnp.ones(96)}, "did you mean 'embed'"),
    ],
)
def test_masks_that_have_no_cost_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        ej.cost(SPECS, TINY, masks=masks)


def test_foreign_counts_and_ambiguity_are_refused():
    with pytest.raises(ValueError, match="embed: 1920 of 96"):
        ej.cost(SPECS, TINY, counts=ej.counts(NANO, embed=1920))
    with pytest.raises(ValueError, match="counts or masks, not both"):
        ej.cost(SPECS, TINY, counts=ej.counts(TINY), masks={})
    with pytest.raises(ValueError, match="precision 'fp4'; did you mean 'nvfp4'"):
        ej.cost(SPECS, TINY).weight_bytes("fp4")
    for bad in ({"batch": 0, "length": 1}, {"batch": 1, "length": 1.5}):
        with pytest.raises(ValueError, match="expected an int of at least 1"):
            ej.cost(SPECS, TINY).cache_bytes(CACHE, **bad)


@pytest.mark.parametrize(
    ("text", "target", "relative", "kind"),
    [
        (0.78, 0.78, True, "active_params"),
        ("0.78", 0.78, True, "active_params"),
        (1, 1.0, True, "active_params"),
        ("2.8B", 2.8e9, False, "active_params"),
        (" 2.8 B ", 2.8e9, False, "active_params"),
        ("12.4e9", 12.4e9, False, "active_params"),
        (160_000, 160_000, False, "active_params"),
        ("350M", 350e6, False, "active_params"),
        ("24GiB", 24 * 2**30, False, "memory_bytes"),
        ("24GB", 24e9, False, "memory_bytes"),
    ],
)
def test_budgets_are_read(text, target, relative, kind):
    budget = parse_budget(text, length=128)
    assert (budget.relative, budget.kind) == (relative, kind)
    assert budget.target == pytest.approx(target, rel=1e-15)
    assert hash(budget) == hash(parse_budget(text, length=128))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("many", {}, "cannot read the budget 'many'"),
        ("2.8Q", {}, "cannot read the budget '2.8Q'"),
        ("1.2.3", {}, "cannot read"),
        ("-0.5", {}, "cannot read"),
        ("nan", {}, "cannot read"),
        ("", {}, "cannot read"),
        (True, {}, "cannot read"),
        (1.5, {}, "no fraction and no whole number"),
        ("0", {}, "positive and finite"),
        ("1e999B", {}, "positive and finite"),
        ("24GiB", {"kind": "total_params"}, "in bytes, but its kind is 'total_params'"),
        ("2.8B", {"kind": "weight_bytes"}, "in parameters"),
        (0.5, {"kind": "total_param"}, "did you mean 'total_params'"),
        (0.5, {"kind": "weight_bytes", "precision": "int8"}, "unknown precision"),
        ("24GiB", {}, "needs length="),
        ("24GiB", {"length": 8, "batch": 0}, "batch: expected an int"),
    ],
)
def test_unreadable_budgets_are_refused(text, options, message):
    with pytest.raises(ValueError, match=message):
        parse_budget(text, **options)


def seconds_of_width():
    """A latency table in which every block takes as long as it is wide."""

    def grid(kind):
        widths = (("embed", (48, 96)),)
        widths += tuple((a, (1, getattr(TINY, a))) for a in axes_of(kind)[1:])
        one = 2 ** (len(widths) - 1)
        return Grid(kind, widths, (("decode", (48.0,) * one + (96.0,) * one),))

    fixed = tuple((name, getattr(TINY, name)) for name in FIXED)
    grids = tuple(map(grid, (*"M-E*", ENDS)))
    about = "a thought", "today", "0", "float32", 1, 1, 1, (("decode", 1.0),)
    return LatencyTable(*about, fixed, grids)


@pytest.mark.parametrize("kind", KINDS)
def test_ratio_is_one_on_target(kind):
    counts = ej.counts(TINY, **COUNTS)
    given = {"kind": kind, "precision": "fp8", "batch": 2, "length": 64}
    if kind == "latency_seconds":
        given["latency"] = seconds_of_width()
    size = Budget(0.5, **given).measure(ej.cost(SPECS, TINY, counts=counts), CACHE)
    full = Budget(0.5, **given).measure(ej.cost(SPECS, TINY), CACHE)
    assert size < full
    for budget in (
        Budget(size, relative=False, **given),
        Budget(size / full, **given),
    ):
        model = (SPECS, CACHE, TINY)
        masks = ej.masks_from_counts(TINY, counts)
        assert budget.ratio(*model, counts=counts) == pytest.approx(1, rel=1e-12)
        assert budget.ratio(*model) == pytest.approx(full / size, rel=1e-12)
        assert float(budget.ratio(*model, masks=masks)) == pytest.approx(1, rel=1e-6)


def test_memory_is_weights_and_cache():
    cost = ej.cost(SPECS, TINY)
    budget = parse_budget("24MiB", batch=4, length=512)
    cache = cost.cache_bytes(CACHE, batch=4, length=512)
    assert budget.measure(cost, CACHE) == cost.weight_bytes() + cache


def test_a_budget_of_billions_is_differentiable():
    """Beyond the int32 range, where a careless integer would overflow."""
    specs, cache = ej.param_specs(NANO), ej.cache_specs(NANO)
    budget = Budget(12_426_658_368, kind="total_params", relative=False)
    grad = jax.jit(
        jax.grad(lambda m: budget.ratio(specs, cache, NANO, masks={"embed": m}))
    )(jnp.ones(NANO.embed))
    price = (31_577_940_288 - 23_683_657_248) / (2688 - 2016) / 12_426_658_368
    np.testing.assert_allclose(grad, price, rtol=1e-5)
