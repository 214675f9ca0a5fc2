"""Pairs of budgets over caps: costs counted by hand, and all of it at smoke size."""

import json
import shutil

import numpy as np
import pytest

from elastic_jax import fit
from experiments import control, settings
from experiments.configs import budget_control
from experiments.workdir import Failed, Workdir


@pytest.fixture(scope="module")
def found(control_workdir):
    return json.loads((control_workdir / "control.json").read_text())


def test_passes_are_the_tokens_that_each_model_reads():
    """Against a text that is written token by token, each from all before it."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, (3, 20))
    for hand_over in ("reprefill", "transplant", control.OWN_CACHE):
        thinking, answering = control.passes(*lengths, hand_over)
        for row, (prompt, thought, answer) in enumerate(lengths.T):
            text, known = int(prompt), 0
            counted = {"think": 0, "answer": 0}
            for phase, many in (("think", thought), ("answer", answer)):
                if phase == "answer" and hand_over == "reprefill":
                    known = 0
                for _ in range(many):
                    counted[phase] += text - known  # all that is not yet in the cache
                    known, text = text, text + 1
            assert (thinking[row], answering[row]) == tuple(counted.values())


def test_every_pair_meets_every_hand_over():
    found = control.arms("big", "tiny", ("reprefill", "transplant"))
    assert len(set(found)) == len(found) == 6
    for arm in found:
        assert (arm.think == arm.answer) == (arm.hand_over == control.OWN_CACHE)
    assert {(a.think, a.answer) for a in found} == {
        (a, b) for a in ("big", "tiny") for b in ("big", "tiny")
    }


def test_every_stage_seed_pair_and_cap_is_measured(found):
    asked = found["identity"]["control"]
    arms = control.arms(found["large"], found["small"], asked["hand_overs"])
    assert list(found["seeds"]) == ["0", "1"]
    for seed in found["seeds"].values():
        expected = [
            (stage, *arm, cap)
            for stage in asked["stages"]
            for cap in asked["caps"]
            for arm in arms
        ]
        rows = seed["rows"]
        keys = ("stage", "think", "answer", "hand_over", "cap")
        assert [tuple(row[key] for key in keys) for row in rows] == expected
        assert seed["active_params"]["small"] < seed["active_params"]["full"]
        for row in rows:
            assert len(row["right"]) == asked["problems"]
            assert row["thought_tokens"] <= row["cap"] + asked["grace"] + 1
            assert row["answer_tokens"] <= asked["max_answer"]
            last = row["stage"] == asked["stages"][-1]
            assert row["seconds"] > 0 if last else row["seconds"] is None


def test_hand_overs_think_alike_and_cost_differently(found):
    for seed in found["seeds"].values():
        rows = {
            (r["stage"], r["cap"], r["think"], r["answer"], r["hand_over"]): r
            for r in seed["rows"]
        }
        for (stage, cap, think, answer, hand_over), row in rows.items():
            alone = rows[stage, cap, think, think, control.OWN_CACHE]
            assert row["thought_tokens"] == alone["thought_tokens"]
            if hand_over == "reprefill":
                moved = rows[stage, cap, think, answer, "transplant"]
                assert row["work"] > moved["work"]


def test_the_report_stands_beside_the_other(control_workdir):
    text = (control_workdir / "budget_control.md").read_text()
    for words in ("A smoke run", "2 times, with other seeds", "S->L (transplant)"):
        assert words in text
    assert (control_workdir / "budget_control.png").stat().st_size > 10_000
    assert "]budget_control.png)" in text.replace("(", "")
    assert (control_workdir / "report.md").exists()


@pytest.fixture
def plan(monkeypatch, found):
    """The smoke run's own, as if on its machine."""
    software = {name: found["identity"][name] for name in fit.software()}
    monkeypatch.setattr(fit, "software", lambda: software)
    config = budget_control.get_config()
    config.smoke = True
    return settings.plan(config)


def test_a_seed_that_was_measured_is_not_measured_again(
    control_workdir, plan, found, tmp_path
):
    """Without any weights, the workdir still tells what they were measured to do."""
    shutil.copy(control_workdir / "control.json", tmp_path)
    control.measure(plan, Workdir(tmp_path), None, allow_changes=False)
    assert json.loads((tmp_path / "control.json").read_text()) == found


def test_missing_weights_are_named(plan, tmp_path):
    with pytest.raises(Failed, match="elastic-long is missing.*--workdir"):
        control.measure(plan, Workdir(tmp_path), None, allow_changes=False)
