"""Sentences about pairs of budgets: nobody wins by what could be chance."""

import itertools

import pytest

from elastic_jax import control_findings, fronts
from elastic_jax.fronts import OWN_CACHE

PROBLEMS = 200


def row(think, answer, hand_over, cap, share, **changes):
    """A row as a sweep writes it."""
    right = round(share * PROBLEMS)
    cost = cap * {"full": 1.0, "small": 0.4}[think] + 1
    return {
        "stage": "last",
        "think": think,
        "answer": answer,
        "hand_over": hand_over,
        "cap": cap,
        "right": "1" * right + "0" * (PROBLEMS - right),
        "seconds": cost,
        "work": cost,
        "thought_tokens": cap,
        "answer_tokens": 4.0,
        "capped": 0.1,
    } | changes


def results(shares, *, seeds=3, stages=("last",), small="small"):
    """A sweep of two caps; `shares`: pair -> accuracy at the larger cap, or a function.

    At the smaller cap all have half of it.
    """

    def rows(seed):
        for stage, (pair, share), cap in itertools.product(
            stages, shares.items(), (4, 9)
        ):
            think, answer = ({"L": "full", "S": small}[c] for c in (pair[0], pair[3]))
            hand_over = pair[5:] or OWN_CACHE
            share = share(stage, seed) if callable(share) else share
            seconds = {} if stage == stages[-1] else {"seconds": None}
            share = share * (1 if cap == 9 else 0.5)
            yield row(think, answer, hand_over, cap, share, stage=stage, **seconds)

    active = {"full": 100, "small": 30}
    return {
        "large": "full",
        "small": "small",
        "stages": list(stages),
        "mixed": ["last"],
        "evaluation": {"problems": PROBLEMS, "min_steps": 2, "max_steps": 5},
        "repeats": 3,
        "seeds": {
            str(i): {"rows": list(rows(i)), "active_params": active}
            for i in range(seeds)
        },
    }


WINS = {
    "L->L": 0.95,
    "S->S": 0.5,
    "S->L reprefill": 0.9,
    "S->L transplant": 0.9,
    "L->S reprefill": 0.6,
}
LOSES = WINS | {"S->S": 0.9, "S->L reprefill": 0.5, "S->L transplant": 0.7}


def text(found):
    return "\n\n".join(control_findings.control_text(found, "PICTURE"))


def test_costs_are_relative_to_the_large_model_of_the_same_seed():
    found = results(WINS)
    for seed, slower in (("1", 2.0), ("2", 5.0)):
        for each in found["seeds"][seed]["rows"]:
            each["seconds"] *= slower
    for p in fronts.points(found):
        assert max(p.latency) == pytest.approx(min(p.latency))
        if p.pair == "L->L" and p.cap == 9:
            assert p.latency == p.work == (1, 1, 1)


RIVALS = (
    "Against the best single budget that is not clearly dearer in measured latency,"
)


def line(found, start):
    return next(x for x in text(found).split("\n") if x.startswith(f"* {start}"))


def test_a_winner_is_named_with_its_interval():
    found = results(WINS)
    said = line(found, "S->L (transplant) at that cap")
    assert "behind L->L by 5.0 points" in said and "ahead of S->S by 40.0" in said
    said = line(found, f"{RIVALS} S->L (reprefill)")
    assert "is ahead at caps 4 (+20.0" in said
    assert "and 9 (+40.0" in said and "over S->S at 9" in said
    assert "nowhere ahead" not in said and "behind" not in said


def test_a_loser_is_said_to_lose():
    found = results(LOSES)
    for hand_over in ("reprefill", "transplant"):
        said = line(found, f"{RIVALS} S->L ({hand_over})")
        assert "is nowhere ahead; behind at 4 and 9" in said
    assert "behind S->S by" in line(found, "S->L (reprefill) at that cap")


def test_what_seeds_disagree_on_is_no_win():
    """The mean is far ahead, but one seed says the opposite."""
    found = results(WINS | {"S->L reprefill": lambda _, seed: (0.9, 0.2, 0.9)[seed]})
    said = line(found, "S->L (reprefill) at that cap")
    assert "not clearly different from S->S (+" in said


def test_transplants_are_compared_before_and_after_mixing():
    shares = WINS | {
        "S->L transplant": lambda stage, _: {"first": 0.3, "last": 0.9}[stage]
    }
    found = results(shares, stages=("first", "last"))
    said = line(found, "Transplanted caches, S->L")
    assert "30.0% after `first`, behind re-reading by 60.0 points" in said
    assert "90.0% after `last` with mixed prefixes, not clearly different" in said
    assert "Stage by stage" in text(found) and "after first" in text(found)


def test_tables_have_every_row():
    found = results(WINS)
    rows = [line for line in text(found).split("\n") if line.startswith("| ")]
    assert len(rows) == 2 + 2 * len(WINS)
    alone = text(results(WINS, seeds=1))
    assert "Elastic training was run once" in alone
    found["smoke"] = True
    assert "A smoke run" in text(found)
