"""The router: learns how many units of every axis each budget keeps.

One small MLP per axis reads a budget, a one-hot or a blend of two, and scores the
counts on offer. While it learns, a budget is a soft mask, the mixture of the prefixes
of all counts by their probabilities, so cost and model alike are differentiable in
the choice. The budget at work enters as a traced vector, so that one compiled step
serves them all. In the end the most probable counts are taken, without noise.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from elastic_jax import nesting
from elastic_jax.axes import AXES, Counts, blocks_with
from elastic_jax.budget import Budget
from elastic_jax.budgets import ZONE, Budgets, depth_choices, relative_targets
from elastic_jax.config import ElasticConfig, ModelConfig
from elastic_jax.cost import cost
from elastic_jax.masks import BudgetMasks, prefix_mask

Choices = Mapping[str, Float[Array, "*block choices"]]

PULL = 10.0  # weight that draws the full budget to full size
FINAL_SCALE, FINAL_TEMPERATURE = 10.0, 0.05


class Router(nn.Module):
    """Independent two-layer MLPs without biases, one per elastic axis.

    Attributes:
      elastic: the axes and the counts on offer.
      blocks: (axis, number of blocks) of the axes on which every block chooses.
      budgets: length of the input.
      hidden: width of each MLP.

    Maps a budget vector to axis -> logits, [choices] or [blocks, choices]. Sizes,
    slope and initialisation are those of arXiv 2511.16664.
    """

    elastic: ElasticConfig
    blocks: tuple[tuple[str, int], ...]
    budgets: int
    hidden: int = 256

    @nn.compact
    def __call__(self, budget: Float[Array, "*batch budgets"]) -> Choices:
        if budget.shape[-1:] != (self.budgets,):
            raise ValueError(
                f"router: a budget of shape {budget.shape}, expected one weight for "
                f"each of {self.budgets} budgets; see budget_input and blend"
            )
        logits = {}
        for axis, options in self.elastic.choices:
            blocks = (dict(self.blocks)[axis],) if axis in dict(self.blocks) else ()
            h = nn.leaky_relu(self._dense(f"{axis}_in", self.hidden)(budget), 0.1)
            z = self._dense(f"{axis}_out", math.prod(blocks) * len(options))(h)
            logits[axis] = z.reshape(*z.shape[:-1], *blocks, len(options))
        return logits

    def _dense(self, name: str, features: int) -> nn.Dense:
        normal = nn.initializers.normal(0.1)
        return nn.Dense(
            features, use_bias=False, kernel_init=normal, precision="highest", name=name
        )


def make_router(
    cfg: ModelConfig, elastic: ElasticConfig, budgets: int, *, hidden: int = 256
) -> Router:
    """The router of `elastic` for the parent `cfg` and a number of budgets."""
    elastic.validate(cfg)
    blocks = tuple((a, len(blocks_with(cfg.pattern, a))) for a in elastic.per_layer)
    return Router(elastic, blocks, budgets, hidden)


def budget_input(
    budget: int | Int[Array, ""] | Float[Array, " budgets"], budgets: int
) -> Float[Array, " budgets"]:
    """The router's input: the one-hot of an index, or given weights as they are."""
    budget = jnp.asarray(budget)
    if jnp.issubdtype(budget.dtype, jnp.integer):
        return jax.nn.one_hot(budget, budgets)
    return budget


def blend(targets: Sequence[float], ratio: float) -> Float[Array, " budgets"]:
    """The input for a budget nobody trained: its two neighbours, linearly.

    Args:
      targets: the trained budgets as of `relative_targets`, descending.
      ratio: the cost wanted, as a fraction of the full model.
    """
    if not targets[-1] <= ratio <= targets[0]:
        raise ValueError(
            f"blend: {ratio} is outside the trained budgets {targets[-1]} to "
            f"{targets[0]}"
        )
    ascending = targets[::-1]
    weights = [np.interp(ratio, ascending, row[::-1]) for row in np.eye(len(targets))]
    return jnp.asarray(weights, jnp.float32)


def schedule(step: int | Array, total_steps: int) -> tuple[Array, Array]:
    """Scale of the logits, 1 to 10 linearly, and temperature, 1 to 0.05 by decay.

    Both stay at their ends after `total_steps`. arXiv 2511.16664.
    """
    progress = jnp.clip(jnp.asarray(step, jnp.float32) / total_steps, 0, 1)
    return 1 + (FINAL_SCALE - 1) * progress, FINAL_TEMPERATURE**progress


def probabilities(
    logits: Choices,
    scale: float | Array,
    temperature: float | Array,
    key: Array | None = None,
    *,
    hard: bool | Array = False,
) -> dict[str, Array]:
    """Softmax over the choices of every axis, Gumbel-Softmax with a `key`.

    With `hard` the result is the one-hot of the largest, with the gradient of the
    soft one (straight-through).
    """
    pi = {}
    for i, axis in enumerate(AXES):  # an axis draws the same noise whatever else is
        if axis in logits:
            z = scale * logits[axis]
            if key is not None:
                z += jax.random.gumbel(jax.random.fold_in(key, i), z.shape)
            soft = jax.nn.softmax(z / temperature)
            best = jax.nn.one_hot(jnp.argmax(soft, -1), soft.shape[-1])
            straight = best + (soft - jax.lax.stop_gradient(soft))
            pi[axis] = jnp.where(hard, straight, soft)
    return pi


def soft_masks(
    pi: Choices, elastic: ElasticConfig, cfg: ModelConfig, *, depth_ranks=None
) -> BudgetMasks:
    """The prefix masks of all choices, mixed by `pi`; hard masks for a one-hot.

    Args:
      depth_ranks: block indices, best first; needed where `layers` is elastic.
    """

    def mixed(weights, prefixes):
        return jnp.einsum("c,cs->s", weights, prefixes, precision="highest")

    masks = {}
    for axis, options in elastic.choices:
        if axis == "layers":
            prefixes = jnp.asarray(depth_choices(depth_ranks, options), jnp.float32)
        else:
            size = getattr(cfg, axis)
            prefixes = jnp.stack([prefix_mask(n, size) for n in options])
        if axis in elastic.per_layer:
            masks[axis] = tuple(mixed(row, prefixes) for row in pi[axis])
        else:
            masks[axis] = mixed(pi[axis], prefixes)
    return masks


def chosen_counts(
    logits: Choices, elastic: ElasticConfig, cfg: ModelConfig, *, depth_ranks=None
) -> Counts:
    """The most probable count on every axis, without noise; on the host."""
    kept = {}
    for axis, options in elastic.choices:
        best = np.argmax(np.asarray(logits[axis]), axis=-1)
        if axis == "layers":
            kept[axis] = depth_choices(depth_ranks, options)[best]
        elif axis in elastic.per_layer:
            kept[axis] = tuple(options[i] for i in best)
        else:
            kept[axis] = options[best]
    return nesting.counts(cfg, **kept)


def cost_over_target(
    masks: BudgetMasks,
    budget: Float[Array, " budgets"],
    *,
    budgets: Budgets,
    specs,
    cfg: ModelConfig,
    cache_specs=None,
) -> Float[Array, ""]:
    """Cost of `masks` over the target of `budget`, a vector as the router reads it."""
    targets = relative_targets(budgets, specs, cfg, cache_specs=cache_specs)
    measure = budgets[0][1].measure
    full = measure(cost(specs, cfg), cache_specs)
    spent = measure(cost(specs, cfg, masks=masks), cache_specs)
    return spent / full / jnp.dot(budget, jnp.asarray(targets), precision="highest")


def budget_loss(
    pi: Choices,
    masks: BudgetMasks,
    budget: Float[Array, " budgets"],
    *,
    budgets: Budgets,
    specs,
    cfg: ModelConfig,
    cache_specs=None,
    zone: float = ZONE,
) -> Float[Array, ""]:
    """|cost / target - 1|: zero in the zone; and the full budget's pull to full size.

    The full budget has no zone, and adds 10 times the mean squared distance of `pi`
    to index 0, summed over axes.

    Args:
      pi, masks: of `probabilities` and `soft_masks`.
      budget: one-hot over `budgets`, may be traced.
      zone: how far a cost may miss its target for nothing, as a share of it.
    """
    ratio = cost_over_target(
        masks, budget, budgets=budgets, specs=specs, cfg=cfg, cache_specs=cache_specs
    )
    off = jnp.abs(ratio - 1)
    pull = sum(
        jnp.mean((p - jax.nn.one_hot(0, p.shape[-1])) ** 2) for p in pi.values()
    )
    smaller = jnp.where(off < zone, 0.0, off)
    return jnp.where(budget[0] == 1, off + PULL * pull, smaller)


def health(
    name: str,
    budget: Budget,
    logits: Choices,
    pi: Choices,
    elastic: ElasticConfig,
    specs,
    cfg: ModelConfig,
    *,
    cache_specs=None,
    depth_ranks=None,
) -> dict[str, float]:
    """One budget's choices as flat metrics.

    Keys are `name/cost_over_target` (of the chosen counts) and, for every axis,
    `name/axis/` (`name/axis/block/` where blocks choose) followed by `count`,
    `entropy` in nats, or `p/` and a count: its probability in `pi`.
    """
    counts = chosen_counts(logits, elastic, cfg, depth_ranks=depth_ranks)
    ratio = budget.ratio(specs, cache_specs, cfg, counts=counts)
    metrics = {f"{name}/cost_over_target": float(ratio)}
    for axis, options in elastic.choices:
        each = axis in elastic.per_layer
        scores = np.atleast_2d(np.asarray(logits[axis]))
        for i, p in enumerate(np.atleast_2d(np.asarray(pi[axis], np.float64))):
            prefix = f"{name}/{axis}/{i}" if each else f"{name}/{axis}"
            live = p[p > 0]
            metrics[f"{prefix}/count"] = float(options[np.argmax(scores[i])])
            metrics[f"{prefix}/entropy"] = float(-np.sum(live * np.log(live)))
            for n, share in zip(options, p, strict=True):
                metrics[f"{prefix}/p/{n}"] = float(share)
    return metrics
