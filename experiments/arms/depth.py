"""Fewer blocks against narrower ones, at equal total or equal active parameters."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

import elastic_jax as ej
from experiments.arms.start import Start

MEASURES = {"equal_total": "total_params", "equal_active": "active_params"}


def arms(start: Start, seed: int) -> tuple[str, ...]:
    asked = start.asked
    widths = (f"width, {order.replace('_', ' ')}" for order in asked["orders"])
    kinds = ("depth", *widths)
    return tuple(f"{parent}: {kind}" for parent in asked["patterns"] for kind in kinds)


def rows(start: Start, seed: int, missing) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arm -> the full parent and the one submodel, each with its answers."""
    for parent, pattern in start.asked["patterns"].items():
        prefix = f"{parent}: "
        if not any(arm.startswith(prefix) for arm in missing):
            continue
        this = start.of_pattern(pattern)
        ranks = ej.rank({"layers": np.asarray(this.depth)})
        kept = len(pattern) - start.asked["dropped"][parent]
        fewer = ej.counts(this.plan.cfg, layers=ej.keep_layers(ranks, kept))
        counts = {"depth": fewer} | {
            f"width, {order.replace('_', ' ')}": narrowed(this, fewer, MEASURES[order])
            for order in start.asked["orders"]
        }
        for kind, small in counts.items():
            if prefix + kind in missing:
                folder = f"{parent}-{kind}".replace(", ", "-").replace(" ", "-")
                both = {"full": ej.counts(this.plan.cfg), "small": small}
                params, _ = this.train(folder, seed, counts=both)
                found = {"small": this.judged(params, small) | {"counts": dict(small)}}
                yield prefix + kind, {"budgets": found}


def narrowed(start: Start, fewer: ej.Counts, measure: str) -> ej.Counts:
    """The counts on offer, all blocks kept, whose parameters are nearest to `fewer`'s.

    Of several as near, those that shrink all axes most alike.
    """
    cfg, specs, choices = start.plan.cfg, start.specs, start.plan.elastic.choices
    wanted = getattr(ej.cost(specs, cfg, counts=fewer), measure)

    def off(sizes):
        counts = ej.counts(cfg, **sizes)
        spent = getattr(ej.cost(specs, cfg, counts=counts), measure)
        shares = [n / getattr(cfg, axis) for axis, n in sizes.items()]
        return round(abs(spent / wanted - 1), 2), max(shares) - min(shares)

    grid = itertools.product(*(options for _, options in choices))
    names = [axis for axis, _ in choices]
    each = (dict(zip(names, sizes, strict=True)) for sizes in grid)
    return ej.counts(cfg, **min(each, key=off))
