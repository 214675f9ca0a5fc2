"""Latency is measured in every phase and width, and a router meets it as a target."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import latency, train
from elastic_jax.budgets import feasible, relative_targets
from elastic_jax.elastic import Elastic, settled_counts
from elastic_jax.latency_grid import ENDS, PHASES, Grid, axes_of
from elastic_jax.latency_table import FIXED, LatencyTable
from elastic_jax.nesting import resolved
from elastic_jax.router import (
    budget_input,
    budget_loss,
    make_router,
    probabilities,
    soft_masks,
)

CFG = dataclasses.replace(ej.presets.tiny("ME*-"), vocab=32)
LOAD = {"batch": 2, "prompt": 3, "context": 5}


def thought_of(cfg, elastic) -> LatencyTable:
    """A table of a device on which a block takes a while, and its work takes time."""
    offered = dict(elastic.choices)

    def grid(kind):
        widths = tuple(
            (a, tuple(sorted(offered.get(a, (getattr(cfg, a),)))))
            for a in axes_of(kind)
        )
        points = itertools.product(*(n for _, n in widths))
        took = tuple(1e-4 + 1e-8 * math.prod(at) ** 0.8 for at in points)
        return Grid(kind, widths, tuple((phase, took) for phase in PHASES))

    fixed = tuple((name, getattr(cfg, name)) for name in FIXED)
    grids = tuple(map(grid, (*dict.fromkeys(cfg.pattern), ENDS)))
    scale = tuple((phase, 1.0) for phase in PHASES)
    about = "a thought", "today", "0", "float32", 1, 8, 16, scale
    return LatencyTable(*about, fixed, grids)


def test_a_table_and_whole_models_are_measured(monkeypatch):
    """In the smallest steps: that they are numbers, not which."""
    monkeypatch.setattr(latency, "COPIES", (1, 1))
    monkeypatch.setattr(latency, "LOOP_SECONDS", 1e-4)
    monkeypatch.setattr(latency, "LOOP_PASSES", 1)
    cfg, compiled = dataclasses.replace(CFG, pattern="M-"), []
    params = jax.jit(ej.init_params, static_argnums=1)(jax.random.key(0), cfg)
    elastic = ej.ElasticConfig((("ffn", (128, 32)),))
    once = {**LOAD, "phases": ("decode",), "repeats": 1}
    seen = lambda *progress: compiled.append(progress)
    table = ej.measure_latency(params, cfg, elastic, **once, on_compiled=seen)
    # M, two of -, two of the ends, and the parent.
    assert compiled == [(i + 1, 6) for i in range(6)]
    assert (table.device, table.jax) == (latency.device_name(), jax.__version__)
    assert (table.batch, table.prompt, table.context) == tuple(LOAD.values())
    assert (table.phases, table.dtype) == (("decode",), "float32")
    assert [phase for phase, _ in table.scale] == ["decode"]
    table.check(cfg, elastic)  # and a Grid holds positive finite numbers only
    assert [grid.kind for grid in table.grids] == ["M", "-", ENDS]
    assert dict(table.grid["-"].widths) == {"embed": (96,), "ffn": (32, 128)}

    whole = ej.measure_models({"whole": (params, cfg)}, **once)
    assert math.isfinite(whole["whole"]["decode"]) and [*whole] == ["whole"]


def test_a_pass_is_what_generation_does():
    """A prefill into an empty cache; a token that fills it. The slice is cut inside."""
    cfg = dataclasses.replace(CFG, pattern="*-")
    params = ej.init_params(jax.random.key(0), cfg)
    counts = ej.counts(cfg, embed=48, q_per_kv=1)
    small = ej.slice_config(cfg, counts)
    sizes = jax.tree.map(jnp.shape, ej.init_cache(small, 2, 5))
    for phase, time, filled in (("prefill", 3, 3), ("decode", 1, 5)):
        loop = latency._loop(params, cfg, counts, phase, latency.Load(**LOAD))
        tokens, cache = loop(2)
        assert tokens.shape == (2, time)
        assert cache["filled"].tolist() == [filled] * 2
        assert jax.tree.map(jnp.shape, cache) == sizes
        assert all(leaf.any() for leaf in jax.tree.leaves(cache))  # it was written


def test_copies_have_the_weights_of_the_parent_and_arrays_of_their_own():
    cfg = dataclasses.replace(CFG, pattern="M*M")
    shapes = jax.eval_shape(lambda: ej.init_params(jax.random.key(0), cfg))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(draw.random(s.shape, "f")), shapes)
    held, part = latency._part(params, cfg, "M")
    assert part.pattern == "M" * latency._copies(cfg, "M") and part.vocab == 32
    pointers = {block["z"].unsafe_buffer_pointer() for block in held["layers"]}
    assert len(pointers) == len(part.pattern)
    for block, source in zip(held["layers"], (0, 2) * 4, strict=False):
        np.testing.assert_array_equal(block["z"], params["layers"][source]["z"])
    least, most = latency.COPIES
    for cfg in (ej.presets.nemotron3_nano(), ej.presets.tiny("M")):
        assert all(least <= latency._copies(cfg, k) <= most for k in {*cfg.pattern})


def test_many_widths_are_thinned_and_keep_their_ends():
    elastic = ej.ElasticConfig(
        (
            ("embed", (96, 80, 64, 48)),
            ("expert_ffn", (64, 48, 32, 16)),
            ("shared_ffn", (64, 48, 32, 16)),
        )
    )
    for kind in (*CFG.pattern, ENDS):
        widths = dict(latency._widths(CFG, elastic, kind))
        assert math.prod(map(len, widths.values())) <= latency.LARGEST_GRID
        for axis, found in widths.items():
            offered = dict(elastic.choices).get(axis, (getattr(CFG, axis),))
            assert list(found) == sorted(found) and {*found} <= {*offered}
            assert {found[0], found[-1]} == {offered[0], offered[-1]}
    assert dict(latency._widths(CFG, elastic, ENDS))["embed"] == (48, 64, 80, 96)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"batch": 0}, "batch: expected an int of at least 1, got 0"),
        ({"repeats": 1.5}, "repeats: expected an int of at least 1"),
        ({"context": 2}, "context 2 is shorter than prompt 3"),
        ({"phases": ("decod",)}, "phase 'decod'; did you mean 'decode'"),
        ({"phases": ()}, "phases: expected some of"),
        ({"phases": ("decode", "decode")}, "phases: expected some of"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        ej.measure_latency({}, CFG, **LOAD | change)
    with pytest.raises(ValueError, match=said):
        ej.measure_models({"a": ({}, CFG)}, **LOAD | change)
    uneven = dataclasses.replace(CFG, pattern="MM", heads_per_group=(4, 2))
    with pytest.raises(ValueError, match="blocks differ in .'heads_per_group'"):
        ej.measure_latency({}, uneven, **LOAD)
    with pytest.raises(ValueError, match="the first choice must be the full 96"):
        ej.measure_latency({}, CFG, ej.ElasticConfig((("embed", (48,)),)), **LOAD)


FINE = ej.ElasticConfig(
    (
        ("embed", (96, 80, 64, 48)),
        ("heads_per_group", (4, 3, 2, 1)),
        ("ffn", (128, 32)),
    ),
    per_layer=("heads_per_group",),
)


def test_a_router_meets_a_latency():
    """Of a table that nobody measured, given in milliseconds."""
    cfg = dataclasses.replace(CFG, pattern="MM-")
    specs, table = ej.param_specs(cfg), thought_of(cfg, FINE)
    how = {"phase": "answer", "new_tokens": 20}
    full = ej.Budget(1.0, "latency_seconds", latency=table, **how)
    seconds = full.absolute(specs, None, cfg)
    small = ej.parse_budget(f"{600 * seconds}ms", latency=table, **how)
    budgets = (("full", full), ("small", small))
    assert relative_targets(budgets, specs, cfg) == pytest.approx((1, 0.6))
    offered, lines = feasible(FINE, specs, cfg, budgets)
    assert any("combinations in its zone" in line for line in lines)

    router = make_router(cfg, offered, 2, hidden=32)
    elastic = Elastic(cfg=cfg, teacher=None, router=router, budgets=budgets)
    learned = router.init(jax.random.key(0), budget_input(0, 2))
    counts = settled_counts(elastic, train.fit_router(elastic, learned))
    for name, share in (("full", 1.0), ("small", 0.6)):
        took = ej.cost(specs, cfg, counts=counts[name]).latency_seconds(table, **how)
        assert took / seconds == pytest.approx(share, rel=0.05), name
    assert resolved(cfg, counts["full"]) == resolved(cfg)


def test_the_loss_of_a_latency_reaches_every_choice():
    cfg, n = dataclasses.replace(CFG, pattern="MM-"), 2
    table = thought_of(cfg, FINE)
    budgets = tuple(
        (name, ej.Budget(target, "latency_seconds", latency=table))
        for name, target in (("full", 1.0), ("small", 0.5))
    )
    router = make_router(cfg, FINE, n, hidden=8)

    @jax.jit
    @jax.grad
    def gradient(params, scale):
        budget = budget_input(1, n)
        pi = probabilities(router.apply(params, budget), scale, 1.0)
        masks = soft_masks(pi, FINE, cfg)
        given = {"specs": ej.param_specs(cfg), "cfg": cfg}
        return budget_loss(pi, masks, budget, budgets=budgets, **given)

    params = router.init(jax.random.key(0), budget_input(0, n))
    slopes = gradient(params, 1.0)["params"]
    for axis, _ in FINE.choices:
        slope = slopes[f"{axis}_out"]["kernel"]
        assert jnp.isfinite(slope).all() and slope.any(), axis


def test_a_device_has_a_name():
    name = latency.device_name()
    assert name and name != "cpu" and name == latency.device_name()
