"""A run that is cut short anywhere ends where the unbroken one does, bit for bit.

`python tests/test_fit.py WORKDIR [hang]` is the run that is killed here. Environment:
KILLS is how often.
"""

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
from tensorboardX.proto.event_pb2 import Event

import elastic_jax as ej
from elastic_jax import data, fit, objectives, stored, train
from elastic_jax.curriculum import Stage
from elastic_jax.elastic import Elastic, settled_counts
from elastic_jax.metrics import Alarms, MetricLog
from elastic_jax.router import budget_input, make_router
from elastic_jax.saves import TrainCheckpoints

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("KILLS", 2))
CFG = dataclasses.replace(ej.presets.tiny("-"), vocab=16, embed=32, ffn=64)
OPTIMIZER = train.optimizer(ej.param_specs(CFG))

LEARN = Stage(
    "learn", context=8, batch=4, micro_batch=2, learning_rate=1e-2, steps=4,
    router_learning_rate=1e-3, warmup_steps=1
)
SLICED = Stage(
    "sliced", context=12, batch=4, micro_batch=2, learning_rate=5e-3, steps=3,
    router="frozen"
)
MIXED = dataclasses.replace(SLICED, name="mixed", mixed_prefixes=0.5)
STAGES = (LEARN, SLICED)
STEPS = LEARN.steps + SLICED.steps


class Parent(NamedTuple):
    elastic: Elastic
    router: dict


@pytest.fixture(scope="module")
def parent():
    """A parent, and a router that has met its budgets."""
    axes = ej.ElasticConfig((("embed", (32, 16)), ("ffn", (64, 48, 32, 16))))
    targets = {"full": 1.0, "mid": 0.8, "small": 0.4}
    budgets = tuple((name, ej.Budget(t)) for name, t in targets.items())
    router = make_router(CFG, axes, 3, hidden=16)
    teacher = ej.init_params(jax.random.key(0), CFG)
    elastic = Elastic(CFG, teacher, router, budgets)
    start = router.init(jax.random.key(1), budget_input(0, 3))
    return Parent(elastic, train.fit_router(elastic, start))


def make_source(stage, seed=0, rows=32):
    rng, shape = np.random.default_rng(seed), (rows, stage.context)
    return data.Arrays({
        "tokens": rng.integers(0, 16, shape, np.int32),
        "targets": rng.integers(0, 16, shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "weights": np.ones(shape, np.float32),
        "answer": np.arange(stage.context) >= rng.integers(1, stage.context, (rows, 1)),
    })


def fresh_state(parent, optimizer=OPTIMIZER, params=None):
    params = parent.elastic.teacher if params is None else params
    return train.init_state(params, optimizer, parent.router)


def make_run(parent, *, stages=STAGES, sources=None, **options):
    """The masked stage and then the sliced one, at the counts that it settled."""
    elastic, router = parent
    sources = sources or {stage.name: make_source(stage) for stage in stages}

    def objective(stage, facts):
        if stage.router == "train":
            return objectives.masked_objective(elastic, stage)
        counts = settled_counts(elastic, router)
        if "counts" in facts:
            counts = {n: ej.counts(CFG, **c) for n, c in facts["counts"].items()}
        if stage.mixed_prefixes:
            return objectives.mixed_objective(elastic, stage, counts)
        return objectives.sliced_objective(elastic, stage, counts)

    def finish(stage, state, facts):
        if stage.router != "train":
            return {}
        chosen = settled_counts(elastic, state.router)
        return {"counts": {name: dict(kept) for name, kept in chosen.items()}}

    identity = {
        "config": elastic.cfg.to_dict(),
        "budgets": {name: budget.target for name, budget in elastic.budgets},
        "stages": {stage.name: dataclasses.asdict(stage) for stage in stages},
        "data": {name: source.digest() for name, source in sources.items()},
        **fit.software(),
    }
    return fit.Run(**{
        "stages": stages,
        "objective": objective,
        "finish": finish,
        "batches": lambda stage: data.batches(
            sources[stage.name], batch=stage.batch, seed=3
        ),
        "optimizer": OPTIMIZER,
        "identity": identity,
        "save_every": 1,
        "log_every": 1,
        **options,
    })


def run_in(folder, parent, state=None, *, allow_changes=False, **options):
    """Runs in `folder`, or resumes there."""
    with TrainCheckpoints(folder, keep=100) as checkpoints:
        log = MetricLog(folder / "metrics")
        run = make_run(parent, checkpoints=checkpoints, metrics=log, **options)
        state = fresh_state(parent) if state is None else state
        return fit.fit(run, state, allow_changes=allow_changes)


def digest(state):
    """SHA-256 of everything that a step changes."""
    seen = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        seen.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        seen.update(np.asarray(leaf).tobytes())
    return seen.hexdigest()


def unmoved(state):
    return digest(state._replace(step=0 * state.step))


def records(folder):
    with TrainCheckpoints(folder, keep=100) as checkpoints:
        return {step: checkpoints.record(step) for step in checkpoints.steps()}


def rows(folder):
    return MetricLog(folder / "metrics").rows()


def cut(source, folder, step):
    """A workdir as a kill leaves it after `step`: saves so far, and a longer log."""
    shutil.copytree(source / "metrics", folder / "metrics")
    for number in range(1, step + 1):
        name = f"step_{number:08d}"
        shutil.copytree(source / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def unbroken(parent, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    state, facts = run_in(folder, parent)
    return folder, digest(state), facts


# ------------------------------------------------------------------ resume (row 10)


@pytest.mark.parametrize("step", range(STEPS + 1))
def test_resumed_after_any_step_it_ends_the_same(parent, unbroken, tmp_path, step):
    """Inside the router's annealing, at the stage's edges and across them."""
    whole, expected, facts = unbroken
    state, found = run_in(cut(whole, tmp_path, step), parent)
    assert digest(state) == expected
    assert found == facts and set(facts["counts"]) == {"full", "mid", "small"}
    assert records(tmp_path) == records(whole)  # with the position in the data
    assert rows(tmp_path) == rows(whole)
    assert [row["step"] for row in rows(tmp_path)] == list(range(STEPS))


def test_a_save_holds_the_position_in_the_data(unbroken):
    positions = {
        step: record["data"] and record["data"]["position"]
        for step, record in records(unbroken[0]).items()
    }
    assert positions == {1: 1, 2: 2, 3: 3, 4: None, 5: 1, 6: 2, 7: None}


def test_a_stage_that_ends_early_resumes_too(parent, tmp_path):
    early = lambda stage, done, state: stage.name == "learn" and done == 2
    whole = tmp_path / "whole"
    expected, _ = run_in(whole, parent, enough=early)
    assert expected.step == 2 + SLICED.steps
    assert {r["stage"] for r in rows(whole)[2:]} == {"sliced"}
    for step in (1, 2, 3):
        folder = cut(whole, tmp_path / str(step), step)
        state, _ = run_in(folder, parent, enough=early)
        assert digest(state) == digest(expected)
        assert rows(folder) == rows(whole)


def test_a_stage_of_mixed_prefixes_resumes_too(parent, tmp_path):
    """Which budgets are mixed, and where, is a function of the step and the row."""
    whole, stages = tmp_path / "whole", (LEARN, MIXED)
    expected, _ = run_in(whole, parent, stages=stages)
    names = {key for row in rows(whole)[LEARN.steps :] for key in row}
    assert any("-to-" in name for name in names)
    for step in (LEARN.steps, LEARN.steps + 1, LEARN.steps + 2):
        folder = cut(whole, tmp_path / str(step), step)
        state, _ = run_in(folder, parent, stages=stages)
        assert digest(state) == digest(expected)
        assert rows(folder) == rows(whole)


# ----------------------------------------------------------------- changes (row 11)


def test_a_changed_run_is_refused_with_every_change(
    parent, unbroken, tmp_path, monkeypatch
):
    folder = cut(unbroken[0], tmp_path, 5)
    before = records(folder)
    stages = (LEARN, dataclasses.replace(SLICED, batch=2))
    sources = {s.name: make_source(s, seed=s.name == "sliced") for s in STAGES}
    cfg = dataclasses.replace(CFG, norm_eps=1e-6)
    budgets = (*parent.elastic.budgets[:2], ("tiny", ej.Budget(0.4)))
    changed = dataclasses.replace(parent.elastic, cfg=cfg, budgets=budgets)
    devices = jax.device_count()
    monkeypatch.setattr(jax, "device_count", lambda: devices + 1)
    monkeypatch.setattr(jax, "__version__", "9.9")
    with pytest.raises(ValueError, match="the saved run is another one") as error:
        run_in(folder, Parent(changed, parent.router), stages=stages, sources=sources)
    lines = [line.strip().split(":")[0] for line in str(error.value).splitlines()[1:-1]]
    assert lines == [
        "budgets.small", "budgets.tiny", "config.norm_eps", "data.sliced", "devices",
        "jax", "stages.sliced.batch",
    ]
    assert f"devices: was {devices}, is {devices + 1}" in str(error.value)
    assert "allow the changes" in str(error.value)
    assert records(folder) == before


def test_allowed_changes_continue_behind_the_examples_seen(parent, unbroken, tmp_path):
    """5 steps are done, the last of them on 4 examples of the second stage."""
    folder = cut(unbroken[0], tmp_path, 5)
    stages = (LEARN, dataclasses.replace(SLICED, batch=2))
    sources = {s.name: make_source(s, seed=s.name == "sliced") for s in STAGES}
    options = {"stages": stages, "sources": sources}
    state, _ = run_in(folder, parent, allow_changes=True, **options)
    assert state.step == STEPS
    saved = records(folder)
    assert saved[6]["data"]["position"] == 4 // 2 + 1
    assert saved[6]["data"]["source"] == sources["sliced"].digest()
    assert saved[6]["identity"]["stages"]["sliced"]["batch"] == 2
    assert rows(folder)[:5] == rows(unbroken[0])[:5]


def test_a_stage_cut_shorter_than_its_save_is_over(parent, unbroken, tmp_path):
    folder = cut(unbroken[0], tmp_path, 6)
    stages = (LEARN, dataclasses.replace(SLICED, steps=1))
    state, facts = run_in(folder, parent, stages=stages, allow_changes=True)
    assert state.step == 6 and "counts" in facts


def test_differences_are_named_by_their_path():
    old = {"a": {"b": 1, "gone": 2}, "same": [1]}
    new = {"a": {"b": 3}, "same": [1], "c": None}
    assert fit.differences(old, new) == [
        "a.b: was 1, is 3", "a.gone: was 2, is gone", "c: new, None"
    ]


def test_what_json_does_to_an_identity_is_no_change(parent, unbroken, tmp_path):
    """Tuples come back as lists; `sampling` may hold one."""
    stages = (dataclasses.replace(LEARN, sampling=(1.0, 1.0, 1.0)),)
    for _ in range(2):
        state, _ = run_in(tmp_path, parent, stages=stages)
        assert state.step == LEARN.steps


# ---------------------------------------------------------------- signals (row 12)


@pytest.mark.parametrize("step", [2, LEARN.steps, 6])
def test_a_request_to_stop_finishes_the_step_and_saves(
    parent, unbroken, tmp_path, step
):
    def observe(stage, done, state, row):
        if state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(fit.StopRequested, match="stopped"):
        run_in(tmp_path, parent, observe=observe, save_every=100)
    assert signal.getsignal(signal.SIGTERM) is before
    assert max(records(tmp_path)) == step
    state, _ = run_in(tmp_path, parent)
    assert digest(state) == unbroken[1]


def language_run(folder, observe=lambda *_: None):
    """What the child process does: enough steps to be killed in."""
    stage = dataclasses.replace(LEARN, steps=60)
    with TrainCheckpoints(folder) as checkpoints:
        run = fit.Run(
            stages=(stage,),
            objective=lambda stage, _: objectives.language_objective(CFG, stage),
            batches=lambda stage: data.batches(make_source(stage), batch=4, seed=3),
            optimizer=OPTIMIZER,
            identity=fit.software(),
            checkpoints=checkpoints,
            save_every=2,
            metrics=MetricLog(folder / "metrics"),
            observe=observe,
        )
        params = ej.init_params(jax.random.key(0), CFG)
        return fit.fit(run, train.init_state(params, OPTIMIZER))


def child(folder, hang):
    """Prints a line per step; with `hang`, a save never ends."""

    def never(*_):
        print("saving", flush=True)
        while signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            time.sleep(0.01)
        print("asked", flush=True)
        time.sleep(600)

    if hang:
        stored.write_manifest = never
    language_run(Path(folder), lambda *_: print("step", flush=True))


def test_killed_again_and_again_it_ends_the_same(tmp_path):
    """SIGKILL at any moment, then two SIGTERMs in the middle of a save."""
    folder, chance = tmp_path / "run", random.Random()
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, __file__, str(folder), *arguments],
            env=environment, stdout=subprocess.PIPE, text=True,
        )

    for _ in range(KILLS):
        with start() as process:
            for _ in range(chance.randrange(3, 12)):
                assert process.stdout.readline() == "step\n"
            time.sleep(chance.uniform(0, 0.1))
            process.kill()
        assert process.returncode == -signal.SIGKILL
    with TrainCheckpoints(folder) as checkpoints:
        saved = checkpoints.latest_step()
    assert 2 <= saved < 60

    with start("hang") as process:
        while (line := process.stdout.readline()) != "saving\n":
            assert line == "step\n"
        process.terminate()
        assert process.stdout.readline() == "asked\n"
        process.terminate()
    assert process.returncode == -signal.SIGTERM
    with TrainCheckpoints(folder) as checkpoints:
        assert checkpoints.latest_step() == saved

    state, _ = language_run(folder)
    expected, _ = language_run(tmp_path / "unbroken")
    assert digest(state) == digest(expected)
    assert rows(folder) == rows(tmp_path / "unbroken")


# -------------------------------------------------------------- non-finite (row 14)


def poisoned(stage, example):
    """One example holds a token that the model does not have."""
    source = make_source(stage)
    source._arrays["tokens"][example, 2] = 99
    return {stage.name: source}


def written(folder):
    files = (folder / "metrics").glob("nonfinite_*.json")
    return [json.loads(file.read_text()) for file in files]


def test_a_poisoned_example_stops_the_run_before_its_step(parent, tmp_path):
    stage = dataclasses.replace(LEARN, steps=8)  # an epoch
    options = {"stages": (stage,), "sources": poisoned(stage, 5)}
    seen = [digest(fresh_state(parent))]
    observe = lambda stage, done, state, row: seen.append(digest(state))
    with pytest.raises(fit.NonFinite, match="examples") as error:
        run_in(tmp_path, parent, observe=observe, **options)
    (report,) = written(tmp_path)
    step = report["step"]
    assert 0 < step == max(records(tmp_path)) == len(seen) - 1
    with TrainCheckpoints(tmp_path) as checkpoints:
        assert digest(checkpoints.restore(step, fresh_state(parent))) == seen[-1]
    assert report["what"] == "loss" and report["stage"] == "learn"
    assert 5 in report["examples"] and len(report["examples"]) == stage.micro_batch
    assert len(report["budgets"]) == 1
    for word in (f"step {step} ", "'learn'", *report["budgets"], "'skip'"):
        assert word in str(error.value)


def test_a_skipped_step_changes_no_bit_but_is_counted(parent, tmp_path):
    stage = dataclasses.replace(LEARN, steps=8)
    options = {"stages": (stage,), "sources": poisoned(stage, 5)}
    seen = [unmoved(fresh_state(parent))]
    observe = lambda stage, done, state, row: seen.append(unmoved(state))
    state, _ = run_in(
        tmp_path, parent, observe=observe, on_nonfinite="skip", **options
    )
    assert state.step == 8
    (report,) = written(tmp_path)
    for step, row in enumerate(rows(tmp_path)):
        skipped = step == report["step"]
        assert (seen[step] == seen[step + 1]) == skipped
        assert ("alarm/nonfinite" in row) == skipped == math.isnan(row["loss"])


@pytest.fixture(scope="module")
def poisoned_unit(parent):
    """Weights of the last hidden channel overflow: only the full budget has it."""
    params = dict(parent.elastic.teacher)
    block = params["layers"][0]
    up = block["up"].at[:, -1].set(1e30)
    return params | {"layers": ({**block, "up": up},)}


def test_a_fault_of_one_budget_is_blamed_on_it(parent, poisoned_unit, tmp_path):
    stage = dataclasses.replace(SLICED, steps=6)
    seen = [unmoved(fresh_state(parent, params=poisoned_unit))]
    observe = lambda stage, done, state, row: seen.append(unmoved(state))
    run_in(
        tmp_path, parent, fresh_state(parent, params=poisoned_unit), stages=(stage,),
        observe=observe, on_nonfinite="skip"
    )
    faults = [("loss/full" in row) for row in rows(tmp_path)]
    assert 0 < sum(faults) < 6
    for step, (row, fault) in enumerate(zip(rows(tmp_path), faults, strict=True)):
        assert ("alarm/nonfinite" in row) == fault
        assert (seen[step] == seen[step + 1]) == fault
        assert all(math.isfinite(row.get(f"loss/{n}", 0)) for n in ("mid", "small"))
    assert {tuple(report["budgets"]) for report in written(tmp_path)} == {("full",)}


def test_a_gradient_may_overflow_where_the_loss_does_not(parent, tmp_path):
    def objective(stage, facts):
        whole = objectives.masked_objective(parent.elastic, stage)

        def gradients(state, batch, step):
            total, losses = whole.gradients(state, batch, step)
            scale = math.inf if step == 2 else 1.0
            return jax.tree.map(lambda g: g * scale, total), losses

        return objectives.Objective(gradients)

    options = {"objective": objective, "stages": (LEARN,)}
    with pytest.raises(fit.NonFinite, match="norm/params is not finite at step 2"):
        run_in(tmp_path, parent, **options)
    assert max(records(tmp_path)) == 2
    assert len(written(tmp_path)[0]["examples"]) == LEARN.batch


# ------------------------------------------------------------------ alarms (row 15)


def causes(row):
    return {key.removeprefix("alarm/") for key in row if key.startswith("alarm/")}


def test_a_hundredfold_gradient_raises_a_loss_spike(parent, tmp_path):
    """Plain gradient descent: clipped Adam would shrug it off.

    A resumed run raises it too, from the losses before the restart.
    """
    stage = dataclasses.replace(
        LEARN, steps=34, learning_rate=0.5, final_learning_rate=1.0
    )

    def objective(stage, facts):
        whole = objectives.language_objective(CFG, stage)

        def gradients(state, batch, step):
            total, losses = whole.gradients(state, batch, step)
            scale = 100.0 if step == 30 else 1.0
            return jax.tree.map(lambda g: g * scale, total), losses

        return objectives.Objective(gradients)

    plain = optax.identity()

    def run(folder):
        return run_in(
            folder, parent, fresh_state(parent, plain), optimizer=plain, save_every=29,
            stages=(stage,), objective=objective, finish=lambda *_: {}
        )

    whole = tmp_path / "whole"
    run(whole)
    alarms = [causes(row) for row in rows(whole)]
    assert alarms[31] == {"loss_spike"} and not any(alarms[:31])
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("step_*34"))
    run(resumed)
    assert rows(resumed) == rows(whole)


def test_a_collapsed_router_is_reported_and_its_stage_refused(parent, tmp_path):
    """Its logits are one-hot, and wrong: no gradient will ever move them."""
    stuck = jax.tree.map_with_path(
        lambda path, w: -1e4 * w if "_out" in str(path) else w, parent.router
    )
    stage = dataclasses.replace(LEARN, steps=9)
    state = fresh_state(Parent(parent.elastic, stuck))
    with pytest.raises(ValueError, match="the router missed its budgets"):
        run_in(tmp_path, parent, state, stages=(stage,))
    alarms = [causes(row) for row in rows(tmp_path)]
    assert alarms[:2] == [{"router_collapse"}] * 2
    assert alarms[2:6] == [set()] * 4
    assert alarms[6:] == [{"budget_missed"}] * 3
    assert {"router_collapse", "budget_missed", "loss_spike", "nonfinite"} == set(
        Alarms.ADVICE
    )
    assert max(records(tmp_path)) == 8  # the stage did not end


# ----------------------------------------------------------------- metrics and rates


def test_a_log_forgets_what_will_be_done_again(tmp_path):
    log = MetricLog(tmp_path / "metrics")
    assert log.rows() == [] and not log.path.parent.exists()
    for step in range(4):
        log.write(step, {"stage": "a", "loss": step / 2})
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed here
    assert [row["step"] for row in log.rows()] == [0, 1, 2, 3]
    log.forget_after(2)
    log.write(2, {"loss": 7.0, "count": 3})
    log.close()
    assert log.rows() == [
        {"step": 0, "stage": "a", "loss": 0.0},
        {"step": 1, "stage": "a", "loss": 0.5},
        {"step": 2, "loss": 7.0, "count": 3},
    ]
    found = {(e.step, v.tag): v.simple_value for e in events(tmp_path / "metrics")
             for v in e.summary.value}
    assert found[0, "loss"] == 0 and found[2, "loss"] == 7 and found[2, "count"] == 3
    starts = [e.step for e in events(tmp_path / "metrics") if e.session_log.status == 1]
    assert starts == [2]  # from where TensorBoard drops older points


def test_a_log_of_numbers_that_json_lacks(tmp_path):
    log = MetricLog(tmp_path)
    log.write(0, {"loss": math.nan, "norm": math.inf, "stage": "a"})
    log.forget_after(1)
    log.close()
    assert '"loss": null, "norm": null' in log.path.read_text()
    row = log.rows()[0]
    assert math.isnan(row["loss"]) and math.isnan(row["norm"]) and row["stage"] == "a"


def events(folder):
    """All TensorBoard events: records of length, checksum, bytes, checksum."""
    found = []
    for file in sorted(folder.glob("events.*"), key=os.path.getmtime):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_rates_warm_up_and_fall_by_a_cosine():
    stage = dataclasses.replace(
        LEARN, steps=100, warmup_steps=10, learning_rate=2.0, router_learning_rate=1.0,
        final_learning_rate=0.1
    )
    rates = [fit.learning_rates(stage, step) for step in range(101)]
    weights = np.array([rate["rate/params"] for rate in rates])
    np.testing.assert_allclose(weights[:10], 0.2 * np.arange(1, 11))
    assert weights[10] == weights.max() == 2.0
    assert (np.diff(weights[10:]) < 0).all()
    np.testing.assert_allclose(weights[[55, 100]], [2 * 0.55, 2 * 0.1])
    np.testing.assert_allclose([r["rate/router"] for r in rates], weights / 2)
    frozen = dataclasses.replace(stage, router="frozen")
    assert fit.learning_rates(frozen, 50)["rate/router"] == 0
    assert fit.learning_rates(frozen, 50)["rate/params"] == weights[50]
    no_warmup = dataclasses.replace(stage, warmup_steps=0)
    assert fit.learning_rates(no_warmup, 0)["rate/params"] == 2.0


def test_options_that_mean_nothing_are_refused(parent):
    with pytest.raises(ValueError, match="invalid Run") as error:
        make_run(parent, save_every=0, log_every=-1, on_nonfinite="ignore")
    for name in ("save_every", "log_every", "on_nonfinite"):
        assert name in str(error.value)


if __name__ == "__main__":
    child(sys.argv[1], hang=len(sys.argv) > 2)
