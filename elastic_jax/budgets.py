"""Which budgets are possible before a router learns, and which it has met after.

A run's budgets are an ordered tuple of (name, Budget), the full model first. A budget
is met by counts in its zone, within 5% of its target. Counts come from short lists, so
the zone may be empty: all combinations are costed at once, before any work, and a
router that misses is shown the counts it could have chosen.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from elastic_jax import nesting
from elastic_jax.axes import Counts
from elastic_jax.config import ElasticConfig, ModelConfig
from elastic_jax.cost import Budget, Cost, cost

Budgets = tuple[tuple[str, Budget], ...]

ZONE = 0.05  # share of the target by which a cost may miss it
LARGEST_SEARCH = 2**20  # combinations of counts


def relative_targets(
    budgets: Budgets, specs, cfg: ModelConfig, *, cache_specs=None
) -> tuple[float, ...]:
    """Every budget's target as a fraction of the full model.

    Raises:
      ValueError: budgets that are not one ordered set: the first is the full model,
        targets descend, and all measure the same thing.
    """
    problems = []
    names = [name for name, _ in budgets]
    if len(set(names)) < len(names):
        problems.append(f"two budgets share a name: {names}")
    measured = {
        (b.kind, b.precision, b.batch, b.length, b.latency, b.phase, b.new_tokens)
        for _, b in budgets
    }
    if len(measured) > 1:
        problems.append(
            "budgets must share kind, precision, batch, length and latency, got "
            + " and ".join(map(str, sorted(measured, key=str)))
        )
    if any(b.kind == "memory_bytes" for _, b in budgets) and cache_specs is None:
        problems.append("memory_bytes budgets need cache_specs")
    if any(b.kind == "latency_seconds" and b.latency is None for _, b in budgets):
        problems.append("latency_seconds budgets need a latency table")
    targets = ()
    if not problems:
        full = cost(specs, cfg)
        targets = tuple(
            b.target if b.relative else b.target / b.measure(full, cache_specs)
            for _, b in budgets
        )
        if not targets or targets[0] != 1:
            problems.append(f"the first must be the full model, 1.0; got {targets}")
        if list(targets) != sorted(set(targets), reverse=True):
            problems.append(f"targets must descend, got {targets} of the full model")
    if problems:
        raise ValueError("budgets do not fit:\n  " + "\n  ".join(problems))
    return targets


def feasible(
    elastic: ElasticConfig,
    specs,
    cfg: ModelConfig,
    budgets: Budgets,
    *,
    cache_specs=None,
    depth_ranks=None,
) -> tuple[ElasticConfig, tuple[str, ...]]:
    """What of `elastic` is worth offering, once every budget is known to be possible.

    An axis whose whole range moves the cost of no smaller budget by as much as its
    zone is left out and stays full: the loss could not steer it.

    Returns:
      the reduced configuration, and lines for the log.

    Raises:
      ValueError: budgets that no combination of choices, the same in all blocks,
        brings into the zone, with the three nearest combinations of each.
    """
    elastic.validate(cfg)
    targets = relative_targets(budgets, specs, cfg, cache_specs=cache_specs)
    given = (specs, cfg, budgets[0][1], cache_specs, depth_ranks)
    lines, offered = [], []
    for axis, options in elastic.choices:
        alone = ElasticConfig(((axis, options),))
        moved = 1 - _relative_costs(alone, np.array([[len(options) - 1]]), *given)[0]
        still = [
            (name, moved / target)
            for (name, _), target in zip(budgets[1:], targets[1:], strict=True)
            if moved / target < ZONE
        ]
        listed = ", ".join(f"{share:.1%} of {name}" for name, share in still)
        if still and len(still) == len(budgets) - 1:
            lines.append(f"{axis} stays full: its whole range moves only {listed}")
            continue
        offered.append((axis, options))
        if still:
            lines.append(f"{axis} is offered, though it moves only {listed}")
    reduced = ElasticConfig(
        tuple(offered), tuple(a for a in elastic.per_layer if a in dict(offered))
    )

    rows = _combinations(reduced)
    spent = _relative_costs(reduced, rows, *given)
    smaller = rows.any(axis=1)  # the full model belongs to the first budget
    problems = []
    for (name, _), target in list(zip(budgets, targets, strict=True))[1:]:
        off = np.abs(spent / target - 1)
        inside = np.sum((off <= ZONE) & smaller)
        if inside:
            lines.append(f"{name}: {inside} of {len(rows)} combinations in its zone")
            continue
        nearest = np.argsort(np.where(smaller, off, np.inf), kind="stable")[:3]
        listed = "; ".join(
            f"{_named(reduced, rows[i])} at {spent[i] / target:.3f} of target"
            for i in nearest
        )
        problems.append(
            f"{name}: none of {len(rows)} combinations searched is within 5% of its "
            f"target, {target:.4g} of the full model; nearest: {listed}"
        )
    if problems:
        problems.append("move the target, or offer other counts or axes")
        raise ValueError("impossible budgets:\n  " + "\n  ".join(problems))
    return reduced, tuple(lines)


def accept(
    counts_by_budget: Mapping[str, Counts],
    budgets: Budgets,
    specs,
    cfg: ModelConfig,
    elastic: ElasticConfig,
    *,
    cache_specs=None,
    depth_ranks=None,
) -> None:
    """Whether the counts that a router settled on are what was asked for.

    Raises:
      ValueError: a budget outside its zone, two equal budgets, or a full budget that
        is not full, with the counts in the zone that are nearest to those chosen.
    """
    targets = relative_targets(budgets, specs, cfg, cache_specs=cache_specs)
    rows = _combinations(elastic)
    spent = _relative_costs(
        elastic, rows, specs, cfg, budgets[0][1], cache_specs, depth_ranks
    )
    problems, seen = [], {}
    for (name, budget), target in zip(budgets, targets, strict=True):
        counts = counts_by_budget[name]
        sizes = nesting.resolved(cfg, counts)
        ratio = budget.ratio(specs, cache_specs, cfg, counts=counts)
        twins = [other for other, their in seen.items() if their == sizes]
        seen[name] = sizes
        if target == 1:
            if sizes != nesting.resolved(cfg):
                problems.append(f"{name} is not the full model: {counts}")
            continue
        wrong = []
        if abs(ratio - 1) > ZONE:
            wrong.append(f"costs {ratio:.3f} of its target, {target:.4g} of the full")
        wrong += [f"equals {other}" for other in twins]
        if wrong:
            inside = (np.abs(spent / target - 1) <= ZONE) & rows.any(axis=1)
            near = rows[inside][np.argsort(_distances(elastic, rows[inside], sizes))]
            listed = "; ".join(_named(elastic, row) for row in near[:3])
            problems.append(
                f"{name} {' and '.join(wrong)} with {counts}; nearest counts in its "
                f"zone: {listed or 'none'}"
            )
    if problems:
        problems.append("train the router longer or raise budget_loss_weight")
        raise ValueError("the router missed its budgets:\n  " + "\n  ".join(problems))


def not_nested(counts_by_budget: Mapping[str, Counts], cfg: ModelConfig) -> list[str]:
    """Lines for the log: budgets that are not nested in the next larger one.

    Each is a prefix of the parent all the same.

    Args:
      counts_by_budget: in descending order of cost.
    """
    return [
        f"{small} is not nested in {large}"
        for large, small in itertools.pairwise(counts_by_budget)
        if not nesting.nested(cfg, counts_by_budget[small], counts_by_budget[large])
    ]


def depth_choices(depth_ranks, options: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The `layers` counts of every option: a 0 or 1 per block, the best n kept."""
    if depth_ranks is None:
        raise ValueError("`layers` is elastic: give depth_ranks, blocks best first")
    return tuple(nesting.keep_layers(depth_ranks, n) for n in options)


def _combinations(elastic: ElasticConfig) -> np.ndarray:
    """All combinations of choices as indices, [combinations, axes]; full comes first.

    Above `LARGEST_SEARCH` the longest lists of choices are thinned, ends kept, until
    the rest can be searched: neighbours in a long list cost nearly the same.
    """
    kept = [list(range(len(options))) for _, options in elastic.choices]
    while math.prod(map(len, kept)) > LARGEST_SEARCH:
        longest = max(kept, key=len)
        longest[:] = [*longest[:-1:2], longest[-1]]
    grid = np.meshgrid(*kept, indexing="ij")
    columns = [column.ravel() for column in grid]
    return np.stack(columns, axis=1) if columns else np.zeros((1, 0), int)


def _relative_costs(
    elastic: ElasticConfig,
    rows: np.ndarray,
    specs,
    cfg: ModelConfig,
    budget: Budget,
    cache_specs,
    depth_ranks,
) -> np.ndarray:
    """Cost of every combination in `rows`, as a fraction of the full model."""
    full = budget.measure(cost(specs, cfg), cache_specs)
    spent = []
    for start in range(0, len(rows), 2**16):
        part = rows[start : start + 2**16]
        # A cost is a sum of products of sizes: arrays of sizes give arrays of costs.
        sizes = dict(vars(cfg))
        for (axis, options), chosen in zip(elastic.choices, part.T, strict=True):
            if axis == "layers":
                kept = np.array(depth_choices(depth_ranks, options), float)
                sizes[axis] = tuple(kept[chosen].T)
            else:
                sizes[axis] = np.array(options, float)[chosen]
        value = budget.measure(Cost(specs, sizes, exact=False), cache_specs)
        spent.append(np.broadcast_to(np.asarray(value, float) / full, len(part)))
    return np.concatenate(spent)


def _distances(
    elastic: ElasticConfig, rows: np.ndarray, sizes: Mapping[str, tuple[int, ...]]
) -> np.ndarray:
    """How far each combination is from `sizes`, in shares of an axis."""
    total = np.zeros(len(rows))
    for (axis, options), chosen in zip(elastic.choices, rows.T, strict=True):
        size = sum(sizes[axis]) if axis == "layers" else np.mean(sizes[axis])
        total += np.abs(np.array(options)[chosen] - size) / options[0]
    return total


def _named(elastic: ElasticConfig, row: np.ndarray) -> str:
    """`embed=48 experts=4`: one combination, for people."""
    if not elastic.choices:
        return "the full model"
    pairs = zip(elastic.choices, row, strict=True)
    return " ".join(f"{axis}={options[i]}" for (axis, options), i in pairs)
