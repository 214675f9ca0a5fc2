"""Quantized nested checkpoints: packed on disk, cut to the bit, nothing believed."""

import dataclasses
import json
import math
import random
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import elastic_jax as ej
from elastic_jax import axes, manifest, nesting
from elastic_jax.axes import AXES
from elastic_jax.checkpoint import open_nested, save_nested
from elastic_jax.convert import slice_nested
from elastic_jax.lazy import lazy
from elastic_jax.parts import invalid_scales, parts
from elastic_jax.quantize import size_bytes
from elastic_kernels import FakeQuant, QuantArray

PATTERN = "MEM*-E"
# Both formats, kept ones, a stack of experts, and inputs that were calibrated.
RECIPE = ej.Recipe("nvfp4", (("attention/*", "fp8"), ("*/norm", "keep"),
                             ("moe/shared_*", "fp8"), ("mlp/up", "keep")))  # fmt: skip


def random_quantized(cfg, recipe, dtype="bfloat16"):
    """A parent whose experts' activations were calibrated, quantized."""
    draw, specs = np.random.default_rng(0), ej.param_specs(cfg)
    params = axes.map_specs(
        lambda path, spec: jnp.asarray(
            draw.normal(size=axes.shape(cfg, specs, path, spec)), dtype
        ),
        specs,
    )
    met = {
        ("layers", i, name): jnp.asarray(draw.uniform(1, 9, cfg.experts))
        for i, kind in enumerate(cfg.pattern)
        for name in ("up", "down")
        if kind == "E"
    }
    return ej.quantize(params, specs, cfg, recipe, input_largest=met)


@pytest.fixture(scope="module")
def cfg():
    return dataclasses.replace(ej.presets.tiny(PATTERN), embed=48, vocab=40)


@pytest.fixture(scope="module")
def params(cfg):
    return random_quantized(cfg, RECIPE)


@pytest.fixture(scope="module")
def budgets(cfg):
    return {
        "small": ej.counts(cfg, embed=32, experts=(4, 6), expert_ffn=(16, 48)),
        "flat": ej.counts(cfg, layers=(1, 1, 0, 1, 1, 0), ssm_head_dim=16, ffn=64),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory, cfg, params, budgets):
    path = tmp_path_factory.mktemp("quantized") / "checkpoint"
    save_nested(path, params, cfg, budgets=budgets)
    return path


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def assert_same(have, want):
    """Structure, dtypes and bits; the structure holds axis, dtype and format."""
    assert jax.tree.structure(have) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def forge(path: Path, change) -> None:
    file = path / manifest.MANIFEST
    found = json.loads(file.read_bytes())
    found.pop("sha256")
    change(found)
    file.write_text(json.dumps({"sha256": manifest._digest(found), **found}))


# ------------------------------------------------------------------- what is stored


def test_round_trip_keeps_bits_formats_and_dtypes(saved, cfg, params):
    nested = open_nested(saved)
    restored, found = nested.restore()
    assert found == cfg
    assert_same(restored, params)
    assert nested.formats["params.layers.1.up"] == "nvfp4"
    assert nested.formats["params.layers.3.o"] == "fp8"
    assert "params.layers.4.up" not in nested.formats
    up = "params.layers.1.up"
    assert {n.removeprefix(up): k for n, k in nested.dtypes.items() if up in n} == {
        ".values": "uint8",
        ".scale": "float32",
        ".block_scale": "float8_e4m3fn",
        ".input_scale": "float32",
    }
    assert nested.dtypes["params.layers.3.q.values"] == "float8_e4m3fn"
    assert "params.layers.3.q.input_scale" not in nested.dtypes
    found = json.loads((saved / "manifest.json").read_bytes())
    assert found["version"] == 2
    assert found["arrays"]["params.layers.1.down.values"]["per"] == {"expert_ffn": 2}
    blocks = found["arrays"]["params.layers.0.out.block_scale"]
    assert blocks["per"] == {"ssm_head_dim": 16}
    assert "per" not in found["arrays"]["params.layers.3.q.values"]


def test_what_holds_nothing_quantized_stays_version_1(tmp_path, cfg, params):
    save_nested(tmp_path / "c", ej.dequantize(params), cfg, budgets={})
    found = json.loads((tmp_path / "c" / "manifest.json").read_bytes())
    assert found["version"] == 1 and "quantized" not in found["record"]
    assert open_nested(tmp_path / "c").formats == {}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """13 MB of MLP and of experts in NVFP4: enough that metadata does not count."""
    sizes = {"embed": 1024, "ffn": 4096, "vocab": 16, "experts": 3, "expert_ffn": 2048}
    cfg = dataclasses.replace(ej.presets.tiny("-E"), **sizes)
    path = tmp_path_factory.mktemp("wide") / "checkpoint"
    params = random_quantized(cfg, ej.Recipe("nvfp4"))
    save_nested(path, params, cfg, budgets={})
    return path, params


def test_4_5_bits_a_weight_on_disk(wide):
    path, params = wide
    weights = [
        leaf
        for leaf in jax.tree.leaves(params, is_leaf=lambda w: isinstance(w, QuantArray))
        if isinstance(leaf, QuantArray)
    ]
    packed = sum(math.prod(w.shape) for w in weights) * 4.5 / 8
    size = open_nested(path).size_bytes
    assert size < 1.02 * size_bytes(params)
    assert size_bytes(params) < 1.05 * packed
    assert size > 0.9 * packed, "random weights hardly compress"


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("seed", ["parent", "half", *range(4)])
def test_reads_little_more_than_the_packed_share(wide, seed):
    path, params = wide
    kept = {"parent": {}, "half": {"embed": 512}}.get(seed)
    if kept is None:
        draw, tops = random.Random(seed), {"embed": 64, "ffn": 256, "expert_ffn": 128}
        kept = {axis: 16 * draw.randint(n // 2, n) for axis, n in tops.items()}
        kept["experts"] = draw.randint(2, 3)
    before = bytes_read()
    small, _ = open_nested(path).restore(kept)
    read = bytes_read() - before
    assert read <= 1.25 * open_nested(path).size_bytes * (
        size_bytes(small) / size_bytes(params)
    )


def test_stock_orbax_reads_the_parts(saved, params):
    folder = open_nested(saved)._arrays.folder
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        up = orbax.restore(folder)["params"]["layers"]["1"]["up"]
    np.testing.assert_array_equal(up["values"], params["layers"][1]["up"].values)


# ------------------------------------------------------------------------ submodels


@pytest.mark.parametrize("name", ["small", "flat"])
def test_a_named_budget_is_the_slice(saved, cfg, params, budgets, name):
    small, small_cfg = open_nested(saved).restore(name)
    assert small_cfg == nesting.slice_config(cfg, budgets[name])
    assert_same(small, nesting.slice_params(params, ej.param_specs(cfg), budgets[name]))


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
    nested = open_nested(saved)
    expected = nesting.slice_params(params, ej.param_specs(cfg), counts)
    assert_same(nested.restore(counts)[0], expected)
    leaves, _ = nested.lazy(counts)
    assert size_bytes(leaves) == size_bytes(expected)
    assert_same(jax.tree.map(np.asarray, leaves), expected)


def test_lazy_parts_are_saved_and_a_slice_is_a_checkpoint(saved, cfg, params, tmp_path):
    lazily = jax.tree.map(lazy, params)
    budgets = open_nested(saved).budgets
    save_nested(tmp_path / "again", lazily, cfg, budgets=budgets)
    assert_same(open_nested(tmp_path / "again").restore()[0], params)
    slice_nested(saved, tmp_path / "small", "small")
    cut = open_nested(tmp_path / "small")
    assert_same(cut.restore()[0], open_nested(saved).restore("small")[0])
    assert set(cut.formats.values()) == {"nvfp4", "fp8"}


def test_a_dtype_casts_what_is_not_quantized(saved, params):
    small, _ = open_nested(saved).restore(dtype=jnp.float32)
    assert small["embedding"].dtype == jnp.float32
    up = small["layers"][1]["up"]
    assert up.dtype == jnp.float32 and up.values.dtype == jnp.uint8
    assert up.scale.dtype == jnp.float32 and up.block_scale.dtype == jnp.float8_e4m3fn
    whole = jax.tree.map(lambda w: w, params["layers"][1]["up"]).astype(jnp.float32)
    np.testing.assert_array_equal(up.astype(up.dtype), whole)


def test_parts_are_placed_as_the_weight_is(saved, cfg, params):
    mesh = jax.make_mesh(
        (2, 2, 2),
        ("data", "tensor", "expert"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    nested, specs = open_nested(saved), ej.param_specs(cfg)
    expected = ej.param_shardings(cfg, specs, mesh, like=params)
    assert jax.tree.structure(expected) == jax.tree.structure(params)
    for given in (expected, ej.param_shardings(cfg, specs, mesh)):
        restored, _ = nested.restore(shardings=given)
        assert_same(restored, params)
        assert jax.tree.map(lambda w: w.sharding, restored) == expected
    up = restored["layers"][1]["up"]
    shards = {
        name: getattr(up, name).addressable_shards[0].data.shape
        for name in ("values", "block_scale", "scale", "input_scale")
    }
    assert shards == {
        "values": (4, 24, 32),
        "block_scale": (4, 3, 32),
        "scale": (4,),
        "input_scale": (4,),
    }
    placed = jax.device_put(params, expected)
    assert jax.tree.map(lambda w: w.sharding, placed) == expected
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    assert_same(nested.restore("small", shardings=everywhere)[0],
                nested.restore("small")[0])  # fmt: skip


def test_placed_parts_compute_what_one_device_does(tmp_path):
    cfg = ej.presets.tiny("ME*-")
    params = random_quantized(cfg, ej.Recipe("nvfp4"), "float32")
    save_nested(tmp_path / "c", params, cfg, budgets={})
    mesh = jax.make_mesh(
        (2, 2), ("tensor", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    shardings = ej.param_shardings(cfg, ej.param_specs(cfg), mesh)
    placed, _ = open_nested(tmp_path / "c").restore(shardings=shardings)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab, (2, 9)).astype(np.int32)
    apply = jax.jit(ej.apply, static_argnums=2)
    alone = np.asarray(apply(params, tokens, cfg))
    bound = 1e-4 * np.abs(alone).max()
    np.testing.assert_allclose(apply(placed, tokens, cfg), alone, rtol=0, atol=bound)


def test_a_mesh_that_would_cut_a_block_is_refused(params):
    cfg = dataclasses.replace(ej.presets.tiny("-"), ffn=48)
    specs = ej.param_specs(cfg)
    mesh = jax.sharding.AbstractMesh(
        (2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    ej.param_shardings(cfg, specs, mesh)
    small = random_quantized(cfg, ej.Recipe("nvfp4"))
    with pytest.raises(ValueError, match="down .*ffn 48 in blocks of 16") as refused:
        ej.param_shardings(cfg, specs, mesh, like=small)
    assert "layers/0/up" not in str(refused.value)


# ------------------------------------------------------------------ what is refused


SPOILED = {
    "block_scale": {0x00: "zero", 0x7F: "NaN", 0x81: "negative", 0xFF: "NaN"},
    "scale": {0.0: "zero", -1.0: "negative", np.nan: "NaN", np.inf: "infinite"},
    "input_scale": {-np.inf: "infinite", -0.0: "zero"},
}


def spoiled(array: QuantArray, part: str, value) -> QuantArray:
    """A copy whose last scale of a kind is `value`, a byte of it for block scales."""
    scales = np.array(getattr(array, part))
    flat = scales.reshape(-1).view(np.uint8) if part == "block_scale" else scales
    flat.reshape(-1)[-1] = value
    return dataclasses.replace(array, **{part: scales})


@pytest.mark.parametrize("part", SPOILED)
def test_invalid_scales_are_listed_per_tensor(tmp_path, part):
    cfg = ej.presets.tiny("E-")
    params = random_quantized(cfg, ej.Recipe("nvfp4"))
    for value in SPOILED[part]:
        bad = jax.tree.map(lambda w: w, params)
        for name in ("up", "down"):
            bad["layers"][0][name] = spoiled(params["layers"][0][name], part, value)
        save_nested(tmp_path / "c", bad, cfg, budgets={}, overwrite=True)
        nested = open_nested(tmp_path / "c")
        with pytest.raises(ValueError) as refused:
            nested.restore()
        for name in ("up", "down"):
            assert f"params.layers.0.{name}.{part}: 1 scales" in str(refused.value)
        with pytest.raises(ValueError, match=f"up.{part}: 1 scales"):
            getattr(nested.lazy()[0]["layers"][0]["up"], part).read()
        assert_same(nested.restore(allow_nonfinite=True)[0], bad)
        # The last expert is the one that is spoiled; what is not read does not count.
        assert_same(
            nested.restore({"experts": 4})[0],
            nesting.slice_params(
                params, ej.param_specs(cfg), ej.counts(cfg, experts=4)
            ),
        )


def test_every_code_of_a_scale_is_judged_as_its_value():
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    for code in codes:
        number = float(code)
        assert invalid_scales(np.array([code])) == (not 0 < number < np.inf)
    assert invalid_scales(codes) == 256 - 126
    for bad in (0.0, -1.0, np.nan, np.inf):
        assert invalid_scales(np.float32(bad)) == 1
    assert invalid_scales(np.float32(1e-38)) == 0


def _entry(name, **changes):
    return lambda found: found["arrays"][f"params.layers.{name}"].update(changes)


def _format(name, **changes):
    return lambda found: found["record"]["quantized"][f"params.layers.{name}"].update(
        changes
    )


def _renamed(old, new):
    def rename(found):
        arrays = found["arrays"]
        arrays[f"params.layers.{new}"] = arrays.pop(f"params.layers.{old}")

    return rename


FORGERIES = {
    "too few block scales": (
        _entry("1.up.block_scale", shape=[8, 2, 64], chunks=[8, 2, 64]),
        r"1\.up\.block_scale: found \(8, 2, 64\), expected \(8, 3, 64\)",
    ),
    "too many block scales": (_entry("1.up.block_scale", shape=[8, 6, 64]), "up.block"),
    "packed width wrong": (_entry("1.up.values", shape=[8, 48, 64]), r"up\.values"),
    "a scale too many": (_entry("1.up.scale", shape=[9]), r"up\.scale"),
    "a scale is an array": (_entry("0.z.scale", shape=[1], chunks=[1]), r"z\.scale"),
    "unknown format": (_format("1.up", format="mxfp4"), "format 'mxfp4', expected"),
    "format is a list": (_format("1.up", format=["nvfp4"]), "format"),
    "another format": (_format("1.up", format="fp8"), r"1\.up"),
    "used in integers": (_format("1.up", dtype="int8"), "not floating"),
    "used in nothing": (_format("1.up", dtype="bfloat17"), r"1\.up"),
    "more is said": (_format("1.up", axis=-1), "expected format and dtype"),
    "no block scales": (
        lambda found: found["arrays"].pop("params.layers.1.up.block_scale"),
        r"up\.block_scale: found nothing",
    ),
    "a part that is none": (_renamed("1.up.input_scale", "1.up.zero"), r"up\.zero"),
    "not said to be quantized": (
        lambda found: found["record"]["quantized"].pop("params.layers.1.up"),
        r"layers\.1\.up: found nothing",
    ),
    "said of what is not": (
        lambda found: found["record"]["quantized"].update(
            {"params.final_norm": {"format": "fp8", "dtype": "float32"}}
        ),
        "final_norm: fp8, but it meets no activations",
    ),
    "of no parameter": (
        lambda found: found["record"]["quantized"].update(
            {"params.layers.9.up": {"format": "fp8", "dtype": "float32"}}
        ),
        "layers.9.up: quantized, but no parameter",
    ),
    "values of another dtype": (_entry("1.up.values", dtype="int8"), "found int8"),
    "scales of another dtype": (_entry("1.up.block_scale", dtype="uint8"), "e4m3fn"),
    "another span": (_entry("1.up.values", per={"embed": 1}), "units per element"),
    "a span of another dimension": (
        _entry("1.up.values", per={"expert_ffn": 2}),
        "units per element",
    ),
    "a span of what is whole": (_entry("1.up.scale", per={"experts": 2}), "units per"),
    "a budget that cuts a block": (
        lambda found: found["record"]["budgets"].update(forged={"ffn": 24}),
        "budget 'forged'.*\n.*ffn: 24",
    ),
    "version 1": (lambda found: found.update(version=1), "version 1"),
    "version 3": (lambda found: found.update(version=3), "at most.*2"),
    "quantized is a list": (
        lambda found: found["record"].update(quantized=[1]),
        "manifest",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_manifests_are_refused_at_open(copied, name):
    change, words = FORGERIES[name]
    forge(copied, change)
    with pytest.raises(ValueError, match=words) as refused:
        open_nested(copied)
    assert "manifest.json" in str(refused.value)


def test_an_unquantized_checkpoint_cannot_claim_parts(tmp_path, cfg, params):
    save_nested(tmp_path / "c", ej.dequantize(params), cfg, budgets={})
    forge(tmp_path / "c", _entry("1.up", per={"embed": 2}))
    with pytest.raises(ValueError, match="unknown members.*per"):
        open_nested(tmp_path / "c")


@pytest.mark.parametrize(
    "axis", sorted({a for a, axis in AXES.items() if axis.step == 16})
)
def test_no_budget_cuts_a_block(axis, tmp_path, cfg, params, monkeypatch):
    """Even if an axis had no step, so that `counts` let it through."""
    specs = ej.param_specs(cfg)
    packed = {s.contracted[-1] for p, s in specs if stored_format(params, p) == "nvfp4"}
    monkeypatch.setitem(AXES, axis, dataclasses.replace(AXES[axis], step=1))
    size = max(nesting.resolved(cfg)[axis])
    budgets = {"odd": ej.counts(cfg, **{axis: size - 8}), "whole": ej.counts(cfg)}
    if axis not in packed:
        save_nested(tmp_path / "c", params, cfg, budgets=budgets)
        return
    with pytest.raises(ValueError, match=f"budget 'odd'.*\n.*{axis}.*cut a block"):
        save_nested(tmp_path / "c", params, cfg, budgets=budgets)
    save_nested(tmp_path / "c", params, cfg, budgets={"whole": ej.counts(cfg)})
    with pytest.raises(ValueError, match="cut a block"):
        open_nested(tmp_path / "c").restore({axis: size - 8})


def stored_format(params, path):
    leaf = axes.leaf(params, path)
    return leaf.format if isinstance(leaf, QuantArray) else None


def test_saving_refuses_what_is_not_packed_as_its_arrow_says(tmp_path, cfg, params):
    up = params["layers"][1]["up"]
    wrong = {
        "axis": (dataclasses.replace(up, axis=-1), "axis -1, expected -2"),
        "scale": (dataclasses.replace(up, scale=up.scale[:3]), r"up\.scale"),
        "wide": (
            dataclasses.replace(up, scale=np.asarray(up.scale, "f8")),
            "float64, expected float32",
        ),
        "training": (FakeQuant(up.astype("float32"), up), "a weight in training"),
    }
    for leaf, words in wrong.values():
        layers = [*params["layers"]]
        layers[1] = {**layers[1], "up": leaf}
        with pytest.raises(ValueError, match=words):
            save_nested(
                tmp_path / "c", {**params, "layers": tuple(layers)}, cfg, budgets={}
            )
    assert not [*tmp_path.iterdir()]


def test_parts_are_what_quantizing_makes(cfg, params):
    """The expected shapes and dtypes come from the arrows alone."""
    specs, seen = ej.param_specs(cfg), set()
    for path, spec in specs:
        leaf = axes.leaf(params, path)
        if isinstance(leaf, QuantArray):
            expected = parts(spec, axes.shape(cfg, specs, path, spec), leaf.format)
            for name, part in expected.items():
                array = getattr(leaf, name)
                if array is not None:
                    assert (array.shape, array.dtype) == (part.shape, part.dtype)
            seen.add(leaf.format)
    assert seen == {"fp8", "nvfp4"}
    chex.assert_trees_all_equal_structs(params, params)
