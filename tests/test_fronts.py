"""Fronts, rivals and intervals, against their definitions."""

import dataclasses
import math
import random

import pytest

from elastic_jax import fronts
from elastic_jax.fronts import OWN_CACHE, Point

PROBLEMS = 200


def point(accuracy, cost, *, pair="L->L", hand_over=OWN_CACHE, cap=9, seeds=2, phase=0):
    """A point whose problems are right in a fixed order, the same for every seed."""
    each = [
        float((i + phase) % PROBLEMS < accuracy * PROBLEMS) for i in range(PROBLEMS)
    ]
    return Point(
        stage="last",
        pair=pair,
        hand_over=hand_over,
        cap=cap,
        right=(tuple(each),) * seeds,
        seconds=(cost,) * seeds,
        latency=(cost,) * seeds,
        work=(cost,) * seeds,
        thought_tokens=cap,
        answer_tokens=4,
        capped=0.0,
    )


def test_the_front_is_what_nothing_beats():
    """Against the definition, over random clouds with ties."""
    rng = random.Random(0)
    for _ in range(50):
        cloud = [point(rng.randint(0, 8) / 8, rng.randint(1, 6)) for _ in range(12)]
        kept = fronts.front(cloud, "work")

        def beaten(p, cloud=cloud):
            return any(
                q.accuracy >= p.accuracy
                and q.cost("work") <= p.cost("work")
                and (q.accuracy > p.accuracy or q.cost("work") < p.cost("work"))
                for q in cloud
            )

        assert [p for p in cloud if not beaten(p)] == [p for p in cloud if p in kept]
        costs = [(p.cost("work"), p.accuracy) for p in kept]
        assert costs == sorted(costs)


def test_the_rival_is_the_best_alone_that_is_not_clearly_dearer():
    cheap, dear = point(0.6, 2), point(0.9, 5)
    mixed = point(0.8, 3, pair="S->L", hand_over="reprefill")
    better = point(0.95, 3, pair="S->L", hand_over="transplant")
    each = [cheap, dear, mixed, better]
    assert fronts.rival(mixed, each, "latency") is cheap
    assert fronts.rival(point(0.8, 5, pair="S->L"), each, "latency") is dear
    assert fronts.rival(point(0.8, 1), each, "latency") is None
    noisy = dataclasses.replace(dear, latency=(2.0, 5.0))  # 3.5 in the mean
    assert fronts.rival(mixed, [cheap, noisy], "latency") is noisy


def test_intervals_cover_the_larger_of_two_chances():
    """Between problems where seeds agree; between seeds where they do not."""
    same = point(0.5, 1, seeds=3).right
    within = 1.96 * math.sqrt(0.25 / (PROBLEMS - 1))
    assert fronts.interval(same) == pytest.approx(within)
    apart = [[1.0] * PROBLEMS, [0.5] * PROBLEMS, [0.0] * PROBLEMS]
    assert fronts.interval(apart) == pytest.approx(4.30 * 0.5 / math.sqrt(3))
    assert fronts.spread([1.0]) is None and fronts.spread([2.0, 2.0]) == 0


def test_a_difference_is_taken_problem_by_problem():
    """Two that are right on the same problems differ with less chance."""
    ours, theirs = point(0.6, 1), point(0.5, 1)
    strangers = point(0.5, 1, phase=100)
    found, half = fronts.gain(ours, theirs)
    assert found == pytest.approx(0.1)
    assert half < fronts.gain(ours, strangers)[1]
    assert fronts.gain(ours, ours) == (0, 3 / PROBLEMS)
