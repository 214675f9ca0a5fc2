"""Import, export and slice: bits, budgets, tokenizers and refusals."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import axes, convert, nesting
from elastic_jax.__main__ import main
from elastic_jax.axes import AXES, blocks_with
from elastic_jax.huggingface import open_hf
from elastic_jax.huggingface.shards import read_shards

ROOT = Path(__file__).parent.parent
COUNTS = {"embed": 64, "expert_ffn": 32}


def random_params(cfg, seed=0, dtype=jnp.bfloat16):
    draw, specs = np.random.default_rng(seed), ej.param_specs(cfg)

    def value(path, spec):
        noise = draw.normal(size=axes.shape(cfg, specs, path, spec))
        return jnp.asarray(noise, jnp.float32 if path[-1] == "router_bias" else dtype)

    return axes.map_specs(value, specs)


@pytest.fixture(scope="module")
def cfg():
    return ej.presets.tiny("MEM*ME")


@pytest.fixture(scope="module")
def released(tmp_path_factory, cfg):
    """A Hugging Face directory in shards, with a tokenizer and fields of its own."""
    directory = tmp_path_factory.mktemp("released") / "hf"
    ej.to_hf(
        directory,
        random_params(cfg),
        cfg,
        shard_bytes=200_000,
        carried={"eos_token_id": [2, 11], "max_position_embeddings": 262144},
        files={"tokenizer.json": b'{"version": "1.0"}', "merges.txt": b"a b\n"},
    )
    return directory


@pytest.fixture(scope="module")
def nested(tmp_path_factory, released):
    path = tmp_path_factory.mktemp("nested") / "checkpoint"
    assert convert.import_hf(released, path, budgets={"12b": COUNTS}) == ()
    return path


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_exporting_what_was_imported_reproduces_its_tensors(released, nested, tmp_path):
    convert.export_hf(nested, tmp_path / "back")
    before, after = read_shards(released), read_shards(tmp_path / "back")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert after[name].read().tobytes() == tensor.read().tobytes(), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["eos_token_id"] == [2, 11]
    assert config["max_position_embeddings"] == 262144
    for name in ("tokenizer.json", "merges.txt", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (released / name).read_bytes()


def test_the_parameters_are_those_of_the_directory(released, nested, cfg):
    params, read = ej.from_hf(released)
    assert read == cfg
    same(params, random_params(cfg))
    opened = ej.open_nested(nested)
    same(opened.restore()[0], params)
    assert opened.budgets == {"12b": ej.counts(cfg, **COUNTS)}
    assert opened.provenance["imported"] == "hf"
    assert set(opened.files()) == {
        "tokenizer.json",
        "merges.txt",
        "generation_config.json",
    }


def test_a_budget_is_exported_as_its_slice(nested, cfg, tmp_path):
    convert.export_hf(nested, tmp_path / "12b", "12b", dtype="float32")
    counts = ej.counts(cfg, **COUNTS)
    small = ej.slice_params(random_params(cfg), ej.param_specs(cfg), counts)
    found, found_cfg = ej.from_hf(tmp_path / "12b")
    assert found_cfg == ej.slice_config(cfg, counts)
    same(found, jax.tree.map(lambda x: x.astype(jnp.float32), small))
    card = (tmp_path / "12b" / "README.md").read_text()
    for words in ("budget `12b`", "`embed` 64", "imported: hf"):
        assert words in card
    config = json.loads((tmp_path / "12b" / "config.json").read_text())
    assert config["torch_dtype"] == "float32" and config["hidden_size"] == 64
    assert "Infinity" not in (tmp_path / "12b" / "config.json").read_text()


@pytest.mark.parametrize("seed", range(4))
def test_a_slice_of_a_slice_is_the_slice(seed, tmp_path):
    """`slice` keeps the budgets within: cut out of it, they are what they were."""
    draw = np.random.default_rng(seed)
    cfg = ej.presets.tiny("ME*-M")
    params, specs = random_params(cfg), ej.param_specs(cfg)

    def counts(within):
        given = {}
        for axis, step in ((a, AXES[a].step) for a in AXES if a != "layers"):
            blocks = max(1, len(blocks_with(cfg.pattern, axis)))
            tops = nesting.resolved(cfg, within)[axis]
            least = cfg.top_k if axis == "experts" else step
            each = tuple(
                int(draw.choice(range(least, n + 1, step))) for n in tops[:blocks]
            )
            given[axis] = each if AXES[axis].blocks else each[0]
        return given

    layers = (1, 1, 1, 0, 1)
    middle = ej.counts(cfg, **counts(ej.counts(cfg)), layers=layers)
    small = ej.counts(cfg, **counts(middle), layers=(1, 1, 1, 0, 0))
    other = ej.counts(cfg, layers=(1, 1, 1, 1, 0))
    ej.save_nested(
        tmp_path / "parent", params, cfg, budgets={"middle": middle, "small": small}
    )
    notes = convert.slice_nested(tmp_path / "parent", tmp_path / "middle", "middle")
    cut = ej.open_nested(tmp_path / "middle")
    same(cut.restore()[0], ej.slice_params(params, specs, middle))
    same(cut.restore("small")[0], ej.slice_params(params, specs, small))
    assert cut.restore("small")[1] == ej.slice_config(cfg, small)
    assert "stay behind" in notes[0]
    convert.slice_nested(
        tmp_path / "parent", tmp_path / "other", {"layers": other["layers"]}
    )
    assert "middle" not in ej.open_nested(tmp_path / "other").budgets


def test_lazy_leaves_are_what_restore_gives(nested):
    opened = ej.open_nested(nested)
    for budget in (None, "12b", {"experts": 3, "layers": (1, 1, 0, 1, 1, 1)}):
        lazy, lazy_cfg = opened.lazy(budget, dtype=jnp.float32)
        params, cfg = opened.restore(budget, dtype=jnp.float32)
        assert lazy_cfg == cfg
        same(jax.tree.map(lambda leaf: leaf.read(), lazy), params)


def test_the_order_of_a_mixed_pattern_is_pointed_out(tmp_path):
    cfg = ej.presets.tiny("E-*")
    ej.save_nested(tmp_path / "n", random_params(cfg), cfg, budgets={})
    (note,) = convert.export_hf(tmp_path / "n", tmp_path / "hf")
    assert "llama.cpp" in note


def test_refusals_come_before_any_byte(nested, released, cfg, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("keep")
    before = sorted(tmp_path.rglob("*"))
    export, cut = convert.export_hf, convert.slice_nested
    for call, words in (
        (lambda: export(nested, taken), "taken exists.*--force"),
        (lambda: convert.import_hf(released, taken), "taken exists.*--force"),
        (lambda: cut(nested, taken, "12b"), "taken exists.*--force"),
        (lambda: export(nested, nested, overwrite=True), "within one another"),
        (lambda: cut(nested, nested / "x", "12b"), "within one another"),
        (lambda: export(nested, tmp_path / "x", "13b"), "no budget '13b'.*'12b'"),
        (lambda: export(nested, tmp_path / "x", {"embed": 20}), "embed"),
        (lambda: export(nested, tmp_path / "x", dtype="int8"), "floating"),
        (lambda: convert.import_hf(nested, tmp_path / "x"), "config.json"),
        (lambda: export(released, tmp_path / "x"), "manifest.json"),
        (
            lambda: convert.import_hf(
                released, tmp_path / "x", budgets={"b": {"embed": 7}}
            ),
            "embed",
        ),
        (
            lambda: export(
                nested, tmp_path / "x", {"heads_per_group": (4, 2, 4)},
                pad_to_uniform=True,
            ),
            "counts channels",
        ),
        (
            lambda: export(nested, tmp_path / "x", {"expert_ffn": (32, 16)}),
            "--uniform",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert sorted(tmp_path.rglob("*")) == before


def test_counts_are_parsed():
    parse = convert.parse_budget_or_counts
    assert parse("12b") == "12b"
    assert parse("embed=64, ffn=16/32") == {"embed": 64, "ffn": (16, 32)}
    with pytest.raises(ValueError) as refused:
        parse("embd=64,ffn=x")
    for words in ("did you mean 'embed'", "'ffn=x'"):
        assert words in str(refused.value)


# ------------------------------------------------------------------- the command line


def test_three_commands(released, tmp_path, capsys):
    nested, out = tmp_path / "nested", tmp_path / "12b"
    assert main(["import", str(released), str(nested), "--budget", "a:embed=80"]) == 0
    counts = "embed=64,expert_ffn=32"
    assert main(["export", str(nested), "--budget", counts, str(out)]) == 0
    assert main(["slice", str(nested), str(tmp_path / "s"), "--budget", "a"]) == 0
    said = capsys.readouterr()
    assert f"written: {out}" in said.out and "write" in said.err
    assert open_hf(out).cfg.embed == 64
    assert ej.open_nested(tmp_path / "s").cfg.embed == 80
    assert main(["export", str(nested), str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["export", str(nested), str(out), "--force", "--dtype", "fp16"]) == 0
    assert open_hf(out).cfg.embed == 96
    for wrong in ("a", "a:b", ":embed=80"):
        assert main(["import", str(released), str(tmp_path / "x"), "--budget", wrong])
    assert not (tmp_path / "x").exists()


SLOW = """
    import sys, time
    from elastic_jax import convert, huggingface
    from elastic_jax.__main__ import main
    from elastic_jax.huggingface import shards
    from elastic_jax import stored

    def slowly(real):
        def call(*given, **more):
            print("begun", flush=True)
            time.sleep(0.2)
            return real(*given, **more)
        return call

    shards._write_shard = slowly(shards._write_shard)
    stored._zarr = slowly(stored._zarr)
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("command", ["export", "slice"])
def test_killed_in_the_middle_nothing_half_written_is_there(
    nested, tmp_path, command, number
):
    """A SIGTERM cleans up; what a SIGKILL leaves is hidden, and cleaned by the next."""
    target = tmp_path / "target"
    arguments = [command, str(nested), str(target), "--budget", "12b"]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) != 0
    left = [entry.name for entry in tmp_path.iterdir()]
    assert "target" not in left
    assert all(".partial-" in name for name in left)
    if number == signal.SIGTERM:
        assert left == []
    assert main(arguments) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]
