"""Impossible budgets are refused before any work, missed ones after it."""

import dataclasses
import itertools

import numpy as np
import pytest

from elastic_jax import budgets as module
from elastic_jax import nesting, presets
from elastic_jax.budget import Budget
from elastic_jax.budgets import accept, feasible, not_nested, relative_targets
from elastic_jax.config import ElasticConfig
from elastic_jax.model import cache_specs, param_specs

CFG = presets.tiny()
SPECS = param_specs(CFG)
ELASTIC = ElasticConfig(
    (
        ("embed", (96, 80, 64, 48)),
        ("heads_per_group", (4, 3, 2)),
        ("expert_ffn", (64, 48, 32)),
        ("experts", (8, 6, 4)),
    )
)


def budgets(*targets, kind="active_params", **options):
    names = ("full", "mid", "small")[: len(targets)]
    pairs = zip(names, targets, strict=True)
    return tuple((name, Budget(t, kind, **options)) for name, t in pairs)


def test_the_search_costs_every_combination_exactly():
    depth = np.arange(CFG.layers)
    elastic = ElasticConfig((*ELASTIC.choices, ("layers", (6, 4))))
    rows = module._combinations(elastic)
    assert len(rows) == 4 * 3 * 3 * 3 * 2 and not rows[0].any()
    for kind in ("active_params", "total_params", "weight_bytes", "memory_bytes"):
        budget = Budget(1.0, kind, precision="fp8", length=512)
        given = (SPECS, CFG, budget, cache_specs(CFG), depth)
        shares = module._relative_costs(elastic, rows, *given)
        for i in range(0, len(rows), 17):
            kept = {a: n[c] for (a, n), c in zip(elastic.choices, rows[i], strict=True)}
            kept["layers"] = nesting.keep_layers(depth, kept["layers"])
            counts = nesting.counts(CFG, **kept)
            exact = budget.ratio(SPECS, cache_specs(CFG), CFG, counts=counts)
            np.testing.assert_allclose(shares[i], exact, rtol=1e-6)


def test_an_impossible_budget_is_refused_with_the_three_nearest():
    elastic = ElasticConfig((("embed", (96, 48)), ("expert_ffn", (64, 32))))
    with pytest.raises(ValueError, match="impossible budgets") as caught:
        feasible(elastic, SPECS, CFG, budgets(1.0, 0.7, 0.1))
    mid, small = str(caught.value).splitlines()[1:3]
    assert "mid: none of 4 combinations" in mid and "0.7 of the full" in mid
    for line in (mid, small):
        assert line.count("embed=") == 3 and line.count(" of target") == 3
    # The full model is the first budget's, so it is nobody else's nearest.
    assert "embed=96 expert_ffn=64" not in mid
    assert small.index("embed=48 expert_ffn=32") < small.index("embed=48 expert_ffn=64")


def test_an_axis_that_moves_nothing_stays_full_and_the_log_says_so():
    reduced, lines = feasible(ELASTIC, SPECS, CFG, budgets(1.0, 0.78, 0.58))
    assert dict(reduced.choices).keys() == dict(ELASTIC.choices).keys() - {"experts"}
    assert any(line.startswith("experts stays full") for line in lines)
    assert any("mid: " in line and "of 36 combinations" in line for line in lines)

    total = budgets(1.0, 0.78, 0.58, kind="total_params")
    assert feasible(ELASTIC, SPECS, CFG, total)[0] == ELASTIC


def test_an_axis_that_moves_only_some_budgets_is_kept():
    """At a twelfth of the size, what was nothing is something."""
    elastic = ElasticConfig((*ELASTIC.choices, ("shared_ffn", (64, 48))))
    alone = ElasticConfig((("shared_ffn", (64, 48)),))
    last = np.array([[1]])
    budget = Budget(1.0)
    moved = 1 - module._relative_costs(alone, last, SPECS, CFG, budget, None, None)[0]
    between = moved / 0.05  # the target at which the axis moves exactly a zone
    assert 0.3 < between < 0.9
    wide, narrow = (budgets(1.0, t) for t in (between * 1.02, between * 0.98))
    dropped, lines = feasible(elastic, SPECS, CFG, wide)
    assert "shared_ffn" not in dict(dropped.choices)
    kept, lines = feasible(elastic, SPECS, CFG, narrow)
    assert "shared_ffn" in dict(kept.choices)
    kept, lines = feasible(elastic, SPECS, CFG, (*wide, ("small", narrow[1][1])))
    assert "shared_ffn" in dict(kept.choices)
    assert any("shared_ffn is offered, though" in line for line in lines)


def test_per_layer_axes_that_stay_full_are_no_longer_per_layer():
    elastic = ElasticConfig(ELASTIC.choices, per_layer=("experts", "heads_per_group"))
    reduced, _ = feasible(elastic, SPECS, CFG, budgets(1.0, 0.7))
    assert reduced.per_layer == ("heads_per_group",)


def test_a_search_too_large_is_thinned_and_keeps_its_ends(monkeypatch):
    monkeypatch.setattr(module, "LARGEST_SEARCH", 24)
    rows = module._combinations(ELASTIC)
    assert len(rows) <= 24
    for column, (_, options) in zip(rows.T, ELASTIC.choices, strict=True):
        assert {0, len(options) - 1} <= set(column.tolist())
    feasible(ELASTIC, SPECS, CFG, budgets(1.0, 0.6, kind="total_params"))


def test_millions_of_combinations_are_searched_in_seconds():
    wide = {axis: 1024 for axis in ("embed", "ffn", "expert_ffn", "shared_ffn")}
    cfg = dataclasses.replace(presets.tiny("MEM*-E"), **wide)
    many = ElasticConfig(tuple((a, tuple(range(1024, 0, -16))) for a in wide))
    reduced, lines = feasible(many, param_specs(cfg), cfg, budgets(1.0, 0.3))
    assert reduced == many
    searched = int(lines[0].split(" of ")[1].split()[0])
    assert module.LARGEST_SEARCH / 16 < searched <= module.LARGEST_SEARCH


def chosen(**kept):
    return nesting.counts(CFG, **kept)


def in_zone(target):
    """The combinations inside the zone of a target, as counts."""
    rows = module._combinations(ELASTIC)
    given = (SPECS, CFG, Budget(1.0), None, None)
    near = np.abs(module._relative_costs(ELASTIC, rows, *given) / target - 1) <= 0.05
    return [
        chosen(**{a: n[i] for (a, n), i in zip(ELASTIC.choices, row, strict=True)})
        for row in rows[near]
    ]


def test_budgets_in_their_zones_are_accepted():
    three = budgets(1.0, 0.78, 0.58)
    for mid, small in itertools.product(in_zone(0.78)[::4], in_zone(0.58)[::4]):
        counts = {"full": chosen(), "mid": mid, "small": small}
        accept(counts, three, SPECS, CFG, ELASTIC)
        nested = nesting.nested(CFG, small, mid)
        said = not_nested(counts, CFG)
        assert said == ([] if nested else ["small is not nested in mid"])


def test_missed_equal_and_not_full_budgets_come_together():
    three = budgets(1.0, 0.6, 0.58)
    both = next(counts for counts in in_zone(0.58) if counts in in_zone(0.6))
    with pytest.raises(ValueError, match="missed its budgets") as caught:
        counts = {"full": chosen(embed=80), "mid": both, "small": both}
        accept(counts, three, SPECS, CFG, ELASTIC)
    text = str(caught.value)
    assert "full is not the full model" in text and "small equals mid" in text

    missed = {"full": chosen(), "mid": chosen(embed=80), "small": both}
    with pytest.raises(ValueError, match="mid costs") as caught:
        accept(missed, three, SPECS, CFG, ELASTIC)
    line = str(caught.value).splitlines()[1]
    assert line.count("embed=") == 4  # its own, and three that would do
    for advice in line.split("zone: ")[1].split("; "):
        kept = {a: int(n) for a, n in (item.split("=") for item in advice.split())}
        assert chosen(**kept) in in_zone(0.6)


def test_budgets_must_be_one_ordered_set():
    for wrong, said in (
        (budgets(0.9, 0.5), "first must be the full model"),
        (budgets(1.0, 0.5, 0.7), "must descend"),
        (budgets(1.0, 0.5)[:1] * 2, "share a name"),
        (budgets(1.0) + (("b", Budget(0.5, "total_params")),), "must share kind"),
        (budgets(1.0, 0.5, kind="memory_bytes", length=8), "need cache_specs"),
        ((), "first must be the full model"),
    ):
        with pytest.raises(ValueError, match=said):
            relative_targets(wrong, SPECS, CFG)
