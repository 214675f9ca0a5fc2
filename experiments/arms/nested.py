"""One nested run, and separate runs for every size, of equal tokens or steps."""

from collections.abc import Iterator
from typing import Any

import elastic_jax as ej
from experiments.arms.start import Start, reweighted


def arms(start: Start, seed: int) -> tuple[str, ...]:
    return "parent", "untrained", "nested", "separate, a third", "separate, all"


def rows(start: Start, seed: int, missing) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arm -> budgets, and what training took."""
    counts, stages = start.counts, start.plan.stages
    if "parent" in missing:
        yield "parent", {"budgets": {"full": start.judged(start.params, None)}}
    if "untrained" in missing:
        yield "untrained", {"budgets": start.each(start.nested, counts), "work": 0}
    if "nested" in missing:
        params, _ = start.train("nested", seed, counts=counts)
        whole = [(1 / len(counts), name) for name in counts]
        yield "nested", _found(start, params, whole)
    for arm, share in (("separate, a third", 1 / len(counts)), ("separate, all", 1.0)):
        if arm not in missing:
            continue
        budgets, work = {}, 0
        for i, name in enumerate(counts):
            alone = [float(j == i) for j in range(len(counts))]
            shorter = reweighted(stages, alone, share)
            label = f"{arm.replace(', ', '-').replace(' ', '-')}-{name}"
            params, _ = start.train(label, seed, counts=counts, stages=shorter)
            budgets[name] = start.judged(params, counts[name])
            work += training_work(start, shorter, [(1.0, name)])
        yield arm, {"budgets": budgets, "work": work}


def _found(start, params, shares):
    work = training_work(start, start.plan.stages, shares)
    return {"budgets": start.each(params, start.counts), "work": work}


def training_work(start: Start, stages, shares) -> float:
    """Active parameters times tokens that pass them: forward 1, backward 2.

    The teacher's forward pass counts too.

    Args:
      shares: (share of the micro-batches, budget).
    """
    cost = {
        name: ej.cost(start.specs, start.plan.cfg, counts=kept).active_params
        for name, kept in start.counts.items()
    }
    tokens = sum(s.total_steps * s.batch * s.context for s in stages)
    passed = sum(share * (cost["full"] + 3 * cost[name]) for share, name in shares)
    return tokens * passed
