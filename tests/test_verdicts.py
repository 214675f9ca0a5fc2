"""Estimates against arithmetic by hand, and verdicts at the edges of intervals."""

import random
import statistics

import pytest

from elastic_jax import fronts, verdicts
from elastic_jax.verdicts import Estimate, Finding


def row(arm, seed, marks, budget="small"):
    return {
        "arm": arm,
        "seed": seed,
        "evaluation": {"problems": len(marks), "min_steps": 2, "max_steps": 4},
        "found": {"budgets": {budget: {"right": marks}}},
    }


@pytest.mark.parametrize(
    "value, half, asked, least, verdict",
    [
        (0.25, 0.04, 0.20, True, "shown"),
        (0.75, 0.25, 0.50, True, "shown"),  # the interval touches what was asked
        (0.21, 0.04, 0.20, True, "not decided"),
        (0.19, 0.04, 0.20, True, "not decided"),
        (0.15, 0.04, 0.20, True, "refuted"),
        (0.90, 0.02, 0.93, False, "shown"),
        (0.94, 0.02, 0.93, False, "not decided"),
        (0.98, 0.02, 0.93, False, "refuted"),
        (0.98, None, 0.20, True, "not decided"),  # of one seed
        (0.98, 0.0, None, True, "measured only"),
        (16.0, 0.0, 16, True, "shown"),
        (15.0, 0.0, 16, True, "refuted"),
    ],
)
def test_a_verdict_needs_the_whole_interval(value, half, asked, least, verdict):
    assert Finding("x", Estimate(value, half), asked, least).verdict == verdict


@pytest.mark.parametrize(
    "value, half, asked, least, unit, said",
    [
        (0.25, 0.04, 0.20, True, "points", "is over it"),
        (0.15, 0.04, 0.20, True, "points", "is under it"),
        (0.21, 0.04, 0.20, True, "points", "is near it"),
        (0.90, 0.02, 0.93, False, "percent", "is under it"),
        (0.98, 0.02, 0.93, False, "percent", "is over it"),
        (0.93, 0.0, 0.93, False, "percent", "is under it"),  # what was asked holds
        (0.93, 0.0, 0.93, True, "percent", "is over it"),
        (0.1, 0.04, None, True, "points", "is over it"),  # of no difference
        (-0.1, 0.04, None, True, "points", "is under it"),
        (0.1, 0.2, None, True, "points", "is near it"),
        (0.0, 0.0, None, True, "points", "is near it"),
        (0.5, 0.0, None, True, "ratio", "is under it"),  # of as much
        (-0.1, None, None, True, "points", "is near it"),  # of one seed
    ],
)
def test_numbers_choose_the_words_of_a_lesson(value, half, asked, least, unit, said):
    lesson = "[is over|is under|is near] it"
    found = Finding("x", Estimate(value, half), asked, least, unit, lesson)
    assert found.meaning == said


def test_without_rows_nothing_is_decided():
    found = Finding("x", None, 0.2)
    assert found.verdict == "not decided" and found.said == "no rows"


def test_problems_are_told_apart_by_their_steps():
    rows = [row("a", 1, "110100"), row("a", 0, "000111"), row("b", 0, "111111")]
    assert verdicts.right(rows, "a", "small") == {
        0: [0, 0, 0, 1, 1, 1],
        1: [1, 1, 0, 1, 0, 0],
    }
    # Steps go 2, 3, 4, 2, 3, 4.
    two = verdicts.right(rows, "a", "small", lambda n: n == 2)
    assert two == {0: [0, 1], 1: [1, 1]}
    more = verdicts.right(rows, "a", "small", lambda n: n > 2)
    assert more == {0: [0, 0, 1, 1], 1: [1, 0, 0, 0]}
    assert verdicts.right(rows, "a", "full") is None
    assert verdicts.right(rows, "c", "small") is None


def test_differences_are_paired_by_seed_and_problem():
    ours, once = {0: [1.0, 1, 0, 1], 1: [1.0, 0, 0, 1]}, {0: [1.0, 0, 0, 1]}
    found = verdicts.difference(ours, once | {1: ours[1]})
    apart = [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert found.value == statistics.fmean([1 / 4, 0])
    assert found.half == fronts.interval(apart)
    assert verdicts.difference(ours, None) is None
    # Alike on every problem: chance is what as many problems cannot exclude.
    same = verdicts.difference(ours, ours)
    assert (same.value, same.half) == (0.0, 3 / 4)
    # Seeds that one of them lacks, as while a claim still runs, do not count.
    assert verdicts.difference(ours, once) == Estimate(0.25, None)
    assert verdicts.difference(ours, {2: [1.0] * 4}) is None


def test_one_seed_states_no_chance():
    assert verdicts.accuracy({0: [1.0, 0.0]}) == Estimate(0.5, None)
    assert verdicts.of_seeds([0.5]).half is None
    assert verdicts.of_seeds([]) is None


def test_a_ratio_and_a_closed_gap_cover_what_is_true():
    """95% intervals of drawn problems hold the share that they were drawn with."""
    draw, covered, closed = random.Random(0), 0, 0
    for _ in range(100):
        seeds = range(4)
        high, ours, low = (
            {s: [float(draw.random() < p) for _ in range(200)] for s in seeds}
            for p in (0.9, 0.8, 0.5)
        )
        found = verdicts.ratio(ours, high)
        covered += abs(found.value - 8 / 9) <= found.half
        gap = verdicts.closed(ours, low, high)
        closed += abs(gap.value - 0.75) <= gap.half
    assert covered >= 90 and closed >= 90
    assert verdicts.ratio({0: [1.0]}, {0: [0.0]}) is None


def test_estimates_are_written_with_their_unit():
    assert verdicts.written(Estimate(0.2, 0.031), "points") == "+20.0 points ± 3.1"
    assert verdicts.written(Estimate(0.9, None), "percent") == "90.0%"
    assert verdicts.written(Estimate(0.36, 0.0), "ratio") == "0.360"
    assert Finding("x", None, 0.93, False, "percent").wanted == "at most 93.0%"
