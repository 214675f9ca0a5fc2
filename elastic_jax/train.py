"""Training steps: one gradient per micro-batch, one update for all objectives.

    b batch   t time   d embed

An objective turns a batch into gradients of the parent's whole tree; a sliced
submodel's gradients land in the prefix, and the optimiser state stays whole. Whatever
differs between stages is traced, so they share their executables: one gradient per
context while the router learns, one per budget and context once it is frozen, and one
update for all. A frozen router is one with rate zero.

A batch holds `tokens`, `targets` (the next tokens), `segment_ids` and `weights`
(which targets count), each [b, t]. Micro-batches add up to the mean over the weights of
the whole batch, however it is cut.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from elastic_jax import axes
from elastic_jax.axes import Counts, ParamSpecs
from elastic_jax.config import ModelConfig
from elastic_jax.curriculum import Stage, sample_budgets
from elastic_jax.distill import cross_entropy_loss, distillation_loss
from elastic_jax.elastic import Elastic, router_health
from elastic_jax.model import hidden_states, param_specs
from elastic_jax.nesting import slice_config, slice_params
from elastic_jax.router import (
    budget_input,
    budget_loss,
    probabilities,
    schedule,
    soft_masks,
)
from elastic_jax.sharding import DEFAULT_RULES, batch_sharding, param_shardings

ROWS = ("tokens", "targets", "segment_ids", "weights")
Losses = list[tuple[str, float]]  # (budget, loss) per micro-batch


# --------------------------------------------------------------- state and update


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
      step: optimiser steps so far, through all stages.
      params: the parent's parameters, in importance order once it is permuted.
      router: the router's parameters; empty where there is none.
      moments: optimiser state of both.
    """

    step: Int[Array, ""]
    params: Any
    router: Any
    moments: Any


@functools.cache  # one object for one setting, so that jitted updates are shared
def optimizer(
    specs: ParamSpecs,
    *,
    clip: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.98,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW directions for weights and router, each clipped by its own global norm.

    The learning rate is applied by `update`. Decay is left out where nothing is
    contracted, on the embedding, and on the router.
    """
    steps = [optax.clip_by_global_norm(clip), optax.scale_by_adam(b1, b2)]
    decays = {
        "params": axes.map_specs(lambda _, spec: spec.decays, specs),
        "router": optax.MaskedNode(),
    }
    decay = optax.add_decayed_weights(weight_decay, decays)
    weights = optax.chain(*steps, decay if weight_decay else optax.identity())
    return optax.multi_transform(
        {"params": weights, "router": optax.chain(*steps)},
        {"params": "params", "router": "router"},
    )


def init_state(
    params: Any, transformation: optax.GradientTransformation, router: Any = None
) -> TrainState:
    """A fresh state; it owns copies, because a step donates what it is given.

    Moments are float32 at least, and lie where their parameters do. On a mesh all the
    rest is replicated.
    """
    trained = jax.tree.map(jnp.copy, {"params": params, "router": router or {}})
    mesh = _mesh(trained)
    moments = transformation.init(_zeros(trained))
    state = TrainState(jnp.zeros((), jnp.int32), **trained, moments=moments)
    if mesh is None:
        return state
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: x if _mesh(x) == mesh else jax.device_put(x, whole), state
    )


def shard_params(params: Any, cfg: ModelConfig, mesh, rules=DEFAULT_RULES) -> Any:
    """`params` laid out over `mesh` by dimension name."""
    return jax.device_put(params, param_shardings(cfg, param_specs(cfg), mesh, rules))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def update(
    transformation: optax.GradientTransformation,
    state: TrainState,
    gradients: Any,
    rates: Mapping[str, Any],
    accept: Any,
) -> tuple[TrainState, dict[str, Array]]:
    """Applies one step, or only counts it where gradients or `accept` say no.

    Args:
      state: donated: its arrays must not be used again.
      gradients: of {"params", "router"}.
      rates: `rate/params` and `rate/router`.
      accept: False drops the update.

    Returns:
      the new state and the gradient norms, `norm/params` and `norm/router`.
    """
    trained = _trained(state)
    norms = {f"norm/{k}": optax.tree.norm(v) for k, v in gradients.items()}
    good = jnp.asarray(accept)
    for norm in norms.values():
        good &= jnp.isfinite(norm)
    directions, moments = transformation.update(gradients, state.moments, trained)
    moved = {
        k: jax.tree.map(
            lambda w, d, k=k: (w - rates[f"rate/{k}"] * d).astype(w.dtype),
            trained[k],
            directions[k],
        )
        for k in trained
    }
    moved, moments = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (moved, moments),
        (trained, state.moments),
    )
    return TrainState(state.step + 1, **moved, moments=moments), norms


# --------------------------------------------------------------------- objectives


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
        return _accumulated(_language_loss, calls, state, batch, stage, mesh)

    return Objective(gradients)


def _language_loss(trained, rows, cfg, chunk):
    params = trained["params"]
    loss = cross_entropy_loss(
        _hidden(params, rows, cfg),
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
        return _accumulated(_masked_loss, calls, state, batch, stage, elastic.mesh)

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
    hidden = _hidden(params, rows, elastic.cfg, masks)
    kl = _divergence(hidden, params, rows, teacher, elastic.cfg, elastic.chunk)
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
    """
    weights = stage.budget_weights(len(elastic.budgets))

    def gradients(state, batch, step):
        at = int(state.step)
        drawn = sample_budgets(elastic.seed, at, weights, stage.micro_batches)
        names = [elastic.names[i] for i in drawn]
        calls = [
            (name, (elastic.cfg, counts[name], elastic.chunk), (elastic.teacher,))
            for name in names
        ]
        return _accumulated(_sliced_loss, calls, state, batch, stage, elastic.mesh)

    return Objective(gradients)


def _sliced_loss(trained, rows, teacher, cfg, counts, chunk):
    small = slice_params(trained["params"], param_specs(cfg), counts)
    hidden = _hidden(small, rows, slice_config(cfg, counts))
    kl = _divergence(hidden, small, rows, teacher, cfg, chunk)
    return kl, kl


def divergence(
    teacher: Any,
    params: Any,
    cfg: ModelConfig,
    counts: Counts,
    batches: Iterable[Mapping],
    *,
    chunk: int = 512,
) -> float:
    """Mean KL, in nats per token, from the parent `teacher` to a slice of `params`."""
    rows = ({k: jnp.asarray(batch[k]) for k in ROWS} for batch in batches)
    given = {"params": params}, teacher, cfg, counts, chunk
    return float(np.mean([_loss_alone(r, *given) for r in rows]))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _loss_alone(rows, trained, teacher, cfg, counts, chunk):
    return _sliced_loss(trained, rows, teacher, cfg, counts, chunk)[0]


def _hidden(params, rows, cfg, masks=None):
    return hidden_states(
        params, rows["tokens"], cfg, masks=masks, segment_ids=rows["segment_ids"]
    )


def _divergence(hidden, student, rows, teacher, cfg, chunk):
    """KL from the parent, whose hidden states are computed alongside."""
    taught = jax.lax.stop_gradient(_hidden(teacher, rows, cfg))
    return distillation_loss(
        hidden,
        student["lm_head"],
        taught,
        teacher["lm_head"],
        weights=rows["weights"],
        chunk=chunk,
    )


# ------------------------------------------------------------------ micro-batches


def _accumulated(
    loss: Callable,
    calls: Sequence[tuple[str, tuple, tuple]],
    state: TrainState,
    batch: Mapping,
    stage: Stage,
    mesh,
) -> tuple[Any, Losses]:
    """The gradient of a batch; `calls` has (budget, settings, arguments) per part."""
    trained = _trained(state)
    total, losses = _zeros(trained), []
    parts = _micro_batches(batch, stage, mesh)
    for (budget, settings, given), (rows, share) in zip(calls, parts, strict=True):
        total, value = accumulate(loss, settings, total, trained, share, rows, *given)
        losses.append((budget, value))
    return total, [(budget, float(value)) for budget, value in losses]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def accumulate(loss, settings, total, trained, share, *given):
    """(total + share * gradient, reported loss) of `loss(trained, *given, *settings)`.

    `loss` returns what is differentiated, and what is reported. `total` is donated.
    """
    differentiate = jax.value_and_grad(loss, has_aux=True)
    (_, reported), gradient = differentiate(trained, *given, *settings)
    total = jax.tree.map(lambda s, g: s + share * g.astype(s.dtype), total, gradient)
    return total, reported


def _micro_batches(
    batch: Mapping, stage: Stage, mesh
) -> Iterator[tuple[dict[str, Array], float]]:
    """The rows of each micro-batch, laid out over the mesh's data axis, and its share.

    A share is what the micro-batch has of the batch's weights.
    """
    expected = stage.batch, stage.context
    found = {name: np.shape(batch[name]) for name in ROWS}
    if wrong := {name: shape for name, shape in found.items() if shape != expected}:
        raise ValueError(
            f"stage {stage.name!r}: expected rows of shape {expected}, got {wrong}"
        )
    parts = [
        {name: batch[name][i : i + stage.micro_batch] for name in ROWS}
        for i in range(0, stage.batch, stage.micro_batch)
    ]
    weights = [float(np.sum(rows["weights"], dtype=np.float64)) for rows in parts]
    for rows, weight in zip(parts, weights, strict=True):
        # Where nothing counts, all gradients are zero.
        share = weight / (sum(weights) or 1.0)
        place = None if mesh is None else batch_sharding(mesh)
        yield jax.device_put(rows, place), share


def _trained(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "router": state.router}


def _zeros(trained: Any) -> Any:
    """Zeros in at least float32 that lie where the parameters lie."""
    # Compiled zeros know nothing of the parameters' layout; the others are slower.
    return _zeros_like(trained) if _mesh(trained) is None else _wide_zeros(trained)


def _wide_zeros(tree: Any) -> Any:
    wide = lambda w: jnp.zeros_like(w, jnp.promote_types(w.dtype, jnp.float32))
    return jax.tree.map(wide, tree)


_zeros_like = jax.jit(_wide_zeros)


def _mesh(tree: Any):
    """The mesh that the arrays of `tree` are laid out over; None on one device."""
    placed = (getattr(leaf.sharding, "mesh", None) for leaf in jax.tree.leaves(tree))
    return next(filter(None, placed), None)


# ------------------------------------------------------------------- router alone


def fit_router(
    elastic: Elastic, router_params: Any, *, steps: int = 300, rate: float = 1e-2
) -> Any:
    """Trains the router on the budget loss alone: no model, no data, seconds."""
    router, budgets = elastic.router, len(elastic.budgets)
    adam = optax.adam(rate)

    def loss(params, key, step):
        scale, temperature = schedule(step, steps)
        total = 0.0
        for i in range(budgets):
            budget = budget_input(i, budgets)
            noise = jax.random.fold_in(key, i)
            pi = probabilities(router.apply(params, budget), scale, temperature, noise)
            masks = soft_masks(
                pi, router.elastic, elastic.cfg, depth_ranks=elastic.depth_ranks
            )
            total += budget_loss(
                pi,
                masks,
                budget,
                budgets=elastic.budgets,
                zone=elastic.dead_zone,
                **elastic.costing,
            )
        return total

    @jax.jit
    def run(params):
        def step(carry, i):
            params, moments = carry
            key = jax.random.fold_in(jax.random.key(elastic.seed), i)
            gradient = jax.grad(loss)(params, key, i)
            direction, moments = adam.update(gradient, moments)
            return (optax.apply_updates(params, direction), moments), None

        start = params, adam.init(params)
        (params, _), _ = jax.lax.scan(step, start, jnp.arange(steps))
        return params

    return run(router_params)
