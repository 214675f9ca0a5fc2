"""The command line: what `inspect` prints is true, and mistakes end in a message."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax.__main__ import main
from elastic_jax.quantize import size_bytes
from elastic_jax.saves import TrainCheckpoints
from elastic_jax.tables import format_bytes
from elastic_kernels import QuantArray

ROOT = pathlib.Path(__file__).parent.parent
CFG = ej.presets.tiny("ME*-")
SMALL = ej.counts(CFG, embed=48, heads_per_group=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("nested") / "checkpoint"
    params = ej.init_params(jax.random.key(0), CFG)
    params["lm_head"] = params["lm_head"].astype("bfloat16")
    ej.save_nested(
        path,
        params,
        CFG,
        budgets={"full": ej.counts(CFG), "[red]small": SMALL},
        scores={"embed": params["final_norm"]},
        provenance={"data": "from [/nowhere]", "run": {"seed": 17}},
    )
    return path


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def rows(text: str) -> list[list[str]]:
    """The cells of every table row."""
    lines = (line.strip("│ ") for line in text.splitlines() if "│" in line)
    return [[cell.strip() for cell in line.split("│")] for line in lines]


def test_inspect_prints_what_is_stored(saved, capsys):
    assert main(["inspect", str(saved)]) == 0
    out, err = capsys.readouterr()
    printed = rows(out)
    assert not err
    for field, value in CFG.to_dict().items():
        assert [field, str(value)] in printed
    specs = ej.param_specs(CFG)
    for name, counts in (("parent", None), ("full", None), ("[red]small", SMALL)):
        cost = ej.cost(specs, CFG, counts=counts)
        row = next(row for row in printed if row[0] == name)
        assert row[2:4] == [f"{cost.total_params:,}", f"{cost.active_params:,}"]
        kib = cost.weight_bytes("bf16") / 1024
        assert row[5] == f"{kib:,.1f} KiB"
    assert "heads_per_group 2" in out and "embed 48" in out
    assert ["params", "float32", str(len(specs) - 1)] in [row[:3] for row in printed]
    head = format_bytes(2 * CFG.embed * CFG.vocab)
    assert ["params", "bfloat16", "1", head] in printed
    assert ["scores", "float32", "1", "384 B"] in printed
    assert ["data", "from [/nowhere]"] in printed and "'seed': 17" in out
    stored = sum(f.stat().st_size for f in saved.glob("arrays-*/**/*") if f.is_file())
    assert f"{stored / 1024:,.1f} KiB on disk" in out


def test_inspect_says_what_quantized_weights_take(tmp_path, capsys):
    cfg = ej.presets.tiny("ME-")
    specs = ej.param_specs(cfg)
    recipe = ej.Recipe("nvfp4", (("mlp/up", "fp8"), ("mlp/down", "fp8")))
    params = ej.init_params(jax.random.key(0), cfg)
    params = ej.quantize(params, specs, cfg, recipe)
    counts = ej.counts(cfg, embed=48)
    ej.save_nested(tmp_path / "c", params, cfg, budgets={"small": counts})
    assert main(["inspect", str(tmp_path / "c")]) == 0
    printed = rows(capsys.readouterr().out)
    for name, kept in (("parent", ej.counts(cfg)), ("small", counts)):
        size = size_bytes(ej.slice_params(params, specs, kept))
        row = next(row for row in printed if row[0] == name)
        assert row[6] == format_bytes(size)
    stored = {row[1].split()[0]: row for row in printed if row[0] == "params"}
    assert set(stored) == {"nvfp4,", "fp8,", "float32"}
    for format in ("nvfp4", "fp8"):
        of_it = [
            leaf
            for leaf in jax.tree.leaves(
                params, is_leaf=lambda leaf: isinstance(leaf, QuantArray)
            )
            if isinstance(leaf, QuantArray) and leaf.format == format
        ]
        size, weights = size_bytes(of_it), sum(np.prod(w.shape) for w in of_it)
        said = f"{format}, {8 * size / weights:.2f} bits a weight"
        assert stored[f"{format},"][1:] == [said, str(len(of_it)), format_bytes(size)]


def test_inspect_reads_no_array(saved, capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("an array was read")

    monkeypatch.setattr("elastic_jax.stored.StoredArrays._read", refuse)
    assert main(["inspect", str(saved)]) == 0


def test_what_is_no_nested_checkpoint_is_refused(tmp_path, capsys):
    with TrainCheckpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, {"step": np.int32(1)}, {})
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "manifest.json").write_text('{"format": "elastic')
    for path in (tmp_path / "absent", tmp_path / "run" / "step_00000001", torn):
        assert main(["inspect", str(path)]) == 2
        out, err = capsys.readouterr()
        assert not out and str(path) in err


@pytest.mark.parametrize("arguments", [[], ["inspekt", "x"], ["inspect"]])
def test_unknown_commands_show_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m elastic_jax" in capsys.readouterr().err


def test_the_module_runs_and_shows_no_stack_trace(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "elastic_jax", "inspect", tmp_path / "absent"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )
    assert done.returncode == 2, done.stderr
    assert str(tmp_path / "absent") in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def writer(tmp_path_factory, talker):
    """A checkpoint with a chat template that would be noticed if anybody ran it."""
    params, cfg = talker
    path = tmp_path_factory.mktemp("writer") / "checkpoint"
    payloads = {
        "chat_template.jinja": b"{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "tokenizer_config.json": b'{"chat_template": "{% for i in range(10**12) %}'
        b'{% endfor %}"}',
        "generation_config.json": b'{"eos_token_id": [7, 5000]}',
    }
    budgets = {"full": ej.counts(cfg), "small": ej.counts(cfg, embed=32)}
    ej.save_nested(path, params, cfg, budgets=budgets, files=payloads)
    return path


def test_generate_answers_lines_of_json(writer, capsys, tmp_path):
    """A bad line has its error in its own reply; templates are never looked at."""
    lines = [
        {"id": 1, "prompt": [1, 2, 3], "budget": "small"},
        {"id": 2, "prompt": [5], "think": "small", "thinking_cap": 4, "grace": 0},
        {"id": 3, "prompt": [5], "budget": "nobody"},
        {"id": 4, "prompt": [500]},
    ]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join([*map(json.dumps, lines), "", "{"]))
    given = ["--jsonl", str(file), "--max-new-tokens", "6", "--end-of-thinking", "!"]
    assert main(["generate", str(writer), *given]) == 0
    out, err = capsys.readouterr()
    replies = [json.loads(line) for line in out.splitlines()]
    assert {r["id"] for r in replies if "error" in r} == {3, 4, None}
    assert "line 6: " in next(r["error"] for r in replies if r["id"] is None)
    by_id = {reply["id"]: reply for reply in replies}
    assert by_id[1]["tokens"] == 6 or by_id[1]["stopped"]
    assert by_id[2]["thought_tokens"] <= 5 and by_id[2]["capped"]
    for words in ("think", "tokens/s", "first token", "2 requests in 2 batches"):
        assert words in err


def test_generate_types_one_text(writer, capsys):
    given = ["--prompt", "!", "--budget", "small", "--max-new-tokens", "4"]
    assert main(["generate", str(writer), *given]) == 2
    assert "token 257 is outside the vocabulary of 97" in capsys.readouterr().err


def test_generate_says_that_templates_are_not_run(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "Chat templates are not run" in capsys.readouterr().out


# ---------------------------------------------------------------------------- quantize


def test_quantize_writes_a_packed_checkpoint_and_says_what_it_did(
    saved, tmp_path, capsys
):
    target = tmp_path / "packed"
    given = ["quantize", str(saved), str(target), "--rule", "moe/up=fp8"]
    assert main([*given, "--rule", "attention/*=nvfp4"]) == 0
    out, _ = capsys.readouterr()
    printed = rows(out)
    nested = ej.open_nested(target)
    assert {*nested.budgets} == {"full", "[red]small"}
    layers = nested.restore("full")[0]["layers"]
    assert layers[1]["up"].format == "fp8" and layers[1]["down"].format == "nvfp4"
    assert layers[2]["q"].format == "nvfp4"
    size = format_bytes(4 * CFG.embed)
    assert ["moe/norm", "fp32", str(CFG.embed), size] in printed
    assert ["model/lm_head", "bf16"] in [row[:2] for row in printed]
    errors = {row[0]: row[1:] for row in printed if len(row) == 7}
    assert errors["1: moe/up"][0] == "fp8" and errors["2: attention/q"][0] == "nvfp4"
    assert 5 < float(errors["2: attention/q"][1].rstrip("%")) < 15
    assert "not calibrated: activations stay as they are" in out
    assert main(given) == 2
    assert "exists: take another path" in capsys.readouterr().err
    assert main(["quantize", str(saved), str(tmp_path / "x"), "--rule", "moe/up"]) == 2
    assert "format" in capsys.readouterr().err


def test_quantize_reads_text(tmp_path, capsys):
    cfg = ej.ModelConfig.from_dict(CFG.to_dict() | {"pattern": "E", "vocab": 260})
    params = ej.init_params(jax.random.key(0), cfg)
    ej.save_nested(tmp_path / "nested", params, cfg, budgets={})
    text = tmp_path / "a.txt"
    text.write_bytes(b"a little text " * 9)
    given = ["quantize", str(tmp_path / "nested"), str(tmp_path / "packed")]
    given += ["--format", "fp8", "--calibrate", str(text), "--rows", "3"]
    assert main([*given, "--context", "16", "--batch", "2"]) == 0
    out, _ = capsys.readouterr()
    up = ej.open_nested(tmp_path / "packed").restore()[0]["layers"][0]["up"]
    assert np.all(np.asarray(up.input_scale) > 0) and "not calibrated" not in out
    assert main([*given, "--force", "--context", "0"]) == 2
    assert "context: expected a positive int" in capsys.readouterr().err
