"""BF16, and every arm of `experiments/quantization.py`."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from experiments import quantization
from experiments.arms.start import Start


def arms(start: Start, seed: int) -> tuple[str, ...]:
    return quantization.REFERENCE, *start.plan.values["quantization"]["arms"]


def rows(start: Start, seed: int, missing) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arm -> budgets, as its checkpoint restores them."""
    run = quantization.Seed(start.plan, start.workdir, start.nested, seed, False)
    for arm in missing:
        opened = run.stored(arm, run.weights(arm)[1])
        restored = {n: opened.restore(n, dtype=jnp.float32) for n in run.counts}
        found = {n: start.plan.task.evaluate(*each) for n, each in restored.items()}
        yield arm, {"budgets": found}
