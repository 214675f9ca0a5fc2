"""A learned router, pairs of shapes picked by hand, and a random order of the units."""

from collections.abc import Iterator
from typing import Any

import elastic_jax as ej
from elastic_jax import fit
from experiments import ranking
from experiments.arms.start import Start

MISSED = "the router missed its budgets"  # a result, and how its error begins


def arms(start: Start, seed: int) -> tuple[str, ...]:
    return ("learned", *start.asked["pairs"], "random order")


def rows(start: Start, seed: int, missing) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arm -> budgets; of the learned one also how its choices went.

    A router that missed its budgets has its choices alone, and a random order nothing.
    """
    cfg, pairs = start.plan.cfg, start.asked["pairs"]
    # Also where it is not missing: the random order takes its counts.
    learned, counts, missed = None, dict.fromkeys(n for n, _ in start.plan.budgets), ""
    try:
        learned, counts = start.train("learned", seed)
    except ValueError as error:
        if not str(error).startswith(MISSED):
            raise
        missed = str(error)
    if "learned" in missing:
        found = {"missed": missed} if missed else {}
        found |= {} if missed else {"budgets": start.each(learned, counts)}
        yield "learned", found | {"choices": choices(start, f"learned-{seed}")}
    if "random order" in missing and missed:
        yield "random order", {"missed": missed}
    for arm, pair in pairs.items():
        if arm in missing:
            chosen = {
                name: dict(zip(start.asked["axes"], pair[name], strict=True))
                for name in pair
            }
            kept = {name: ej.counts(cfg, **chosen.get(name, {})) for name in counts}
            params, _ = start.train(arm, seed, counts=kept)
            yield arm, {"budgets": start.each(params, kept)}
    if "random order" in missing and not missed:
        ranks = ranking.random_ranks(start.scores, seed)
        shuffled = start.ordered(ranks)
        params, _ = start.train("random-order", seed, counts=counts, teacher=shuffled)
        yield "random order", {"budgets": start.each(params, counts)}


def choices(start: Start, name: str) -> dict[str, Any]:
    """What every logged step of the router's stage had chosen, and its cost."""
    first, budgets = start.plan.stages[0], [n for n, _ in start.plan.budgets]
    logged = fit.MetricLog(start.workdir.path / name / "metrics").rows()
    steps = []
    for row in logged:
        if (
            row.get("stage") != first.name
            or f"{budgets[-1]}/cost_over_target" not in row
        ):
            continue
        kept = {
            budget: {
                key.split("/")[1]: n
                for key, n in row.items()
                if key.startswith(f"{budget}/") and key.endswith("/count")
            }
            for budget in budgets
        }
        ratio = {budget: row[f"{budget}/cost_over_target"] for budget in budgets}
        steps.append({"step": row["step"], "counts": kept, "cost_over_target": ratio})
    targets = [budget.target for _, budget in start.plan.budgets]
    return {
        "total_steps": first.total_steps,
        "deadline": start.asked["deadline"],
        "targets": dict(zip(budgets, targets, strict=True)),
        "steps": steps,
    }
