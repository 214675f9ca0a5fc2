"""What a training run is made of: stages, and which budgets each micro-batch trains.

A stage is a frozen value without code, so a run can be checked whole before it
starts and compared with the one that a checkpoint was saved by. Budgets are drawn
per micro-batch, stratified over a step: every step sees each budget about as often
as its weight says, which costs nothing and leaves the gradient less noisy than
independent draws do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUTER_MODES = ("train", "frozen")


@dataclass(frozen=True)
class Stage:
    """One stretch of training with fixed shapes, rates and sampling.

    Attributes:
      name: how logs, metrics and checkpoints call it.
      context: tokens per row.
      batch, micro_batch: rows per optimiser step, and per gradient accumulated
        into it.
      learning_rate: peak rate of the weights.
      steps, tokens: the length, given as exactly one of the two; `tokens` is
        rounded up to whole steps.
      sampling: weight of each budget, largest budget first; None is uniform.
      router_learning_rate: peak rate of the router.
      warmup_steps: linear warm-up of both rates, followed by a cosine.
      final_learning_rate: where the cosine ends, as a fraction of the peak.
      router: `"train"` learns the counts through soft masks; `"frozen"` trains the
        sliced models at counts that are settled.
      budget_loss_weight: factor on the budget loss (lambda). Published runs of
        thousands of steps use 1; with 10 a few hundred are enough.
      mixed_prefixes: the share of micro-batches whose prefix, a prompt and a thought,
        runs in one budget and whose answer in another; needs a frozen router.

    Raises:
      ValueError: with every problem of the stage at once.
    """

    name: str
    context: int
    batch: int
    micro_batch: int
    learning_rate: float
    steps: int | None = None
    tokens: int | None = None
    sampling: tuple[float, ...] | None = None
    router_learning_rate: float = 1e-2
    warmup_steps: int = 0
    final_learning_rate: float = 0.1
    router: str = "train"
    budget_loss_weight: float = 10.0
    mixed_prefixes: float = 0.0

    def __post_init__(self):
        problems = list(_problems(self))
        if problems:
            head = f"invalid Stage {self.name!r}:\n  "
            raise ValueError(head + "\n  ".join(problems))

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the stage."""
        if self.steps is not None:
            return self.steps
        return -(-self.tokens // (self.context * self.batch))

    @property
    def micro_batches(self) -> int:
        """Gradients accumulated per optimiser step."""
        return self.batch // self.micro_batch

    def budget_weights(self, budgets: int) -> tuple[float, ...]:
        """The probability of each of `budgets` budgets; they sum to one."""
        sampling = (1.0,) * budgets if self.sampling is None else self.sampling
        if len(sampling) != budgets:
            raise ValueError(
                f"stage {self.name!r}: sampling has {len(sampling)} weights for "
                f"{budgets} budgets; give one per budget, largest first, or None"
            )
        if self.mixed_prefixes and sum(weight > 0 for weight in sampling) < 2:
            raise ValueError(
                f"stage {self.name!r}: mixed_prefixes {self.mixed_prefixes} needs two "
                f"budgets with a weight, sampling is {sampling}; add one, or set "
                "mixed_prefixes to 0"
            )
        total = math.fsum(sampling)
        return tuple(weight / total for weight in sampling)


def check_stages(stages: Sequence[Stage], budgets: int) -> None:
    """Raises one ValueError with everything that keeps `stages` from being one run."""
    problems = [] if stages else ["there is no stage"]
    names = [stage.name for stage in stages]
    repeated = sorted({name for name in names if names.count(name) > 1})
    problems += [f"two stages are called {name!r}" for name in repeated]
    for stage in stages:
        try:
            stage.budget_weights(budgets)
        except ValueError as error:
            problems.append(str(error))
    for before, after in zip(stages, stages[1:], strict=False):
        if (before.router, after.router) == ("frozen", "train"):
            problems.append(
                f"stage {after.name!r} trains the router that {before.name!r} froze; "
                "put the stages that train it first"
            )
    if problems:
        raise ValueError("invalid stages:\n  " + "\n  ".join(problems))


def sample_budgets(
    seed: int, step: int, weights: Sequence[float], micro_batches: int
) -> np.ndarray:
    """Which budget each micro-batch of a step trains: int32 [micro_batches].

    A function of `(seed, step)` alone, so a resumed run draws what the unbroken one
    would have. By systematic sampling a budget of weight w gets floor(w n) or
    ceil(w n) of the n micro-batches, w n on average; their order is shuffled.

    Raises:
      ValueError: weights that are negative, not finite or all zero.
    """
    weights = np.asarray(weights, np.float64)
    if not _are_weights(weights):
        raise ValueError(
            f"sampling weights {weights.tolist()}: expected finite numbers, none "
            "negative and at least one positive"
        )
    rng = np.random.default_rng([seed, step])
    # A comb of n teeth, one apart, is laid over intervals of length w n. Rounding
    # makes edges that are whole numbers on paper whole in fact.
    edges = np.cumsum(weights / weights.sum() * micro_batches).round(9)
    edges[-1] = micro_batches
    teeth = np.arange(micro_batches) + rng.random()
    drawn = np.searchsorted(edges, teeth, side="right")
    return rng.permutation(drawn).astype(np.int32)


def sample_pairs(seed: int, step: int, stage: Stage, budgets: int) -> np.ndarray:
    """Which budgets read prefix and answer of each micro-batch: int32 [n, 2].

    The answer's budget is drawn by the stage's weights. In the share `mixed_prefixes`
    of the micro-batches the prefix is another's, drawn by the weights of the others;
    in the rest it is the answer's own. All pairs share one draw of `sample_budgets`:
    a function of `(seed, step)` alone, in which the mixed micro-batches, and those of
    each pair, differ from their share of the n by less than one.

    Raises:
      ValueError: as of `Stage.budget_weights`.
    """
    weights, share = stage.budget_weights(budgets), stage.mixed_prefixes
    own = [(i, i) for i in range(budgets)]
    mixed = [(i, j) for j in range(budgets) for i in range(budgets) if i != j]
    shares = [(1 - share) * weight for weight in weights]
    for i, j in mixed:
        others = math.fsum(weights[:j] + weights[j + 1 :]) or 1.0
        shares.append(share * weights[j] * weights[i] / others)
    drawn = sample_budgets(seed, step, shares, stage.micro_batches)
    return np.array(own + mixed, np.int32)[drawn]


def _are_weights(weights: np.ndarray) -> bool:
    if weights.ndim != 1 or not np.isfinite(weights).all():
        return False
    return bool((weights >= 0).all() and weights.sum() > 0)


def _problems(stage: Stage):
    """Yields every reason why `stage` cannot be run."""
    if not isinstance(stage.name, str) or not stage.name:
        yield f"name: expected a word, got {stage.name!r}"

    sizes = ("context", "batch", "micro_batch")
    counts = {name: getattr(stage, name) for name in sizes}
    lengths = {"steps": stage.steps, "tokens": stage.tokens}
    counts |= {name: n for name, n in lengths.items() if n is not None}
    for name, n in counts.items():
        if not _is_int(n) or n < 1:
            yield f"{name}: expected a positive int, got {n!r}"
    if len([n for n in lengths.values() if n is not None]) != 1:
        yield (
            f"give exactly one of steps and tokens, got steps={stage.steps!r} and "
            f"tokens={stage.tokens!r}"
        )
    sized = all(_is_int(n) and n > 0 for n in counts.values())
    if sized and stage.batch % stage.micro_batch:
        yield f"batch {stage.batch}: not a multiple of micro_batch {stage.micro_batch}"

    if not _is_int(stage.warmup_steps) or stage.warmup_steps < 0:
        yield f"warmup_steps: expected an int of at least 0, got {stage.warmup_steps!r}"
    elif sized and len(counts) == 4 and stage.warmup_steps > stage.total_steps:
        yield f"warmup_steps {stage.warmup_steps} of only {stage.total_steps} steps"

    for name in ("learning_rate", "router_learning_rate"):
        if not _is_number(getattr(stage, name)) or getattr(stage, name) <= 0:
            yield f"{name}: expected a positive number, got {getattr(stage, name)!r}"
    final, weight = stage.final_learning_rate, stage.budget_loss_weight
    if not _is_number(final) or not 0 <= final <= 1:
        yield f"final_learning_rate: expected a fraction in 0..1, got {final!r}"
    if not _is_number(weight) or weight < 0:
        yield f"budget_loss_weight: expected a number of at least 0, got {weight!r}"

    if stage.router not in ROUTER_MODES:
        yield f"router: expected one of {ROUTER_MODES}, got {stage.router!r}"
    share = stage.mixed_prefixes
    if not _is_number(share) or not 0 <= share <= 1:
        yield f"mixed_prefixes: expected a share in 0..1, got {share!r}"
    elif share and stage.router == "train":
        yield (
            f"mixed_prefixes {share}: budgets are mixed at settled counts; use "
            "router='frozen', in a stage behind the one that trains the router"
        )
    if stage.sampling is not None:
        numbers = isinstance(stage.sampling, tuple) and all(
            _is_number(weight) for weight in stage.sampling
        )
        if not numbers or not _are_weights(np.asarray(stage.sampling, np.float64)):
            yield (
                "sampling: expected a tuple of weights, none negative and at least one "
                f"positive, got {stage.sampling!r}"
            )


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and math.isfinite(value)
