"""Nested quantization-aware training: every budget of one quantized checkpoint at once.

The whole tensors are rounded first, under scales of the parent, and then cut: what a
submodel trains with is what will be sliced from the stored checkpoint. Gradients pass
straight through every rounding. The router is frozen, budgets are sampled like in any
other stage, and the weights that the optimiser moves stay in high precision.

By distillation (QAD) a submodel learns from the same submodel before quantizing: a
teacher of its own size, which recovers more than a larger one (arXiv 2601.20088).
Cross entropy on the data (QAT) is there to be compared with.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array

from elastic_jax.axes import Counts, Path
from elastic_jax.curriculum import Stage, sample_budgets
from elastic_jax.distill import cross_entropy_loss
from elastic_jax.elastic import Elastic
from elastic_jax.model import param_specs
from elastic_jax.nesting import slice_config, slice_params
from elastic_jax.objectives import Objective, hidden_of, kl_from, read_out
from elastic_jax.quantize import Recipe, fake, quantize
from elastic_jax.train import accumulated

SCALES = ("recomputed", "frozen")
TEACHERS = ("same_budget", "parent")
LOSSES = ("distillation", "cross_entropy")


@dataclass(frozen=True)
class QuantizedTraining:
    """How a stage trains for a quantized checkpoint.

    Attributes:
      recipe: which parameters are rounded, and to what.
      scales: `"recomputed"` from the weights in every step, or `"frozen"` at those of a
        quantized tree; scales of blocks that were searched for should be.
      teacher: the elastic model before quantizing, at the `"same_budget"`, or as a
        whole, its `"parent"`.
      loss: `"distillation"` from the teacher, or `"cross_entropy"` on the data.

    Raises:
      ValueError: with every word that is unknown.
    """

    recipe: Recipe
    scales: str = "recomputed"
    teacher: str = "same_budget"
    loss: str = "distillation"

    def __post_init__(self):
        options = {"scales": SCALES, "teacher": TEACHERS, "loss": LOSSES}
        problems = [
            f"{name}: expected one of {known}, got {getattr(self, name)!r}"
            for name, known in options.items()
            if getattr(self, name) not in known
        ]
        if problems:
            raise ValueError("invalid QuantizedTraining:\n  " + "\n  ".join(problems))


def quantized_objective(
    elastic: Elastic,
    stage: Stage,
    counts: Mapping[str, Counts],
    training: QuantizedTraining,
    *,
    like: Any = None,
    input_largest: Mapping[Path, Array] | None = None,
) -> Objective:
    """Training of slices of fake-quantized weights, at settled counts.

    Args:
      elastic: its `teacher` is the elastic model in high precision.
      like: a quantized tree whose scales are frozen.
      input_largest: of the activations, as of `quantize`; without, weights alone are
        rounded. A tree `like` has its own.

    Raises:
      ValueError: a stage that trains the router or mixes prefixes; frozen scales
        without the tree that has them, or a tree whose scales are not to be frozen.
    """
    if stage.router != "frozen" or stage.mixed_prefixes:
        raise ValueError(
            f"stage {stage.name!r}: quantized training has router='frozen' and no "
            f"mixed_prefixes, got {stage.router!r} and {stage.mixed_prefixes}"
        )
    if (training.scales == "frozen") != (like is not None):
        raise ValueError(
            f"stage {stage.name!r}: scales are {training.scales!r}, and a tree that "
            f"has them is {'not ' if like is None else ''}given (`like`)"
        )
    if like is not None and input_largest is not None:
        raise ValueError("input_largest: a tree `like` has input scales of its own")
    settings = elastic.cfg, training
    weights = stage.budget_weights(len(elastic.budgets))

    def gradients(state, batch, step):
        at = int(state.step)
        drawn = sample_budgets(elastic.seed, at, weights, stage.micro_batches)
        # Rounded once a step, for all budgets.
        rounded = _rounded(state.params, like, input_largest, *settings)
        names = [elastic.names[i] for i in drawn]
        calls = [
            (n, (*settings, counts[n], elastic.chunk), (elastic.teacher, rounded))
            for n in names
        ]
        return accumulated(_loss, calls, state, batch, stage, elastic.mesh)

    return Objective(gradients)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _rounded(params, like, input_largest, cfg, training):
    specs, scales = param_specs(cfg), {"like": like, "input_largest": input_largest}
    scales["frozen"] = training.scales == "frozen"
    return quantize(params, specs, cfg, training.recipe, **scales)


def _loss(trained, rows, teacher, rounded, cfg, training, counts, chunk):
    specs, small_cfg = param_specs(cfg), slice_config(cfg, counts)
    small = slice_params(fake(trained["params"], rounded, specs), specs, counts)
    hidden = hidden_of(small, rows, small_cfg)
    if training.loss == "cross_entropy":
        loss = cross_entropy_loss(
            *read_out(hidden, small),
            rows["targets"],
            weights=rows["weights"],
            chunk=chunk,
        )
    elif training.teacher == "parent":
        loss = kl_from(hidden, small, rows, teacher, cfg, chunk)
    else:
        same = slice_params(teacher, specs, counts)
        loss = kl_from(hidden, small, rows, same, small_cfg, chunk)
    return loss, loss
