"""Which units matter: scores of the parent, and what an order is worth untrained."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import elastic_jax as ej
from elastic_jax.axes import AXES, blocks_with
from elastic_jax.importance import calibrate, depth_importance
from elastic_jax.packing import read
from experiments.evaluation import calibration_batches, kl, sliced
from experiments.settings import Plan
from experiments.workdir import Workdir, bar, console


def read_batches(plan: Plan) -> list[dict[str, Any]]:
    """The calibration batches as a pass over them takes them."""
    rows = plan.values["calibration"]["rows"]
    return [read(batch) for batch in calibration_batches(plan, rows)]


def scores(plan: Plan, workdir: Workdir, params: Any):
    """Importance of every width axis, and of whole blocks."""
    batches = read_batches(plan)
    with bar("scores", len(batches)) as advance:
        seen = iter(range(1, len(batches) + 1))
        found = calibrate(
            params,
            batches,
            plan.cfg,
            path=workdir.path / "scores.npz",
            provenance={"data": plan.task.data["calibration"].digest()},
            on_batch=lambda _: advance(next(seen)),
        )
    depth = depth_importance(params, batches[:1], plan.cfg)
    for block, experts in never_routed(plan.cfg, found).items():
        console.print(f"block {block}: experts {experts} were never routed to")
    return found, np.asarray(depth)


def never_routed(cfg: ej.ModelConfig, found) -> dict[str, list[int]]:
    """MoE block -> its experts that no calibration token reached, where there are."""
    blocks = map(str, blocks_with(cfg.pattern, "experts"))
    each = zip(blocks, found.never_routed, strict=True)
    return {block: [int(e) for e in idle] for block, idle in each if len(idle)}


def orders(plan: Plan, params: Any, found, depth) -> list[dict[str, Any]]:
    """KL of untrained slices on one axis at a time, in our order and in random ones."""
    cfg, specs = plan.cfg, ej.param_specs(plan.cfg)
    batches = calibration_batches(plan, plan.values["orders"]["rows"])
    draws = plan.values["orders"]["random"]

    def measure(ranks, counts) -> float:
        moved = ej.permute_params(params, specs, ranks)
        return kl(plan, params, *sliced(plan, moved, counts), batches)

    asked = plan.values["orders"]["axes"] or AXES
    cases = [(axis, "", found) for axis in found if axis in asked and axis != "experts"]
    if "experts" in found and "experts" in asked:
        metrics = ("reap", "mass", "frequency")
        cases += [("experts", m, found.with_experts(m)) for m in metrics]
    rows = []
    with bar("orders", len(cases) + ("layers" in asked)) as advance:
        for i, (axis, variant, ours) in enumerate(cases, start=1):
            full = getattr(cfg, axis)
            kept = _middle(cfg, axis)
            if kept is None:
                continue
            counts = ej.counts(cfg, **{axis: kept})
            shuffled = (random_ranks(found, seed, axis) for seed in range(draws))
            random = [measure(ranks, counts) for ranks in shuffled]
            rows.append(
                {
                    "axis": axis,
                    "variant": variant,
                    "kept": kept,
                    "full": full,
                    "ours": measure(ej.rank({axis: ours[axis]}), counts),
                    "random": random,
                }
            )
            advance(i, axis)
        if "layers" not in asked:
            return rows
        kept = cfg.layers - 1
        keep = lambda scores: ej.counts(
            cfg, layers=ej.keep_layers(ej.rank({"layers": scores}), kept)
        )
        rng = np.random.default_rng(0)
        rows.append(
            {
                "axis": "layers",
                "variant": "",
                "kept": kept,
                "full": cfg.layers,
                "ours": measure({}, keep(depth)),
                "random": [
                    measure({}, keep(rng.random(cfg.layers))) for _ in range(draws)
                ],
            }
        )
        advance(len(cases) + 1)
    return rows


def random_ranks(scores: Mapping, seed: int, axis: str | None = None) -> dict[str, Any]:
    """Random permutations in the shapes of `scores`, of one axis or of all."""
    rng = np.random.default_rng([7, seed])
    drawn = {
        name: jax.tree.map(lambda s: jnp.asarray(rng.random(s.shape)), scores[name])
        for name in scores
        if axis in (None, name)
    }
    return ej.rank(drawn)


def _middle(cfg: ej.ModelConfig, axis: str) -> int | None:
    """About half of the axis, in its steps; None where there is nothing between."""
    full, step = getattr(cfg, axis), AXES[axis].step
    least = cfg.top_k if axis == "experts" else step
    half = max(least, full // 2 // step * step)
    return half if half < full else None
