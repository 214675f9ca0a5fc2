"""The claim about two budgets, of which one thinks and one answers."""

import statistics
from collections.abc import Iterator

from elastic_jax import fronts
from elastic_jax.claims.claim import ASKED, BETTER, Cell, Rows, arms_of
from elastic_jax.tables import listed
from elastic_jax.verdicts import Finding, accuracy, difference, exactly, of_seeds

AS_GOOD = "[as good as|worse than|perhaps as good as]"  # where a loss is accepted


def control(rows: Rows) -> Iterator[Finding]:
    points = _points(rows)
    if not points:
        return
    largest = max(point.cap for point in points)
    ends = list(dict.fromkeys(point.stage for point in points))
    for stage in ends:
        for pair in ("S->L", "L->S"):
            both = [
                dict(enumerate(point.right))
                for how in ("transplant", "reprefill")
                for point in points
                if (point.stage, point.pair, point.hand_over, point.cap)
                == (stage, pair, how, largest)
            ]
            asked = ASKED["transplant under reading again"]
            decides = stage == ends[-1] and pair == "S->L"
            found = difference(*both) if len(both) == 2 else None
            yield Finding(
                f"{pair} by transplant minus by reading again, after `{stage}`",
                found,
                asked if decides else None,
                lesson=(
                    f"{pair} after `{stage}`: to go on from the other model's cache is "
                    f"{AS_GOOD if decides else BETTER} to read its thought again."
                ),
            )
    last = [point for point in points if point.stage == ends[-1]]
    for kind, called in fronts.COSTS.items():
        if not all(getattr(point, kind) for point in last):
            continue
        best = {point.name for point in fronts.front(last, kind)}
        on = [
            name for name in ("S->L (transplant)", "S->L (reprefill)") if name in best
        ]
        where = listed(on) if on else "nowhere"
        yield Finding(
            f"S->L on the front of {called}, by means: {where}",
            exactly(float(bool(on))),
            unit="count",
            lesson=(
                "A small thinker with a large answerer [is|is not|is not] among the "
                f"best choices by {called}."
            ),
        )


def _points(rows: Rows) -> list[fronts.Point]:
    """The sweep's points; a seed counts once all of its arms are there."""
    if not rows:
        return []
    found, arms = rows[0]["found"], set(arms_of(rows))
    seeds: dict = {}
    for row in rows:
        seeds.setdefault(str(row["seed"]), {"rows": [], "arms": set()})
        seeds[str(row["seed"])]["rows"] += row["found"]["rows"]
        seeds[str(row["seed"])]["arms"].add(row["arm"])
    whole = {seed: each for seed, each in seeds.items() if each["arms"] == arms}
    named = {"large": found["large"], "small": found["small"]}
    return fronts.points(named | {"seeds": whole})


def pairs(rows: Rows) -> Iterator[Cell]:
    """After the last stage at its place in latency; before, and costs, aside."""
    points = _points(rows)
    if not points:
        return
    stages = list(dict.fromkeys(point.stage for point in points))
    largest = max(point.cap for point in points)
    for point in points:
        found = accuracy(dict(enumerate(point.right)))
        group = f"at most {point.cap} tokens of thought"
        if point.stage != stages[-1]:
            yield Cell(f"{group}, after `{point.stage}`", point.name, found)
            continue
        at = statistics.fmean(point.latency) if point.latency else None
        yield Cell(group, point.name, found, at)
    for kind, called in fronts.COSTS.items():
        for point in points:
            costs = getattr(point, kind)
            if (point.stage, point.cap) == (stages[-1], largest) and costs:
                group = f"{called}, of L->L, at most {largest} tokens"
                yield Cell(group, point.name, of_seeds(costs))
