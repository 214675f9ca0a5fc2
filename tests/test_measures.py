"""Measures know their direction, their bounds and what is within chance."""

import math

import pytest

from elastic_jax.measures import BITS_PER_BYTE, DIVERGENCE, EXACT_ANSWERS, MEASURES

ALL = (EXACT_ANSWERS, BITS_PER_BYTE, DIVERGENCE)


@pytest.mark.parametrize("measure", ALL, ids=lambda m: m.name)
def test_gain_is_positive_where_ours_is_better(measure):
    better, worse = (0.9, 0.4) if measure.higher_is_better else (0.4, 0.9)
    assert measure.gain(better, worse) > 0 > measure.gain(worse, better)
    assert measure.gain(better, better) == 0
    assert measure.gain(better, measure.worst) > 0
    assert measure.worst in (measure.low, measure.high)


@pytest.mark.parametrize("measure", ALL, ids=lambda m: m.name)
def test_equal_values_are_within_chance(measure):
    for value in (0.0, 0.5, 1.0):
        assert measure.chance(value, [value, value], {"problems": 100}) >= 0
        if value or measure is not BITS_PER_BYTE:
            assert measure.margin(value, value).startswith("0")


def test_answers_need_the_number_of_problems():
    """Two standard errors of a difference: 4 times the problems halve it."""
    few = EXACT_ANSWERS.chance(0.8, [0.8], {"problems": 100})
    assert few == pytest.approx(2 * math.sqrt(0.8 * 0.2 * 2 / 100))
    many = EXACT_ANSWERS.chance(0.8, [0.8], {"problems": 400})
    assert few == pytest.approx(2 * many)
    assert EXACT_ANSWERS.chance(0.8, [0.8], {}) == math.inf
    assert "unknown" in EXACT_ANSWERS.rule({})


def test_they_say_how_they_were_measured():
    said = EXACT_ANSWERS.method({"problems": 512, "min_steps": 2, "max_steps": 8})
    assert said == "Answers are generated to 512 problems of 2 to 8 steps"
    said = BITS_PER_BYTE.method({"rows": 256, "size_bytes": 2048.0})
    assert "2.0 KiB in 256 rows" in said
    assert EXACT_ANSWERS.method({}) and BITS_PER_BYTE.method({})


def test_results_name_them():
    assert MEASURES == {m.name: m for m in (EXACT_ANSWERS, BITS_PER_BYTE)}
