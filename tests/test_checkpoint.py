"""The nested checkpoint: exact, lazy, whole or absent, never silent.

Environment: FLIPS is how many faults the slow property injects.
"""

import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import elastic_jax as ej
from elastic_jax import axes, manifest, nesting, stored
from elastic_jax.axes import AXES
from elastic_jax.checkpoint import open_nested, save_nested
from elastic_jax.lazy import LazyArray

FLIPS = int(os.environ.get("FLIPS", 60))
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


def fail(*_, **__):
    raise RuntimeError("a step of the save fails")


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
    monkeypatch.setattr(stored, "write_manifest", fail)
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


@contextlib.contextmanager
def no_more_address_space_than(size_bytes: int):
    """Within, allocating more than `size_bytes` on top of what is held fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + size_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_manifests_are_refused_at_open(copied, name):
    forge(copied, FORGERIES[name])
    started = time.perf_counter()
    refused = pytest.raises(ValueError, match="manifest.json|is none of ours")
    with no_more_address_space_than(2**28), refused:
        open_nested(copied)
    assert time.perf_counter() - started < 2


def test_a_consistent_forgery_of_terabytes_is_refused(copied):
    def grow(found):
        found["record"]["config"]["vocab"] = 2**24
        for name, axis in (("params.embedding", 0), ("params.lm_head", 1)):
            found["arrays"][name]["shape"][axis] = 2**24

    forge(copied, grow)
    refused = pytest.raises(ValueError, match="cannot come from")
    with no_more_address_space_than(2**28), refused:
        open_nested(copied)


def test_text_that_is_no_manifest_is_refused(copied):
    for text in ("", "[" * 10**5, "null", "[]", "{}", '{"sha256": 1}', "\xff\xfe"):
        (copied / manifest.MANIFEST).write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"manifest\.json"):
            open_nested(copied)


def test_a_writer_without_checksums_is_noticed(tmp_path, cfg, params, monkeypatch):
    """Should Orbax stop calling our hook, a save fails instead of going unprotected."""

    class Stock(ocp.type_handlers.NumpyHandler):
        async def _open_and_write(self, value, tspec, ts_context):
            await super()._open_and_write(value.read(), tspec, ts_context)

    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, Stock(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    stock = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=True, type_handler_registry=registry
    )
    monkeypatch.setattr(stored, "_orbax_handler", lambda *_: stock)
    with pytest.raises(OSError, match="codec"):
        save_nested(tmp_path / "c", params, cfg, budgets={})


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
