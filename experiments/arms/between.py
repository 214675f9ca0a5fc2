"""Sizes between the trained ones: what the router answers to a blend of budgets."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

import elastic_jax as ej
from elastic_jax.axes import AXES
from elastic_jax.budgets import relative_targets
from elastic_jax.router import blend, probabilities
from experiments.arms.start import Start

GRID = 200  # blends to ask for


def arms(start: Start, seed: int) -> tuple[str, ...]:
    return ("between",)


def rows(start: Start, seed: int, missing) -> Iterator[tuple[str, dict[str, Any]]]:
    """Trained sizes, and at least `sizes` others, with their answers."""
    params, _ = start.train("nested", seed, counts=start.counts)
    trained = start.each(params, start.counts)
    answered, filled = sizes_between(start, start.asked["sizes"])
    others = {_named(c): c for c in (*answered, *filled)}
    found = start.each(params, others)
    for counts in answered:
        found[_named(counts)]["from_router"] = True
    yield "between", {"budgets": trained, "between": found}


def sizes_between(start: Start, least: int) -> tuple[list[ej.Counts], list[ej.Counts]]:
    """Different counts between two neighbours: the router's, and what fills up.

    On every axis they are between their neighbours' and, as a whole, dearer than the
    smallest trained size and cheaper than the largest.

    A blend's count on an axis is the mean of those on offer, by their probability
    and rounded to the axis's step: with the sharp choices that training ends with,
    nearly all blends would be one of the trained sizes. Its two neighbours bound it.

    Returns:
      answers to blends, evenly spread over costs, and, where those are fewer than
      `least`, other counts between neighbours, evenly spread too.
    """
    cfg, specs = start.plan.cfg, start.specs
    router, learned, trained = start.router
    targets = relative_targets(start.plan.budgets, specs, cfg)
    known, found = {tuple(sorted(c.items())) for c in trained.values()}, {}
    ratios = np.linspace(targets[-1], targets[0], GRID)
    blends = np.stack([blend(targets, ratio) for ratio in ratios])
    shares = probabilities(router.apply(learned, blends), 1.0, 1.0)
    shares = {axis: np.asarray(each) for axis, each in shares.items()}
    for i, ratio in enumerate(ratios):
        upper = max(j for j, target in enumerate(targets) if target >= ratio)
        lower = min(upper + 1, len(targets) - 1)
        ends = [list(trained.values())[j] for j in (lower, upper)]
        kept = {}
        for axis, options in router.elastic.choices:
            step = AXES[axis].step
            mean = round(float(np.dot(shares[axis][i], options)) / step) * step
            kept[axis] = int(np.clip(mean, *sorted(end[axis] for end in ends)))
        if tuple(sorted(kept.items())) not in known:
            found[tuple(sorted(kept.items()))] = ej.counts(cfg, **kept)
    cost = lambda c: ej.cost(specs, cfg, counts=c).active_params
    least_cost, *_, most_cost = sorted(map(cost, trained.values()))
    inside = lambda c: least_cost < cost(c) < most_cost
    answered = sorted(filter(inside, found.values()), key=cost)
    boxes = _boxes(cfg, list(trained.values()), known | set(found))
    others = sorted(filter(inside, boxes.values()), key=cost)
    if len(answered) + len(others) < least:
        raise ValueError(
            f"claim.sizes: {least} sizes between the budgets were asked for, there are "
            f"{len(answered) + len(others)}; give `elastic` more room between them"
        )
    answered = _spread(answered, least)
    return answered, _spread(others, least - len(answered))


def _spread(ordered: list[ej.Counts], most: int) -> list[ej.Counts]:
    """At most so many, the first and the last among them."""
    most = min(most, len(ordered))
    return [
        ordered[i] for i in np.linspace(0, len(ordered) - 1, most).round().astype(int)
    ]


def _boxes(cfg, trained, known) -> dict[tuple, ej.Counts]:
    """All counts that lie, on every axis, between two neighbours."""
    found = {}
    for large, small in itertools.pairwise(trained):
        ranges = {}
        for axis, step in ((axis, AXES[axis].step) for axis in large):
            low, high = sorted((small[axis], large[axis]))
            ranges[axis] = range(low, high + 1, step)
        for sizes in itertools.product(*ranges.values()):
            kept = dict(zip(ranges, sizes, strict=True))
            if tuple(sorted(kept.items())) not in known:
                found[tuple(sorted(kept.items()))] = ej.counts(cfg, **kept)
    return found


def _named(counts: ej.Counts) -> str:
    return " ".join(f"{axis}={n}" for axis, n in counts.items())
