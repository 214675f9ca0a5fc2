"""Training steps: one gradient per micro-batch, one update for all objectives.

    b batch   t time

The gradient is of the parent's whole tree, whatever part of it an objective ran, so
the optimiser state stays whole and all stages share one update. A frozen router is one
with rate zero.

A batch holds `tokens`, `targets` (the next tokens), `segment_ids` and `weights`
(which targets count), each [b, t]. Micro-batches add up to the mean over the weights of
the whole batch, however it is cut.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from elastic_jax import axes
from elastic_jax.axes import ParamSpecs
from elastic_jax.config import ModelConfig
from elastic_jax.curriculum import Stage
from elastic_jax.elastic import Elastic
from elastic_jax.model import param_specs
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


# ------------------------------------------------------------------ micro-batches


def accumulated(
    loss: Callable,
    calls: Sequence[tuple[str, tuple, tuple]],
    state: TrainState,
    batch: Mapping,
    stage: Stage,
    mesh,
    *,
    fields: Sequence[str] = ROWS,
) -> tuple[Any, Losses]:
    """The gradient of a batch; `calls` has (budget, settings, arguments) per part.

    `fields` of the batch are what `loss` is given as rows.

    Raises:
      ValueError: a field is missing, or has not the stage's shape.
    """
    trained = _trained(state)
    total, losses = _zeros(trained), []
    parts = _micro_batches(batch, stage, mesh, fields)
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
    batch: Mapping, stage: Stage, mesh, fields: Sequence[str]
) -> Iterator[tuple[dict[str, Array], float]]:
    """The rows of each micro-batch, laid out over the mesh's data axis, and its share.

    A share is what the micro-batch has of the batch's weights.
    """
    if missing := [name for name in fields if name not in batch]:
        raise ValueError(
            f"stage {stage.name!r}: rows without {', '.join(missing)}; it needs "
            f"{', '.join(fields)}"
        )
    expected = stage.batch, stage.context
    found = {name: np.shape(batch[name]) for name in fields}
    if wrong := {name: shape for name, shape in found.items() if shape != expected}:
        raise ValueError(
            f"stage {stage.name!r}: expected rows of shape {expected}, got {wrong}"
        )
    parts = [
        {name: batch[name][i : i + stage.micro_batch] for name in fields}
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
