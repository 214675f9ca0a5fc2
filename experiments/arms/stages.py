"""One stage or two: three ways to go on from the end of the short one."""

from collections.abc import Iterator
from typing import Any

from experiments.arms.start import Start


def arms(start: Start, seed: int) -> tuple[str, ...]:
    return tuple(stage.name for stage in start.plan.stages)


def rows(start: Start, seed: int, missing) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arm -> budgets, each with its answers by the length of the problem."""
    short, *later = start.plan.stages
    begin, counts = start.train("short", seed, counts=start.counts, stages=[short])
    if "short" in missing:
        yield "short", {"budgets": start.each(begin, counts)}
    for stage in later:
        if stage.name in missing:
            params, _ = start.train(
                stage.name, seed, counts=counts, stages=[stage], begin=begin
            )
            yield stage.name, {"budgets": start.each(params, counts)}
