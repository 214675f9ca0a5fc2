"""How good a submodel is: by the task's own measure, and by its distance."""

from typing import Any

import elastic_jax as ej
from elastic_jax import objectives
from elastic_jax.packing import stacked
from experiments.settings import Plan
from experiments.training import SNAPSHOTS


def calibration_batches(plan: Plan, rows: int) -> list[dict[str, Any]]:
    """The first `rows` rows of the calibration split, in batches."""
    task = plan.task.data["calibration"]
    return stacked([task[i] for i in range(rows)], plan.values["calibration"]["batch"])


def sliced(plan: Plan, params: Any, counts: ej.Counts) -> tuple[Any, ej.ModelConfig]:
    """A submodel of the parent's shape, and its configuration."""
    cfg = ej.slice_config(plan.cfg, counts)
    return ej.slice_params(params, ej.param_specs(plan.cfg), counts), cfg


def kl(plan: Plan, teacher, params, cfg, batches, *, teacher_cfg=None) -> float:
    """KL from the parent, if no other teacher is given."""
    whole = teacher_cfg or plan.cfg
    return objectives.divergence(teacher, params, cfg, batches, teacher_cfg=whole)


def evaluate(
    plan: Plan,
    params: Any,
    cfg: ej.ModelConfig,
    teacher: Any,
    *,
    teacher_cfg: ej.ModelConfig | None = None,
) -> dict[str, Any]:
    """One model by the task's own measure, and its KL from `teacher`.

    Args:
      teacher_cfg: of the teacher; None is the parent's.
    """
    source, count = plan.task.data["evaluation"], plan.values["orders"]["rows"]
    every = max(1, len(source) // count)
    examples = [source[i] for i in range(0, min(every * count, len(source)), every)]
    batches = stacked(examples, plan.values["calibration"]["batch"])
    distance = kl(plan, teacher, params, cfg, batches, teacher_cfg=teacher_cfg)
    return plan.task.evaluate(params, cfg) | {"kl": distance}


def divergences(plan, workdir, name, teacher, final, counts) -> dict[str, Any]:
    """KL of every budget at its final counts: at the snapshots and at the end."""
    batches = calibration_batches(plan, plan.values["orders"]["rows"])
    saved = {}
    for step in SNAPSHOTS:
        path = workdir.path / "snapshots" / f"{name}-{step}"
        if path.exists():
            saved[str(step)] = ej.open_nested(path).restore()[0]
    saved["end"] = final
    return {
        budget: {
            when: kl(plan, teacher, *sliced(plan, params, kept), batches)
            for when, params in saved.items()
        }
        for budget, kept in counts.items()
    }
