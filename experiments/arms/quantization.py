"""BF16, and every arm of `experiments/quantization.py`."""

from collections.abc import Iterator
from typing import Any

from experiments import quantization
from experiments.arms.start import Start


def arms(start: Start, seed: int) -> tuple[str, ...]:
    """Those of a seed: training on the data is there for the first few."""
    each = (quantization.REFERENCE, *start.plan.values["quantization"]["arms"])
    late = seed >= start.asked["qat_seeds"]
    return tuple(arm for arm in each if not (late and arm.endswith("_qat")))


def rows(start: Start, seed: int, missing) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arm -> budgets, as its checkpoint restores them."""
    run = quantization.Seed(start.plan, start.workdir, start.nested, seed, False)
    for arm in missing:
        found = {row.pop("budget"): row for row in run.rows(arm)}
        for row in found.values():  # of every parameter: not for a line of results
            del row["errors"], row["arm"]
        yield arm, {"budgets": found}
