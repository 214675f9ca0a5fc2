"""Saves of a run: to the bit, whole or absent, whoever kills the writer.

Environment: KILLS is how many times the slow property kills one.
"""

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax import directories, presets, stored
from elastic_jax.checkpoint import save_nested
from elastic_jax.model import init_params
from elastic_jax.saves import TrainCheckpoints

KILLS = int(os.environ.get("KILLS", 4))


class State(typing.NamedTuple):
    params: dict
    key: jax.Array
    step: int
    rest: tuple


def a_state(step: int) -> State:
    """A state of every kind of leaf, a function of its step."""
    draw = np.random.default_rng(step)
    return State(
        {"0.78": jnp.full((3, 4), step, jnp.bfloat16), "w": draw.normal(size=(64, 8))},
        jax.random.key(step),
        step,
        (np.float64(step) / 3, np.zeros((0, 2)), True, "text", 0.1, jnp.int32(step)),
    )


def assert_same(have, want):
    assert jax.tree.structure(have) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        assert type(a) is type(b)
        if hasattr(a, "dtype"):
            assert a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(getattr(a, "dtype", object), jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def fail(*_, **__):
    raise RuntimeError("the second item fails")


def test_a_state_comes_back_to_the_bit(tmp_path):
    with TrainCheckpoints(tmp_path, keep=2) as saves:
        assert saves.latest_step() is None
        for step in (1, 2, 30):
            saves.save(step, a_state(step), {"data": {"next": step}, "stage": "one"})
        assert saves.steps() == [2, 30]
        assert_same(saves.restore(30, a_state(0)), a_state(30))
        assert saves.record(2) == {"data": {"next": 2}, "stage": "one"}
        with pytest.raises(ValueError, match="saved already"):
            saves.save(30, a_state(30), {})
        for step in (-1, 2.5):
            with pytest.raises(ValueError, match="step"):
                saves.save(step, a_state(1), {})
    with TrainCheckpoints(tmp_path) as saves:
        assert_same(saves.restore(saves.latest_step(), a_state(0)), a_state(30))


def test_a_state_without_arrays_comes_back(tmp_path):
    state = {"seed": 3, "name": "run", "rate": 0.5, "on": True}
    with TrainCheckpoints(tmp_path) as saves:
        saves.save(0, state, {})
        assert_same(saves.restore(0, state | {"seed": 0, "name": ""}), state)


def test_arrays_are_placed_like_the_template(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    state = {"w": jax.device_put(jnp.arange(16.0), split), "b": jnp.ones(3)}
    like = {**state, "w": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=split)}
    with TrainCheckpoints(tmp_path) as saves:
        saves.save(0, state, {})
        back = saves.restore(0, like)
    assert_same(back, state)
    assert back["w"].sharding == split
    assert not back["b"].committed


def test_all_differences_from_the_template_are_listed(tmp_path):
    with TrainCheckpoints(tmp_path) as saves:
        saves.save(0, {"a": np.ones(3), "b": np.ones(3), "c": 1, "d": jnp.ones(2)}, {})
        other = {"a": np.ones(4), "b": np.ones(3, "f4"), "c": 1.0, "e": jnp.ones(2)}
        with pytest.raises(ValueError) as refused:
            saves.restore(0, other)
        with pytest.raises(ValueError, match="no checkpoint"):
            saves.restore(1, other)
        for state in ({"x": np.array("text")}, {"x": object()}, {"x": 1j}):
            with pytest.raises(ValueError, match="state.x"):
                saves.save(1, state, {})
        with pytest.raises(ValueError, match="plain values"):
            saves.save(1, {"x": np.ones(2)}, {"set": {1}})
        assert saves.steps() == [0]
    for words in (
        "state.a: stored float64[3], expected float64[4]",
        "state.b: stored float64[3], expected float32[3]",
        "state.c: stored int, expected float",
        "state.d: stored float32[2], expected nothing",
        "state.e: stored nothing, expected float32[2]",
    ):
        assert words in str(refused.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("at", ["_zarr", "write_manifest"])
def test_a_step_whose_save_fails_does_not_exist(tmp_path, monkeypatch, at):
    """In the middle of the arrays, and between the arrays and the manifest."""
    with TrainCheckpoints(tmp_path) as saves:
        saves.save(1, a_state(1), {})
        calls, real = [], getattr(stored, at)

        def second_fails(*args):
            calls.append(args)
            return fail() if at != "_zarr" or len(calls) == 2 else real(*args)

        monkeypatch.setattr(stored, at, second_fails)
        with pytest.raises(OSError, match="second item"):
            saves.save(2, a_state(2), {})
        monkeypatch.undo()
        assert saves.steps() == [1]
        assert_same(saves.restore(1, a_state(0)), a_state(1))
        saves.save(2, a_state(2), {})
        assert saves.latest_step() == 2


def test_damage_in_a_step_is_an_error(tmp_path):
    with TrainCheckpoints(tmp_path) as saves:
        saves.save(1, a_state(1), {})
        data = max((f for f in tmp_path.rglob("*") if f.is_file()), key=os.path.getsize)
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 4
        data.write_bytes(content)
        with pytest.raises(ValueError, match="step_00000001.*damaged"):
            saves.restore(1, a_state(0))


def test_strays_are_removed_and_nothing_else(tmp_path):
    stray, mine = tmp_path / "step_00000007", tmp_path / "step_00000008"
    for place in (stray / "arrays-0a1b2c3d", mine, tmp_path / "20260101"):
        place.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    with TrainCheckpoints(tmp_path) as saves:
        assert saves.steps() == []
    assert not stray.exists()
    assert mine.exists() and (tmp_path / "20260101").exists()


def test_one_process_at_a_time(tmp_path):
    cfg = presets.tiny("-")
    params = init_params(jax.random.key(0), cfg)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / directories.LOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="in use by another run"):
        TrainCheckpoints(tmp_path)
    with pytest.raises(ValueError, match="in use by another run"):
        save_nested(tmp_path, params, cfg, budgets={})
    assert sorted(tmp_path.iterdir()) == before
    holder.communicate()
    with TrainCheckpoints(tmp_path), pytest.raises(ValueError, match="in use"):
        TrainCheckpoints(tmp_path)


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""

# Forks before JAX starts threads, so that a kill costs no import of its own.
CHILD = """
import os, resource, signal, sys
import numpy as np
from elastic_jax.saves import TrainCheckpoints

def state(step):
    return {"w": np.random.default_rng(step).normal(size=(400, 500)), "step": step}

def save_on(workdir, limit):
    with TrainCheckpoints(workdir) as saves:
        step = (saves.latest_step() or 0) + 1
        print("started", os.getpid(), flush=True)
        if limit:
            saves.save(step, state(step), {"step": step})
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                saves.save(step + 1, state(step + 1), {})
            except OSError as error:
                print(type(error).__name__, str(error).splitlines()[0], flush=True)
            print(saves.steps(), flush=True)
            return
        while True:
            saves.save(step, state(step), {"step": step})
            step += 1

if __name__ == "__main__":
    for line in sys.stdin:
        workdir, limit = line.split()
        child = os.fork()
        if not child:
            save_on(workdir, int(limit))
            os._exit(0)
        os.waitpid(child, 0)
        print("ended", flush=True)
"""


@pytest.fixture(scope="module")
def saver():
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_killed_at_any_moment_the_last_save_is_whole(saver, tmp_path):
    draw = random.Random(1)
    template = {"w": np.empty((400, 500)), "step": 0}
    reached = 0
    for _ in range(KILLS):
        saver.stdin.write(f"{tmp_path} 0\n")
        saver.stdin.flush()
        said, child = saver.stdout.readline().split()
        assert said == "started"
        # A busy machine may need long for the first save; kills come after it.
        patience = time.monotonic() + 120
        while not reached and not any(tmp_path.glob("*/manifest.json")):
            assert time.monotonic() < patience
            time.sleep(0.02)
        time.sleep(draw.uniform(0.05, 0.8))
        os.kill(int(child), signal.SIGKILL)
        assert saver.stdout.readline() == "ended\n"
        with TrainCheckpoints(tmp_path) as saves:
            step = saves.latest_step()
            assert (step or 0) >= reached
            if step is not None:
                reached = step
                found = saves.restore(step, template)
                assert saves.record(step) == {"step": step} and found["step"] == step
                expected = np.random.default_rng(step).normal(size=(400, 500))
                np.testing.assert_array_equal(found["w"], expected)
            names = {entry.name for entry in tmp_path.iterdir() if entry.is_dir()}
            assert names == {f"step_{s:08d}" for s in saves.steps()}
    assert reached


def test_a_full_disk_leaves_the_previous_step(saver, tmp_path):
    saver.stdin.write(f"{tmp_path} 200000\n")
    saver.stdin.flush()
    _, failed, steps, ended = [saver.stdout.readline() for _ in range(4)]
    assert failed.startswith("OSError") and "step_00000002" in failed
    assert (steps, ended) == ("[1]\n", "ended\n")
    with TrainCheckpoints(tmp_path) as saves:
        assert saves.restore(1, {"w": np.empty((400, 500)), "step": 0})["step"] == 1


def test_the_lock_is_a_lock(tmp_path):
    with directories.locked(tmp_path), open(tmp_path / directories.LOCK, "a") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        TrainCheckpoints(tmp_path / "file")
