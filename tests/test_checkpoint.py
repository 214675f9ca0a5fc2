"""The nested checkpoint and training saves: exact, lazy, whole or absent, never silent.

Environment: FLIPS and KILLS are how many faults the two slow properties inject.
"""

import dataclasses
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import elastic_jax as ej
from elastic_jax import axes, checkpoint, manifest, nesting
from elastic_jax.axes import AXES
from elastic_jax.checkpoint import TrainCheckpoints, open_nested, save_nested

FLIPS = int(os.environ.get("FLIPS", 60))
KILLS = int(os.environ.get("KILLS", 4))
PATTERN = "ME*-ME"


@pytest.fixture(scope="module")
def cfg():
    return dataclasses.replace(ej.presets.tiny(PATTERN), embed=48, vocab=40)


def random_params(cfg, dtype):
    """NumPy arrays: slicing them compiles nothing."""
    draw, specs = np.random.default_rng(0), ej.param_specs(cfg)

    def leaf(path, spec):
        return draw.normal(size=axes.shape(cfg, specs, path, spec)).astype(dtype)

    return axes.map_specs(leaf, specs)


@pytest.fixture(scope="module")
def params(cfg):
    """Two dtypes, so that a cast would show."""
    wide, narrow = (random_params(cfg, dtype) for dtype in ("f4", "bfloat16"))
    return {**wide, "layers": narrow["layers"]}


@pytest.fixture(scope="module")
def budgets(cfg):
    return {
        "full": ej.Counts({}),
        "small": ej.counts(cfg, embed=32, experts=(4, 6), heads_per_group=3, ffn=64),
        "flat": ej.counts(cfg, layers=(1, 1, 0, 1, 1, 0), q_per_kv=1),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory, cfg, params, budgets):
    path = tmp_path_factory.mktemp("nested") / "checkpoint"
    save_nested(
        path,
        params,
        cfg,
        budgets=budgets,
        router={"Dense_0": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}},
        scores={"embed": np.arange(48.0), "experts": (np.ones(8), np.zeros(8))},
        provenance={"data": "seen", "batches": [1, 2], "loss": float("inf")},
    )
    return path


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def forge(path: Path, change) -> None:
    """Rewrites the manifest by `change(members)`, with a right digest."""
    file = path / manifest.MANIFEST
    found = json.loads(file.read_bytes())
    found.pop("sha256")
    change(found)
    file.write_text(json.dumps({"sha256": manifest._digest(found), **found}))


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


# ------------------------------------------------------------ the nested checkpoint


def test_round_trip_keeps_bits_dtypes_and_metadata(saved, cfg, params, budgets):
    nested = open_nested(saved)
    restored, restored_cfg = nested.restore()
    assert restored_cfg == nested.cfg == cfg
    chex.assert_trees_all_equal(restored, params)
    chex.assert_trees_all_equal_dtypes(restored, params)
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    assert nested.budgets == budgets
    assert nested.provenance["batches"] == [1, 2]
    assert nested.provenance["loss"] == float("inf")
    assert nested.dtypes["params.layers.1.up"] == "bfloat16"
    assert nested.dtypes["params.embedding"] == "float32"
    assert nested.scores()["embed"].dtype == np.float64
    np.testing.assert_array_equal(nested.scores()["experts"][0], np.ones(8))
    np.testing.assert_array_equal(nested.router()["Dense_0"]["bias"], np.zeros(4))


@pytest.mark.parametrize("name", ["full", "small", "flat"])
def test_a_named_budget_is_the_slice(saved, cfg, params, budgets, name):
    small, small_cfg = open_nested(saved).restore(name)
    assert small_cfg == nesting.slice_config(cfg, budgets[name])
    expected = nesting.slice_params(params, ej.param_specs(cfg), budgets[name])
    chex.assert_trees_all_equal(small, expected)


@pytest.mark.parametrize("seed", range(6))
def test_unplanned_counts_are_the_slice(saved, cfg, params, seed):
    draw = random.Random(seed)
    kept = {"layers": tuple([1] + [draw.randint(0, 1) for _ in PATTERN[1:]])}
    for axis, size in nesting.resolved(cfg).items():
        step, low = AXES[axis].step, cfg.top_k if axis == "experts" else 1
        options = [n for n in range(step, size[0] + 1, step) if n >= low]
        if axis != "layers":
            each = tuple(draw.choice(options) for _ in size)
            kept[axis] = each if axis != "embed" else each[0]
    counts = ej.counts(cfg, **kept)
    small, small_cfg = open_nested(saved).restore(counts)
    assert small_cfg == nesting.slice_config(cfg, counts)
    expected = nesting.slice_params(params, ej.param_specs(cfg), counts)
    chex.assert_trees_all_equal(small, expected)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """10 MB of dense MLP: enough that metadata does not count."""
    cfg = dataclasses.replace(
        ej.presets.tiny("-"), embed=1024, ffn=2048, vocab=512
    )
    path = tmp_path_factory.mktemp("wide") / "checkpoint"
    params = random_params(cfg, "bfloat16")
    save_nested(path, params, cfg, budgets={})
    return path, params


@pytest.mark.parametrize("kept", [{}, {"embed": 512}, {"embed": 720, "ffn": 1264}])
def test_reads_little_more_than_the_share(wide, kept):
    path, params = wide
    before = bytes_read()
    small, _ = open_nested(path).restore(kept)
    read = bytes_read() - before
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    elements = [sum(w.size for w in jax.tree.leaves(t)) for t in (small, params)]
    assert read <= 1.25 * size * elements[0] / elements[1]


def test_opening_reads_no_array(wide):
    path, _ = wide
    before = bytes_read()
    open_nested(path)
    assert bytes_read() - before < 100_000


def test_casts_and_shards_while_reading(wide):
    path, params = wide
    nested = open_nested(path)
    cfg = nesting.slice_config(nested.cfg, nesting.counts(nested.cfg, embed=512))
    specs = ej.param_specs(cfg)
    mesh = jax.make_mesh(
        (4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    shardings = ej.param_shardings(cfg, specs, mesh)
    before = bytes_read()
    small, _ = nested.restore({"embed": 512}, dtype=jnp.float32, shardings=shardings)
    read = bytes_read() - before
    expected = nesting.slice_params(
        params, ej.param_specs(nested.cfg), nesting.counts(nested.cfg, embed=512)
    )
    chex.assert_trees_all_equal(small, jax.tree.map(lambda w: w.astype("f4"), expected))
    assert jax.tree.map(lambda w: w.sharding, small) == shardings
    assert read <= 1.25 * nested.size_bytes * 0.5  # not once per copy

    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    small, _ = nested.restore({"embed": 512}, shardings=everywhere)
    chex.assert_trees_all_equal(small, expected)


def test_stock_orbax_reads_the_folder(saved, params):
    folder = open_nested(saved)._arrays.folder
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        tree = orbax.restore(folder)
    np.testing.assert_array_equal(
        tree["params"]["layers"]["1"]["up"], params["layers"][1]["up"]
    )


def test_requests_that_do_not_fit_are_refused(saved, cfg, tmp_path):
    nested = open_nested(saved)
    for request, words in [
        ("smal", "did you mean 'small'"),
        ({"embed": 64}, "embed"),
        ({"experts": 16}, "experts"),
        ({"embed": 20}, "embed"),
        (7, "no budget 7"),
    ]:
        with pytest.raises(ValueError, match=words):
            nested.restore(request)
    with pytest.raises(ValueError, match="floating"):
        nested.restore(dtype=jnp.int32)
    with pytest.raises(ValueError, match="param_shardings"):
        nested.restore(shardings={"embedding": None})
    with pytest.raises(ValueError, match="no checkpoint"):
        open_nested(tmp_path / "nowhere")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "manifest.json").write_text('{"layers": 3}')
    with pytest.raises(ValueError, match=r"odd.manifest\.json"):
        open_nested(tmp_path / "odd")


def test_float64_is_not_narrowed_silently(tmp_path, cfg, params):
    wide = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    save_nested(tmp_path / "c", wide, cfg, budgets={})
    with pytest.raises(ValueError, match="jax_enable_x64"):
        open_nested(tmp_path / "c").restore()
    cast, _ = open_nested(tmp_path / "c").restore(dtype=jnp.float32)
    chex.assert_trees_all_equal(cast, jax.tree.map(lambda w: w.astype("f4"), params))


def test_saving_lists_everything_that_does_not_fit(tmp_path, cfg, params):
    odd = {**params, "embedding": params["embedding"][:, :-1], "more": jnp.ones(2)}
    odd.pop("lm_head")
    bad = {
        "wide": {"embed": 64},
        "odd": {"ffn": 17},
        "negative": {"embed": -16},
        "a": ej.counts(cfg, layers=(1, 1, 0, 0, 0, 0)),
        "b": ej.counts(cfg, layers=(1, 0, 1, 1, 0, 0)),
    }
    with pytest.raises(ValueError) as refused:
        save_nested(tmp_path / "c", odd, cfg, budgets=bad, router={"list": [1.0]})
    said = str(refused.value)
    for words in ("params.embedding", "params.more", "params.lm_head", "router: "):
        assert words in said
    for name in ("'wide'", "'odd'", "'negative'", "'a' keeps blocks [1], not in 'b'"):
        assert f"budget {name}" in said
    assert not (tmp_path / "c").exists()
    for record in ({"x": np.float32(1)}, {"x": {1: 2}}):
        with pytest.raises(ValueError, match="plain values"):
            save_nested(tmp_path / "c", params, cfg, budgets={}, provenance=record)


def test_only_a_checkpoint_is_replaced_and_only_when_asked(copied, cfg, params):
    with pytest.raises(ValueError, match="overwrite"):
        save_nested(copied, params, cfg, budgets={})
    before = open_nested(copied)
    doubled = jax.tree.map(lambda w: w * 2, params)
    save_nested(copied, doubled, cfg, budgets={}, overwrite=True)
    chex.assert_trees_all_equal(open_nested(copied).restore()[0], doubled)
    folders = [entry for entry in copied.iterdir() if entry.is_dir()]
    assert len(folders) == 1, "the old arrays are gone"
    with pytest.raises(ValueError, match="damaged"):
        before.restore()
    (copied / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        save_nested(copied, params, cfg, budgets={}, overwrite=True)


def test_a_failed_overwrite_changes_nothing(copied, cfg, params, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_manifest", fail)
    with pytest.raises(OSError, match="as before"):
        save_nested(copied, params, cfg, budgets={}, overwrite=True)
    assert len([entry for entry in copied.iterdir() if entry.is_dir()]) == 1
    chex.assert_trees_all_equal(open_nested(copied).restore()[0], params)


# --------------------------------------------------------------------------- damage


def test_no_flipped_bit_is_silent(copied, params):
    """Every file, positions at random: an error that says where, or equal arrays."""
    intact = jax.tree.leaves((params, open_nested(copied).scores()))
    files = sorted(file for file in copied.rglob("*") if file.stat().st_size)
    files = [file for file in files if file.is_file()]
    draw = random.Random(0)
    outcomes = {"detected": 0, "harmless": 0}
    for trial in range(FLIPS):
        file = files[trial % len(files)]
        content = bytearray(file.read_bytes())
        kept = bytes(content)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        try:
            nested = open_nested(copied)
            found = (nested.restore()[0], nested.scores())
        except ValueError as error:
            assert str(copied) in str(error)
            outcomes["detected"] += 1
        else:
            for have, want in zip(jax.tree.leaves(found), intact, strict=True):
                np.testing.assert_array_equal(have, want, err_msg=str(file))
            outcomes["harmless"] += 1
        file.write_bytes(kept)
    print(outcomes)
    assert outcomes["detected"]


def test_missing_and_short_files_are_named(saved, tmp_path):
    names = [f.relative_to(saved) for f in saved.rglob("*") if f.is_file()]
    for name in names:
        if name.name == manifest.LOCK:
            continue
        path = Path(shutil.copytree(saved, tmp_path / "damaged"))
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=name.name):
            open_nested(path)
        (path / name).unlink()
        with pytest.raises(ValueError, match=name.name):
            open_nested(path)
        shutil.rmtree(path)


def test_a_manifest_that_agrees_with_the_damage_gives_no_zeros(copied):
    """Truncation that the manifest was made to expect fails at the array instead."""
    folder = open_nested(copied)._arrays.folder
    largest = max((f for f in folder.rglob("*") if f.is_file()), key=os.path.getsize)
    size = largest.stat().st_size // 2
    os.truncate(largest, size)
    name = str(largest.relative_to(folder))
    forge(copied, lambda found: found["files"].update({name: size}))
    with pytest.raises(ValueError, match="array 'params.* is damaged"):
        open_nested(copied).restore()


def _entry(name, **changes):
    return lambda found: found["arrays"][name].update(changes)


def _budget(**counts):
    return lambda found: found["record"]["budgets"].update(forged=counts)


def _config(**changes):
    return lambda found: found["record"]["config"].update(changes)


FORGERIES = {
    "huge shape": _entry("params.embedding", shape=[2**40, 48]),
    "negative shape": _entry("params.embedding", shape=[-40, 48]),
    "float shape": _entry("params.embedding", shape=[40.0, 48]),
    "shape is text": _entry("params.embedding", shape="big"),
    "huge scores": _entry("scores.embed", shape=[2**50], chunks=[1]),
    "zero chunks": _entry("params.embedding", chunks=[0, 48]),
    "huge chunks": _entry("params.embedding", chunks=[2**30, 2**30]),
    "dtype object": _entry("params.embedding", dtype="object"),
    "dtype unknown": _entry("params.embedding", dtype="float7"),
    "new member in entry": _entry("params.embedding", per={"embed": 2}),
    "parameter gone": lambda found: found["arrays"].pop("params.embedding"),
    "parameter more": lambda found: found["arrays"].update(
        {"params.new": found["arrays"]["params.embedding"]}
    ),
    "budget wider": _budget(embed=64),
    "budget cuts a block of 16": _budget(embed=20),
    "budget negative": _budget(embed=-16),
    "budget zero": _budget(ffn=0),
    "budget float": _budget(embed=32.0),
    "budget true": _budget(q_per_kv=True),
    "budget text": _budget(embed="32"),
    "budget of unknown axis": _budget(embd=32),
    "budget too few experts": _budget(experts=1),
    "budget with too many layers": _budget(embed=32, ffn=[16, 16]),
    "budget keeps nothing": _budget(layers=[0] * 6),
    "blocks not nested": _budget(layers=[0, 0, 1, 0, 0, 0]),
    "budgets are a list": lambda found: found["record"].update(budgets=[1]),
    "budget is a number": lambda found: found["record"]["budgets"].update(x=3),
    "config unknown field": _config(auto_map="evil.py"),
    "config huge": _config(vocab=2**40),
    "config long pattern": _config(pattern="M" * 10**6),
    "config other pattern": _config(pattern="MEMEME"),
    "config text": _config(embed="48"),
    "version 2": lambda found: found.update(version=2),
    "another kind": lambda found: found.update(kind="train"),
    "folder outside": lambda found: found.update(folder="../x"),
    "folder is a number": lambda found: found.update(folder=1),
    "new member": lambda found: found.update(more=1),
    "member gone": lambda found: found.pop("files"),
    "record member gone": lambda found: found["record"].pop("provenance"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_manifests_are_refused_at_open(copied, name):
    forge(copied, FORGERIES[name])
    started = time.perf_counter()
    with pytest.raises(ValueError, match="manifest.json|is none of ours"):
        open_nested(copied)
    assert time.perf_counter() - started < 2


def test_a_consistent_forgery_of_terabytes_is_refused(copied):
    def grow(found):
        found["record"]["config"]["vocab"] = 2**24
        for name, axis in (("params.embedding", 0), ("params.lm_head", 1)):
            found["arrays"][name]["shape"][axis] = 2**24

    forge(copied, grow)
    with pytest.raises(ValueError, match="cannot come from"):
        open_nested(copied)


def test_text_that_is_no_manifest_is_refused(copied):
    for text in ("", "[" * 10**5, "null", "[]", "{}", '{"sha256": 1}', "\xff\xfe"):
        (copied / manifest.MANIFEST).write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"manifest\.json"):
            open_nested(copied)


def test_a_writer_without_checksums_is_noticed(tmp_path, cfg, params, monkeypatch):
    """Should Orbax stop calling our hook, a save fails instead of going unprotected."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    stock = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=True, type_handler_registry=registry
    )
    monkeypatch.setattr(checkpoint, "_orbax_handler", lambda entries: stock)
    with pytest.raises(OSError, match="codec"):
        save_nested(tmp_path / "c", params, cfg, budgets={})


# --------------------------------------------------------- checkpoints while training


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
        calls, real = [], getattr(checkpoint, at)

        def second_fails(*args):
            calls.append(args)
            return fail() if at != "_zarr" or len(calls) == 2 else real(*args)

        monkeypatch.setattr(checkpoint, at, second_fails)
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


def test_one_process_at_a_time(tmp_path, cfg, params):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / manifest.LOCK)],
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
from elastic_jax.checkpoint import TrainCheckpoints

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


# ------------------------------------------------------------------- chunks and names


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((128, 2688, 1856), ("experts", "embed", "expert_ffn")),
        ((131072, 2688), ("vocab", "embed")),
        ((2688, 8, 8, 64), ("embed", "ssm_groups", "heads_per_group", "ssm_head_dim")),
        ((5120, 20480), ("embed", "ffn")),
        ((48, 96), ("embed", "ffn")),
        ((2688,), ("embed",)),
        ((), ()),
    ],
)
def test_chunks_are_small_aligned_and_fine_where_submodels_cut(shape, dims):
    chunks = manifest.chunk_shape(shape, 2, dims)
    assert np.prod(chunks) * 2 <= manifest.SUBMODEL_CHUNK_BYTES
    for size, chunk, dim in zip(shape, chunks, dims, strict=True):
        step = AXES[dim].step if dim in AXES else 1
        assert chunk == size or chunk % step == 0
        assert -(-size // chunk) * chunk <= 1.01 * size
        if dim in AXES and np.prod(shape) > 2**24:
            assert chunk <= max(step, size / 4)


def test_names_of_leaves_are_distinct():
    tree = {"a.b": 1, "a": {"b": 2}, "a/b": 3, "a%2Eb": 4}
    flat = manifest.flat(tree, "state")
    assert sorted(flat.values()) == [1, 2, 3, 4]
    assert manifest.unflat(flat, "state") == tree


def test_the_lock_is_a_lock(tmp_path):
    with manifest.locked(tmp_path), open(tmp_path / manifest.LOCK, "a") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        TrainCheckpoints(tmp_path / "file")
