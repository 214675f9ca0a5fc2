"""All pairs of `experiments/control.py`, over caps and stages."""

from collections.abc import Iterator
from typing import Any

from experiments import control
from experiments.arms.start import Start


def arms(start: Start, seed: int) -> tuple[str, ...]:
    asked = start.plan.values["control"]
    return tuple(map(_named, control.arms(*asked["budgets"], asked["hand_overs"])))


def rows(start: Start, seed: int, missing) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arm -> rows of the sweep. Arms take turns on the clock, so all are measured."""
    found = control.measured_seed(start.plan, start.workdir, start.nested, seed)
    asked = start.plan.values["control"]
    about = {"large": asked["budgets"][0], "small": asked["budgets"][1]}
    for arm in control.arms(*asked["budgets"], asked["hand_overs"]):
        if _named(arm) in missing:
            own = [row for row in found["rows"] if _arm(row) == arm]
            yield _named(arm), about | {"rows": own}


def _arm(row) -> control.Arm:
    return control.Arm(row["think"], row["answer"], row["hand_over"])


def _named(arm: control.Arm) -> str:
    return f"{arm.think} thinks, {arm.answer} answers, {arm.hand_over}"
