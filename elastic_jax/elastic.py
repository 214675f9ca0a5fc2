"""An elastic parent: its router, its budgets, and what the router has chosen.

A router is asked for choices with noise in every training step, and without noise
here: to watch it while it learns, and to take its final word.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from elastic_jax.axes import Counts, ParamSpecs
from elastic_jax.budgets import ZONE, Budgets, accept
from elastic_jax.config import ModelConfig
from elastic_jax.model import param_specs
from elastic_jax.router import (
    Router,
    budget_input,
    chosen_counts,
    health,
    probabilities,
    schedule,
)


@dataclass(frozen=True)
class Elastic:
    """What elastic training is about: parent, router and budgets.

    Attributes:
      cfg: the parent.
      teacher: its frozen parameters, in the same order as the student's.
      router, budgets: the router and its ordered budgets, the full model first.
      seed: of budget draws and Gumbel noise.
      chunk: tokens whose logits exist at one time.
      cache_specs: needed by memory budgets.
      depth_ranks: blocks best first, needed where `layers` is elastic.
      hard_probability: share of micro-batches that see a straight-through hard
        sample instead of the soft masks.
      dead_zone: how far a cost may miss its target without a loss. Half of the zone
        in which counts are accepted: a mixture of counts may rest at the edge of a
        zone while the most probable ones lie outside. With the whole zone, as in
        arXiv 2511.16664, 6 of 32 routers of a toy missed it; with half, 1.
      mesh: devices, where there are several.
    """

    cfg: ModelConfig
    teacher: Any
    router: Router
    budgets: Budgets
    seed: int = 0
    chunk: int = 512
    cache_specs: Any = None
    depth_ranks: Sequence[int] | None = None
    hard_probability: float = 0.0
    dead_zone: float = ZONE / 2
    mesh: Any = None

    def __post_init__(self):
        if self.depth_ranks is not None:  # hashable, whatever was given
            ranks = tuple(int(block) for block in self.depth_ranks)
            object.__setattr__(self, "depth_ranks", ranks)

    @functools.cached_property
    def specs(self) -> ParamSpecs:
        return param_specs(self.cfg)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.budgets)

    @property
    def costing(self) -> dict[str, Any]:
        """The arguments by which a cost is taken."""
        return {"specs": self.specs, "cfg": self.cfg, "cache_specs": self.cache_specs}


def router_health(
    elastic: Elastic, router_params: Any, step: int, total_steps: int
) -> dict[str, float]:
    """Probabilities, entropies, counts and cost over target of every budget.

    `certainty` is the largest probability on any axis of a budget below full.
    """
    scale, temperature = schedule(step, total_steps)
    metrics, certainty = {}, 0.0
    for i, (name, budget) in enumerate(elastic.budgets):
        logits = _logits(elastic, router_params, i)
        pi = probabilities(logits, scale, temperature)
        metrics |= health(
            name,
            budget,
            logits,
            pi,
            elastic.router.elastic,
            depth_ranks=elastic.depth_ranks,
            **elastic.costing,
        )
        if i:
            certainty = max([certainty, *(float(jnp.max(p)) for p in pi.values())])
    return metrics | {"certainty": certainty}


def settled_counts(elastic: Elastic, router_params: Any) -> dict[str, Counts]:
    """The counts of every budget, by argmax without noise.

    Raises:
      ValueError: they are not acceptable; see `budgets.accept`.
    """
    router = elastic.router
    counts = {
        name: chosen_counts(
            _logits(elastic, router_params, i),
            router.elastic,
            elastic.cfg,
            depth_ranks=elastic.depth_ranks,
        )
        for i, name in enumerate(elastic.names)
    }
    accept(
        counts,
        elastic.budgets,
        elastic=router.elastic,
        depth_ranks=elastic.depth_ranks,
        **elastic.costing,
    )
    return counts


def _logits(elastic: Elastic, router_params, index: int):
    budget = budget_input(index, len(elastic.budgets))
    return elastic.router.apply(router_params, budget)
