"""Stages refuse what cannot run; budgets are drawn exactly as often as weighted."""

import dataclasses
import math

import numpy as np
import pytest

from elastic_jax.curriculum import Stage, check_stages, sample_budgets, sample_pairs

STAGE = Stage(
    name="short", context=64, batch=32, micro_batch=8, learning_rate=1e-3, steps=10
)


def test_a_length_in_tokens_is_rounded_up_to_steps():
    stage = dataclasses.replace(STAGE, steps=None, tokens=64 * 32 * 3 + 1)
    assert stage.total_steps == 4
    assert STAGE.total_steps == 10
    assert STAGE.micro_batches == 4


def test_all_problems_of_a_stage_come_together():
    wrong = {
        "context": 0,
        "batch": 30,
        "tokens": 5,
        "sampling": (0.5, -0.1),
        "learning_rate": float("nan"),
        "router_learning_rate": 0.0,
        "warmup_steps": -1,
        "final_learning_rate": 2.0,
        "router": "thawed",
        "budget_loss_weight": -1.0,
        "mixed_prefixes": 1.5,
    }
    with pytest.raises(ValueError, match="invalid Stage 'short'") as caught:
        dataclasses.replace(STAGE, **wrong)
    text = str(caught.value)
    for name in set(wrong) - {"batch"}:  # an impossible context hides the division
        assert name in text
    assert "exactly one of steps and tokens" in text


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"steps": None}, "exactly one"),
        ({"batch": 30}, "batch 30: not a multiple of micro_batch 8"),
        ({"batch": True}, "batch: expected a positive int"),
        ({"steps": 2.0}, "steps: expected a positive int"),
        ({"warmup_steps": 11}, "of only 10 steps"),
        ({"sampling": (0.0, 0.0)}, "at least one"),
        ({"sampling": [1, 1]}, "expected a tuple"),
        ({"sampling": ("a",)}, "expected a tuple"),
        ({"name": ""}, "name"),
        ({"mixed_prefixes": float("nan")}, "mixed_prefixes: expected a share in 0..1"),
        ({"mixed_prefixes": True}, "mixed_prefixes: expected a share in 0..1"),
        ({"mixed_prefixes": 0.5}, "mixed_prefixes 0.5: .* use router='frozen'"),
    ],
)
def test_each_problem_is_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(STAGE, **wrong)


def test_weights_are_normalised_and_counted():
    stage = dataclasses.replace(STAGE, sampling=(5, 3, 2))
    assert stage.budget_weights(3) == (0.5, 0.3, 0.2)
    assert STAGE.budget_weights(4) == (0.25,) * 4
    with pytest.raises(ValueError, match="3 weights for 2 budgets"):
        stage.budget_weights(2)


def test_all_problems_of_a_run_come_together():
    frozen = dataclasses.replace(STAGE, router="frozen", sampling=(1.0, 1.0))
    check_stages([STAGE, dataclasses.replace(frozen, name="long")], 2)
    with pytest.raises(ValueError) as caught:
        check_stages([frozen, STAGE], 3)
    for said in ("called 'short'", "2 weights for 3 budgets", "froze"):
        assert said in str(caught.value)
    mixed = dataclasses.replace(frozen, sampling=(1.0, 0.0), mixed_prefixes=0.5)
    with pytest.raises(ValueError, match="'short': mixed_prefixes 0.5 needs two budg"):
        check_stages([mixed], 2)
    with pytest.raises(ValueError, match="'short': mixed_prefixes 0.5 needs two budg"):
        check_stages([dataclasses.replace(mixed, sampling=None)], 1)
    with pytest.raises(ValueError, match="no stage"):
        check_stages([], 3)


@pytest.mark.parametrize(
    "weights, n",
    [((1, 1, 1), 4), ((0.5, 0.3, 0.2), 1), ((0.5, 0.3, 0.2), 7), ((0.0, 0.9, 0.1), 5)],
)
def test_draws_are_stratified_and_exact_in_expectation(weights, n):
    expected = np.array(weights) / np.sum(weights) * n
    steps = 4000
    drawn = np.stack([sample_budgets(3, step, weights, n) for step in range(steps)])
    assert drawn.dtype == np.int32
    counts = (drawn[:, :, None] == np.arange(len(weights))).sum(1)
    assert (counts >= np.floor(expected)).all() and (counts <= np.ceil(expected)).all()
    # A count is its floor or one more: its deviation is at most 1/2.
    assert np.abs(counts.mean(0) - expected).max() < 4 * 0.5 / steps**0.5
    # Every position of the step sees every budget at its weight.
    places = (drawn[:, :, None] == np.arange(len(weights))).mean(0)
    assert np.abs(places - expected / n).max() < 5 * 0.5 / steps**0.5


def test_whole_counts_leave_nothing_to_chance():
    for step in range(200):
        drawn = sample_budgets(0, step, (0.5, 0.3, 0.2), 10)
        assert np.bincount(drawn, minlength=3).tolist() == [5, 3, 2]


def test_draws_depend_on_seed_and_step_alone():
    def draws(seed):
        return [sample_budgets(seed, step, (1, 1), 8).tolist() for step in range(20)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert len({tuple(row) for row in draws(1)}) > 10


@pytest.mark.parametrize("weights", [(0, 0), (-1, 2), (float("inf"), 1), ()])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="sampling weights"):
        sample_budgets(0, 0, weights, 4)


def mixing(share, sampling=None, micro_batch=8):
    return dataclasses.replace(
        STAGE,
        router="frozen",
        mixed_prefixes=share,
        sampling=sampling,
        micro_batch=micro_batch,
    )


def pairs(stage, budgets, steps, seed=3):
    return np.stack([sample_pairs(seed, step, stage, budgets) for step in range(steps)])


def test_without_mixing_a_pair_is_a_budget_twice():
    stage = mixing(0.0, (5.0, 3.0, 2.0))
    drawn = pairs(stage, 3, 30)
    for step in range(30):
        alone = sample_budgets(3, step, (5, 3, 2), 4)
        np.testing.assert_array_equal(drawn[step], np.stack([alone, alone], 1))


@pytest.mark.parametrize("micro_batch", [8, 16, 32])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("sampling", [(5.0, 3.0, 2.0), (1.0, 1.0), (3.0, 0.0, 1.0)])
def test_prefixes_are_mixed_as_often_as_asked(share, sampling, micro_batch):
    """The answer's budget keeps the weights; the prefix is drawn among the others."""
    stage, budgets, steps = mixing(share, sampling, micro_batch), len(sampling), 3000
    weights, n = stage.budget_weights(budgets), stage.micro_batches
    drawn = pairs(stage, budgets, steps)
    assert drawn.dtype == np.int32 and drawn.shape == (steps, n, 2)
    mixed = (drawn[..., 0] != drawn[..., 1]).sum(1)
    assert set(mixed) <= {math.floor(share * n), math.ceil(share * n)}
    for first in range(budgets):
        for second in range(budgets):
            found = (drawn == (first, second)).all(-1)
            if first == second:
                expected = (1 - share) * weights[first]
            else:
                expected = weights[second] and (
                    share * weights[second] * weights[first] / (1 - weights[second])
                )
            counts, most = found.sum(1), math.ceil(expected * n - 1e-9)
            assert set(counts) <= {math.floor(expected * n + 1e-9), most}
            assert abs(found.mean() - expected) < 4 * 0.5 / steps**0.5


def test_pairs_depend_on_seed_and_step_alone():
    stage = mixing(0.5)
    np.testing.assert_array_equal(pairs(stage, 3, 20), pairs(stage, 3, 20))
    assert (pairs(stage, 3, 20) != pairs(stage, 3, 20, seed=4)).any()
    assert len({each.tobytes() for each in pairs(stage, 3, 20)}) > 10
