"""From rows of results to verdicts: estimates, their chance, and what was asked.

A row is one arm under one seed. What it answered is a 0 or 1 per problem, the same
problems for all, so differences and ratios are taken problem by problem, and chance is
looked at as in `fronts`: between seeds and between problems, the larger one counts.
"""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_jax import fronts
from elastic_jax.tables import NONE

Row = Mapping[str, Any]
Right = Mapping[int, Sequence[float]]  # seed -> one number per problem

SHOWN, REFUTED, OPEN, ASIDE = "shown", "refuted", "not decided", "measured only"
OVER, UNDER, NEAR = range(3)  # of an estimate and what it is held against
EVEN = {"ratio": 1.0, "percent": 1.0}  # by unit: where nothing was asked; others 0


@dataclass(frozen=True)
class Estimate:
    """A number and its chance.

    Attributes:
      half: half of the 95% interval; None where chance is not known, 0 where there is
        none.
    """

    value: float
    half: float | None

    def __neg__(self) -> "Estimate":
        return Estimate(-self.value, self.half)


@dataclass(frozen=True)
class Finding:
    """One statement about a claim, and what was asked of it.

    Attributes:
      what: is measured.
      found: None where rows for it are missing.
      asked: the threshold, or None: reported only.
      least: whether `asked` is the least or the most that is accepted.
      unit: "points", "percent", "ratio", "count" or "nats".
      lesson: what it means, with words for `OVER|UNDER|NEAR` in brackets.
    """

    what: str
    found: Estimate | None
    asked: float | None = None
    least: bool = True
    unit: str = "points"
    lesson: str = ""

    @property
    def verdict(self) -> str:
        """Shown or refuted only where the whole interval says so."""
        if self.found is None or self.asked is None:
            return OPEN if self.found is None else ASIDE
        wanted = OVER if self.least else UNDER
        return {wanted: SHOWN, NEAR: OPEN}.get(self.side, REFUTED)

    @property
    def side(self) -> int:
        """Where the whole interval lies: of what was asked, or of no difference."""
        if self.found is None or self.found.half is None:
            return NEAR
        over, under = (OVER, UNDER) if self.least else (UNDER, OVER)
        line = EVEN.get(self.unit, 0.0) if self.asked is None else self.asked
        margin = (self.found.value - line) * (1 if self.least else -1)
        if margin >= self.found.half and (self.asked is not None or margin):
            return over
        return under if margin < -self.found.half else NEAR

    @property
    def meaning(self) -> str:
        """The lesson, in the words for its side."""
        chosen = lambda words: words[1].split("|")[self.side]
        return re.sub(r"\[(.*?)\]", chosen, self.lesson)

    @property
    def said(self) -> str:
        """The estimate in words."""
        if self.found is None:
            return "no rows"
        return written(self.found, self.unit)

    @property
    def wanted(self) -> str:
        if self.asked is None:
            return NONE
        word = "at least" if self.least else "at most"
        return f"{word} {FORMS[self.unit](self.asked)}"


FORMS: dict[str, Callable[[float], str]] = {
    "points": lambda x: f"{100 * x:+.1f} points",
    "percent": lambda x: f"{x:.1%}",
    "ratio": lambda x: f"{x:.3f}",
    "count": lambda x: f"{x:,.0f}",
    "nats": lambda x: f"{x:.4f}",
    "GiB": lambda x: f"{x:.2f} GiB",
}


def written(found: Estimate, unit: str) -> str:
    """An estimate with half of its interval."""
    text = FORMS[unit](found.value)
    if not found.half:
        return text
    half = 100 * found.half if unit in ("points", "percent") else found.half
    digits = {"points": 1, "percent": 1, "ratio": 3, "nats": 4}.get(unit, 0)
    return f"{text} ± {half:.{digits}f}"


# ------------------------------------------------------------------- rows to numbers


def right(
    rows: Sequence[Row],
    arm: str,
    budget: str,
    steps: Callable[[int], bool] | None = None,
) -> Right | None:
    """What an arm answered at a budget, by seed; None where it was not measured.

    Args:
      steps: of the problems that count; None are all.
    """
    found = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["arm"] == arm and budget in row["found"].get("budgets", {}):
            marks = [float(m) for m in row["found"]["budgets"][budget]["right"]]
            asked = row["evaluation"]
            span = asked["max_steps"] - asked["min_steps"] + 1
            if steps is not None:
                marks = [
                    mark
                    for i, mark in enumerate(marks)
                    if steps(asked["min_steps"] + i % span)
                ]
            found[row["seed"]] = marks
    return found or None


def accuracy(ours: Right | None) -> Estimate | None:
    """The share of right answers."""
    return None if ours is None else Estimate(mean(ours), _interval(ours))


def mean(values: Right) -> float:
    """Over problems and seeds."""
    return fronts.mean(list(values.values()))


def difference(ours: Right | None, theirs: Right | None) -> Estimate | None:
    """How much more is right, problem by problem."""
    apart = combined(lambda a, b: a - b, ours, theirs)
    return accuracy(apart)


def ratio(above: Right | None, below: Right | None) -> Estimate | None:
    """Mean over mean; chance by what each problem adds to it (the delta method)."""
    above = combined(lambda a, _: a, above, below)  # at the seeds of both
    below = combined(lambda _, b: b, above, below)
    if above is None or not mean(below):
        return None
    value = mean(above) / mean(below)
    half = _interval(combined(lambda a, b: a - value * b, above, below))
    return Estimate(value, None if half is None else half / abs(mean(below)))


def closed(ours: Right | None, low: Right | None, high: Right | None):
    """The share of the way from `low` to `high` that `ours` has gone."""
    return ratio(
        combined(lambda a, b: a - b, ours, low),
        combined(lambda a, b: a - b, high, low),
    )


def of_seeds(values: Sequence[float]) -> Estimate | None:
    """The mean of one number per seed."""
    if not values:
        return None
    return Estimate(statistics.fmean(values), fronts.spread(values))


def exactly(value: float | None) -> Estimate | None:
    """A number without chance."""
    return None if value is None else Estimate(value, 0.0)


def combined(join: Callable[..., float], *each: Right | None) -> Right | None:
    """Joins what every problem has, at the seeds that all of `each` have."""
    if any(values is None for values in each):
        return None
    seeds = [seed for seed in each[0] if all(seed in values for values in each)]
    joined = {
        seed: [join(*p) for p in zip(*(values[seed] for values in each), strict=True)]
        for seed in seeds
    }
    return joined or None


def _interval(values: Right) -> float | None:
    """Of one seed only, chance between seeds is not known, and so none is stated."""
    return fronts.interval(list(values.values())) if len(values) > 1 else None
