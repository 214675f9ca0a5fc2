"""Accuracy against cost: points of a sweep, their chance, and the front among them.

A point is a pair of budgets, one thinks and one answers, under a cap of the thought.
Two kinds of chance are looked at, and the larger one counts: between seeds of the
training, by Student's t, and between problems. A difference is taken problem by
problem: two models that fail on the same ones differ less by chance than two strangers.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]

OWN_CACHE = "own cache"  # the hand-over where one budget thinks and answers
COSTS = {  # of a point -> how sentences call it
    "latency": "measured latency",
    "work": "parameters x tokens",
}
# Two-sided 95% quantiles of Student's t by degrees of freedom; far out, the normal one.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
NORMAL = 1.96


@dataclass(frozen=True)
class Point:
    """One pair, hand-over and cap at the end of one stage, over all seeds.

    Attributes:
      pair: "L->L", "S->S", "S->L" or "L->S": who thinks and who answers.
      right: [seed][problem], 1.0 where the answer is exact.
      seconds: per problem and seed; () where they were not taken.
      latency, work: relative to L->L at the largest cap of the same seed; latency ()
        where it was not measured.
      thought_tokens, answer_tokens, capped: means over all seeds.
    """

    stage: str
    pair: str
    hand_over: str
    cap: int
    right: tuple[tuple[float, ...], ...]
    seconds: tuple[float, ...]
    latency: tuple[float, ...]
    work: tuple[float, ...]
    thought_tokens: float
    answer_tokens: float
    capped: float

    @property
    def accuracy(self) -> float:
        return mean(self.right)

    @property
    def name(self) -> str:
        """The pair, with the hand-over where there are several."""
        own = self.hand_over == OWN_CACHE
        return self.pair if own else f"{self.pair} ({self.hand_over})"

    def cost(self, kind: str) -> float:
        """The mean over seeds of a cost in `COSTS`."""
        return statistics.fmean(getattr(self, kind))


def points(results: Results) -> list[Point]:
    """The rows of all seeds put together, in the order of the first."""
    letters = {results["large"]: "L", results["small"]: "S"}
    found: dict[tuple, list[Mapping]] = {}
    for seed in results["seeds"].values():
        rows, largest = seed["rows"], max(row["cap"] for row in seed["rows"])
        base = {
            row["stage"]: row
            for row in rows
            if row["cap"] == largest
            and row["think"] == row["answer"] == results["large"]
        }
        for row in rows:
            pair = f"{letters[row['think']]}->{letters[row['answer']]}"
            key = row["stage"], pair, row["hand_over"], row["cap"]
            found.setdefault(key, []).append(row | {"base": base[row["stage"]]})
    return [Point(*key, **_joined(rows)) for key, rows in found.items()]


def _joined(rows):
    """What the seeds of one point measured."""
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    timed = len(seconds) == len(rows)
    means = ("thought_tokens", "answer_tokens", "capped")
    return {
        "right": tuple(tuple(map(float, row["right"])) for row in rows),
        "seconds": tuple(seconds) if timed else (),
        "latency": tuple(row["seconds"] / row["base"]["seconds"] for row in rows)
        if timed
        else (),
        "work": tuple(row["work"] / row["base"]["work"] for row in rows),
    } | {name: statistics.fmean(row[name] for row in rows) for name in means}


# ------------------------------------------------------------------------- statistics


def mean(values: Sequence[Sequence[float]]) -> float:
    """Of [seed][problem]."""
    return statistics.fmean(map(statistics.fmean, values))


def spread(values: Sequence[float]) -> float | None:
    """Half of the 95% interval of the mean of seeds; None of fewer than two."""
    if len(values) < 2:
        return None
    degrees = len(values) - 1
    t = STUDENT[degrees - 1] if degrees <= len(STUDENT) else NORMAL
    return t * statistics.stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[Sequence[float]]) -> float:
    """Half of the 95% interval of the mean of [seed][problem].

    The larger of two: between seeds, and between problems, whose values are averaged
    over the seeds first. Where all problems are alike it is 3 / problems, because what
    was seen in none of n may still happen in 3 of n.
    """
    by_problem = [statistics.fmean(each) for each in zip(*values, strict=True)]
    within = NORMAL * statistics.stdev(by_problem) / math.sqrt(len(by_problem))
    between = spread([statistics.fmean(seed) for seed in values]) or 0.0
    return max(within or 3 / len(by_problem), between)


def gain(ours: Point, theirs: Point) -> tuple[float, float]:
    """How much more accurate `ours` is, and half of the 95% interval."""
    apart = [
        [a - b for a, b in zip(*seeds, strict=True)]
        for seeds in zip(ours.right, theirs.right, strict=True)
    ]
    return mean(apart), interval(apart)


def front(each: Iterable[Point], kind: str) -> list[Point]:
    """Points that none beats: none is as cheap and better, or as good and cheaper.

    Cheapest first. Of equal points all stay.
    """
    each = list(each)
    kept = [point for point in each if not any(_beats(p, point, kind) for p in each)]
    return sorted(kept, key=lambda point: (point.cost(kind), point.accuracy))


def _beats(a: Point, b: Point, kind: str) -> bool:
    mine, theirs = ((-p.cost(kind), p.accuracy) for p in (a, b))
    return mine != theirs and all(x >= y for x, y in zip(mine, theirs, strict=True))


def rival(point: Point, each: Iterable[Point], kind: str) -> Point | None:
    """The best that one budget alone does without being clearly dearer, if any.

    Who costs a little more by chance still counts: a win over it is a win.
    """
    alone = (p for p in each if p.hand_over == OWN_CACHE)
    as_cheap = [p for p in alone if not _clearly_dearer(p, point, kind)]
    return max(as_cheap, key=lambda p: (p.accuracy, -p.cost(kind)), default=None)


def _clearly_dearer(a: Point, b: Point, kind: str) -> bool:
    """Whether `a` costs more, seed by seed, than chance between seeds explains."""
    costs = zip(getattr(a, kind), getattr(b, kind), strict=True)
    more = [x - y for x, y in costs]
    return statistics.fmean(more) > (spread(more) or 0.0)
