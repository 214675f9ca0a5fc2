"""What a stage trains on: gradients of the parent's whole tree, one loss per kind.

    b batch   t time   d embed

A sliced submodel's gradients land in the prefix. Whatever differs between stages is
traced, so they share their executables: one gradient per context while the router
learns, one per budget and context once it is frozen, one per context for all pairs of
budgets where prefixes are mixed.

Mixed prefixes: nested weights alone do not make states interchangeable. A submodel
answers well from the state that another left behind only if it was trained to.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from elastic_jax.axes import Counts
from elastic_jax.config import ModelConfig
from elastic_jax.curriculum import Stage, sample_budgets, sample_pairs
from elastic_jax.distill import cross_entropy_loss, distillation_loss
from elastic_jax.elastic import Elastic, router_health
from elastic_jax.masks import stacked_masks, switched
from elastic_jax.model import hidden_states, param_specs
from elastic_jax.nesting import resolved, slice_config, slice_params
from elastic_jax.router import (
    budget_input,
    budget_loss,
    probabilities,
    schedule,
    soft_masks,
)
from elastic_jax.train import ROWS, Losses, TrainState, accumulated
from elastic_kernels.products import met


@dataclass(frozen=True)
class Objective:
    """What a stage trains on.

    Attributes:
      gradients: (state, batch, step in the stage) -> (gradients, losses).
      health: (state, step in the stage) -> metrics worth a row now and then.
    """

    gradients: Callable[[TrainState, Mapping, int], tuple[Any, Losses]]
    health: Callable[[TrainState, int], Mapping[str, Any]] = lambda *_: {}


def language_objective(
    cfg: ModelConfig, stage: Stage, *, chunk: int = 512, mesh=None
) -> Objective:
    """Next-token cross entropy of the full model: how a toy parent is made."""

    def gradients(state, batch, step):
        calls = [("full", (cfg, chunk), ())] * stage.micro_batches
        return accumulated(_language_loss, calls, state, batch, stage, mesh)

    return Objective(gradients)


def _language_loss(trained, rows, cfg, chunk):
    params = trained["params"]
    loss = cross_entropy_loss(
        hidden_of(params, rows, cfg),
        params["lm_head"],
        rows["targets"],
        weights=rows["weights"],
        chunk=chunk,
    )
    return loss, loss


def masked_objective(elastic: Elastic, stage: Stage) -> Objective:
    """Distillation under soft masks while the router learns.

    The budget enters as a traced one-hot, so all budgets share one executable. The
    losses reported are divergences, without the budget loss.
    """
    settings = dataclasses.replace(elastic, teacher=None)  # hashable, so static
    weights = stage.budget_weights(len(elastic.budgets))

    def gradients(state, batch, step):
        at = int(state.step)
        drawn = sample_budgets(elastic.seed, at, weights, stage.micro_batches)
        key = jax.random.fold_in(jax.random.key(elastic.seed), at)
        shared = *schedule(step, stage.total_steps), stage.budget_loss_weight
        calls = []
        for i, index in enumerate(drawn):
            budget = budget_input(int(index), len(elastic.budgets))
            given = elastic.teacher, budget, jax.random.fold_in(key, i), *shared
            calls.append((elastic.names[index], (settings,), given))
        return accumulated(_masked_loss, calls, state, batch, stage, elastic.mesh)

    def report(state, step):
        return router_health(elastic, state.router, step, stage.total_steps)

    return Objective(gradients, report)


def _masked_loss(
    trained, rows, teacher, budget, key, scale, temperature, budget_loss_weight, elastic
):
    noise, coin = jax.random.split(key)
    hard = jax.random.uniform(coin) < elastic.hard_probability
    router, params = elastic.router, trained["params"]
    logits = router.apply(trained["router"], budget)
    pi = probabilities(logits, scale, temperature, noise, hard=hard)
    masks = soft_masks(pi, router.elastic, elastic.cfg, depth_ranks=elastic.depth_ranks)
    hidden = hidden_of(params, rows, elastic.cfg, masks)
    kl = kl_from(hidden, params, rows, teacher, elastic.cfg, elastic.chunk)
    missed = budget_loss(
        pi,
        masks,
        budget,
        budgets=elastic.budgets,
        zone=elastic.dead_zone,
        **elastic.costing,
    )
    return kl + budget_loss_weight * missed, kl


def sliced_objective(
    elastic: Elastic, stage: Stage, counts: Mapping[str, Counts]
) -> Objective:
    """Distillation of the sliced submodels at settled counts: only active work.

    One executable per budget; the whole tree's gradient is zero outside the prefix.

    Raises:
      ValueError: the stage mixes prefixes, which no slice can do.
    """
    if stage.mixed_prefixes:
        raise ValueError(
            f"stage {stage.name!r}: mixed_prefixes is {stage.mixed_prefixes}; use "
            "mixed_objective"
        )
    weights = stage.budget_weights(len(elastic.budgets))

    def gradients(state, batch, step):
        at = int(state.step)
        drawn = sample_budgets(elastic.seed, at, weights, stage.micro_batches)
        names = [elastic.names[i] for i in drawn]
        calls = [
            (name, (elastic.cfg, counts[name], elastic.chunk), (elastic.teacher,))
            for name in names
        ]
        return accumulated(_sliced_loss, calls, state, batch, stage, elastic.mesh)

    return Objective(gradients)


def _sliced_loss(trained, rows, teacher, cfg, counts, chunk):
    small = slice_params(trained["params"], param_specs(cfg), counts)
    hidden = hidden_of(small, rows, slice_config(cfg, counts))
    kl = kl_from(hidden, small, rows, teacher, cfg, chunk)
    return kl, kl


def mixed_objective(
    elastic: Elastic, stage: Stage, counts: Mapping[str, Counts]
) -> Objective:
    """Distillation at settled counts, some prefixes in one budget, answers in another.

    Which ones is `sample_pairs`. The parent runs under hard masks that change where
    `answer` [b, t] of the rows does: what a token left in caches and states under one
    budget is read under the other, as after a transplant. One executable for all
    pairs, also of a budget with itself, each at the cost of the whole parent.

    Losses are reported by budget, or as "small-to-full".

    Raises:
      ValueError: budgets that keep different blocks, whose states do not correspond.
    """
    _check_blocks(elastic, stage, counts)
    masks = stacked_masks(elastic.cfg, [counts[name] for name in elastic.names])
    settings = elastic.cfg, elastic.chunk

    def gradients(state, batch, step):
        at, budgets = int(state.step), len(elastic.budgets)
        pairs = sample_pairs(elastic.seed, at, stage, budgets)
        calls = [
            (_pair_name(elastic.names, pair), settings, (elastic.teacher, masks, pair))
            for pair in pairs
        ]
        fields = *ROWS, "answer"
        return accumulated(
            _mixed_loss, calls, state, batch, stage, elastic.mesh, fields=fields
        )

    return Objective(gradients)


def _mixed_loss(trained, rows, teacher, masks, pair, cfg, chunk):
    params = trained["params"]
    now = switched(masks, pair[0], pair[1], rows["answer"])
    hidden = hidden_of(params, rows, cfg, now)
    kl = kl_from(hidden, params, rows, teacher, cfg, chunk)
    return kl, kl


def _pair_name(names, pair) -> str:
    first, second = (names[i] for i in pair)
    return first if first == second else f"{first}-to-{second}"


def _check_blocks(elastic: Elastic, stage: Stage, counts: Mapping[str, Counts]):
    """Raises ValueError if budgets of the stage do not keep the same blocks."""
    weights = stage.budget_weights(len(elastic.budgets))
    drawn = [n for n, weight in zip(elastic.names, weights, strict=True) if weight]
    kept = {n: resolved(elastic.cfg, counts[n])["layers"] for n in drawn}
    if len(set(kept.values())) > 1:
        blocks = (f"{n} {''.join(map(str, on))}" for n, on in kept.items())
        raise ValueError(
            f"stage {stage.name!r} mixes prefixes, but its budgets keep different "
            f"blocks, whose states do not correspond: {', '.join(blocks)}. Settle "
            "them without `layers`, leave budgets out by a weight of 0 in sampling, "
            "or set mixed_prefixes to 0"
        )


def divergence(
    teacher: Any,
    params: Any,
    cfg: ModelConfig,
    batches: Iterable[Mapping],
    *,
    teacher_cfg: ModelConfig | None = None,
    chunk: int = 512,
) -> float:
    """Mean KL, in nats per token that counts, of one model from another.

    Args:
      params, cfg: the model, quantized or not.
      batches: rows of the same shape, as a stage has them.
      teacher_cfg: of `teacher`; None is `cfg`.
    """
    settings = teacher_cfg or cfg, cfg, chunk
    rows = ({k: jnp.asarray(batch[k]) for k in ROWS} for batch in batches)
    found = [_weighted_kl(each, teacher, params, *settings) for each in rows]
    weight = sum(float(weight) for _, weight in found)
    kl = sum(float(kl) * float(weight) for kl, weight in found) / (weight or 1.0)
    return max(kl, 0.0)  # rounding


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _weighted_kl(rows, teacher, params, teacher_cfg, cfg, chunk):
    """The mean over a batch, and its weight."""
    hidden = hidden_of(params, rows, cfg)
    kl = kl_from(hidden, params, rows, teacher, teacher_cfg, chunk)
    return kl, jnp.sum(rows["weights"])


def hidden_of(params, rows, cfg, masks=None):
    """Final hidden states [b, t, d] of the rows of a micro-batch."""
    return hidden_states(
        params, rows["tokens"], cfg, masks=masks, segment_ids=rows["segment_ids"]
    )


def read_out(hidden, params):
    """Hidden states and head as their product takes them, the head as an array."""
    head = params["lm_head"]
    return met(hidden, head), head.astype(hidden.dtype)


def kl_from(hidden, student, rows, teacher, cfg, chunk):
    """KL from a teacher of `cfg`, whose hidden states are computed alongside."""
    taught = jax.lax.stop_gradient(hidden_of(teacher, rows, cfg))
    return distillation_loss(
        *read_out(hidden, student),
        taught,
        teacher["lm_head"],
        weights=rows["weights"],
        chunk=chunk,
    )
