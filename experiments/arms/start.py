"""What the arms of a claim start from: a parent, its scores, and its permuted weights.

Parents are kept apart from the claims, under a name made of all that they depend on,
so that claims with the same parent train it once.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import elastic_jax as ej
from elastic_jax import objectives
from elastic_jax.curriculum import Stage
from elastic_jax.elastic import settled_counts
from elastic_jax.scores import Scores
from experiments import evaluation, parents, ranking, training
from experiments.arms.balance import balanced_objective
from experiments.settings import Plan
from experiments.workdir import Workdir

# All that a parent and its scores depend on.
OF_PARENT = (
    *("seed", "save_every", "log_every", "on_nonfinite", "data", "modulus"),
    *("code_values", "parent", "model", "parent_training", "calibration"),
)


class Start:
    """A plan with its folders, and the parent behind it, made when it is asked for.

    Args:
      balanced: the parent is trained with load balancing.

    Attributes:
      plan: the claim's.
      root: of all claims.
      workdir: of this claim, or of the one whose models it reads.
      asked: the group `claim` of the configuration.
      parent_seed: added to the plan's where the parent is trained.
    """

    def __init__(
        self,
        plan: Plan,
        root: pathlib.Path,
        claim: str,
        *,
        parent_seed: int = 0,
        balanced: bool = False,
    ):
        # Claims that share what they train have titles of their own.
        values = {k: v for k, v in plan.values.items() if k != "title"}
        self.plan = dataclasses.replace(plan, values=values)
        self.root, self.claim = root, claim
        self.asked: Mapping[str, Any] = plan.values["claim"]
        trained_in = self.asked.get("trained_in", claim)
        self.workdir = Workdir(root / "trained" / trained_in)
        self.specs = ej.param_specs(plan.cfg)
        self.parent_seed, self._balanced = parent_seed, balanced

    def of_seed(self, seed: int) -> "Start":
        """The same with a parent of another seed, where the claim asks for that."""
        if not self.asked["own_parents"]:
            return self
        other = self._other(parent_seed=seed)
        if "router" in vars(self):  # it met no parent
            vars(other)["router"] = self.router
        return other

    def of_pattern(self, pattern: str) -> "Start":
        """The same with a parent of other blocks."""
        plan = self.plan
        values = plan.values | {"model": plan.values["model"] | {"pattern": pattern}}
        cfg = dataclasses.replace(plan.cfg, pattern=pattern)
        changed = dataclasses.replace(plan, values=values, cfg=cfg)
        return self._other(changed)

    def balanced(self) -> "Start":
        """The same with a parent that was trained with load balancing."""
        return self._other(balanced=True)

    def _other(self, plan: Plan | None = None, **parent: Any) -> "Start":
        same = {"parent_seed": self.parent_seed, "balanced": self._balanced}
        return Start(plan or self.plan, self.root, self.claim, **(same | parent))

    @functools.cached_property
    def _made(self) -> tuple[Any, dict[str, Any], Scores, Any]:
        seeded, _ = training.of_seed(self.plan, self.parent_seed)
        values = {name: seeded.values[name] for name in OF_PARENT}
        named = json.dumps([values, self._balanced], sort_keys=True)
        digest = hashlib.sha256(named.encode()).hexdigest()[:8]
        plan = dataclasses.replace(self.plan, values=values)
        kind = "balanced-" if self._balanced else ""
        folder = f"{kind}{self.plan.cfg.pattern.replace('*', 'A')}-{digest}"
        workdir = Workdir(self.root / "parents" / folder)
        balanced = balanced_objective, objectives.language_objective
        with workdir.phase("parent", f"parent {folder}"):
            params, facts = parents.parent(
                plan,
                workdir,
                allow_changes=False,
                objective=balanced[not self._balanced],
            )
        with workdir.phase("scores", "importance"):
            found, depth = ranking.scores(plan, workdir, params)
        return params, facts, found, depth

    @property
    def params(self) -> Any:
        """The parent as it was trained."""
        return self._made[0]

    @property
    def scores(self) -> Scores:
        return self._made[2]

    @property
    def depth(self) -> Any:
        """Importance of every block, higher is better."""
        return self._made[3]

    @functools.cached_property
    def nested(self) -> Any:
        """The parent in importance order."""
        return self.ordered(ej.rank(self.scores))

    def ordered(self, ranks: Mapping[str, Any]) -> Any:
        """The parent in another order."""
        return ej.permute_params(self.params, self.specs, ranks)

    @functools.cached_property
    def router(self) -> tuple[Any, Any, dict[str, ej.Counts]]:
        """A router that met the budgets without any model: it, weights and counts."""
        elastic = training.elastic_parent(self.plan, None)
        steps = self.plan.values["router"]["fit_first"]
        learned = training.first_router(self.plan, elastic, steps)
        return elastic.router, learned, settled_counts(elastic, learned)

    @property
    def counts(self) -> dict[str, ej.Counts]:
        """What that router chose; the same for every seed."""
        return self.router[2]

    def train(
        self,
        arm: str,
        seed: int,
        *,
        counts: Mapping[str, ej.Counts] | None = None,
        stages: Sequence[Stage] | None = None,
        teacher: Any = None,
        begin: Any = None,
    ) -> tuple[Any, dict[str, ej.Counts]]:
        """Elastic training, or what is kept of it: weights and counts.

        Args:
          counts: None lets the router learn them.
          stages: None are the plan's.
          teacher: None is the nested parent.
          begin: the first weights; None are the teacher's.
        """
        plan, _ = training.of_seed(self.plan, seed)
        if stages is not None:
            plan = dataclasses.replace(plan, stages=tuple(stages))
        state, settled, _ = training.elastic_training(
            plan,
            self.workdir,
            f"{arm}-{seed}",
            self.nested if teacher is None else teacher,
            counts=counts,
            begin=begin,
        )
        return state.params, settled

    def judged(self, params: Any, counts: ej.Counts | None) -> dict[str, Any]:
        """A slice's answers, and what it costs."""
        small, cfg = evaluation.sliced(
            self.plan, params, counts or ej.counts(self.plan.cfg)
        )
        cost = ej.cost(self.specs, self.plan.cfg, counts=counts)
        found = self.plan.task.evaluate(small, cfg)
        return found | {
            "active_params": cost.active_params,
            "total_params": cost.total_params,
        }

    def each(self, params: Any, counts: Mapping[str, ej.Counts]) -> dict[str, Any]:
        """`judged` for every budget, with its counts."""
        return {
            name: self.judged(params, kept) | {"counts": dict(kept)}
            for name, kept in counts.items()
        }


def reweighted(stages: Sequence[Stage], sampling, share: float = 1.0) -> list[Stage]:
    """Stages with other weights of the budgets, and a share of their steps."""
    return [
        dataclasses.replace(
            stage,
            sampling=tuple(sampling),
            steps=max(1, round(share * stage.total_steps)),
            tokens=None,
            warmup_steps=min(
                stage.warmup_steps, max(1, round(share * stage.total_steps))
            ),
        )
        for stage in stages
    ]
