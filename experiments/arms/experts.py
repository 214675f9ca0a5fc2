"""Orders of experts, of parents with and without load balancing."""

from collections.abc import Iterator
from typing import Any

import jax

import elastic_jax as ej
from elastic_jax.scores import EXPERT_METRICS
from experiments import evaluation, ranking
from experiments.arms.balance import loads
from experiments.arms.start import Start

ORDERS = (*EXPERT_METRICS, "reversed", "random")
PARENTS = ("unbalanced", "balanced")


def arms(start: Start, seed: int) -> tuple[str, ...]:
    """Those of a seed: orders that are not drawn are trained with the first few."""
    orders = ORDERS if seed < start.asked["repeats"] else ("random",)
    return tuple(f"{parent}: {order}" for parent in PARENTS for order in orders)


def rows(start: Start, seed: int, missing) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arm -> KL from the parent and answers, untrained and trained."""
    kept = ej.counts(start.plan.cfg, experts=start.asked["kept"])
    counts = {"full": ej.counts(start.plan.cfg), "small": kept}
    for parent in PARENTS:
        this = start.balanced() if parent == "balanced" else start
        for order in ORDERS:
            arm = f"{parent}: {order}"
            if arm not in missing:
                continue
            moved = this.ordered(ranks(this, order, seed))
            params, _ = this.train(
                f"{parent}-{order}", seed, counts=counts, teacher=moved
            )
            yield (
                arm,
                {
                    "untrained": _found(this, moved, moved, kept),
                    "trained": _found(this, params, moved, kept),
                    "largest_load": largest_load(this),
                },
            )


def ranks(start: Start, order: str, seed: int) -> dict[str, Any]:
    """An order of the experts alone; `reversed` is REAP's, worst first."""
    if order == "random":
        return ranking.random_ranks(start.scores, seed, "experts")
    metric = "reap" if order == "reversed" else order
    scores = start.scores.with_experts(metric)["experts"]
    sign = -1 if order == "reversed" else 1
    return ej.rank({"experts": jax.tree.map(lambda s: sign * s, scores)})


def largest_load(start: Start) -> float:
    """The largest share of a block's choices that falls on one expert."""
    (batch, *_) = ranking.read_batches(start.plan)
    found = loads(start.params, batch["tokens"], batch["segment_ids"], start.plan.cfg)
    return max(float(share.max()) for share in found.values())


def _found(start, params, parent, counts):
    small, cfg = evaluation.sliced(start.plan, params, counts)
    return evaluation.evaluate(start.plan, small, cfg, parent)
