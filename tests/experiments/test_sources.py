"""Tasks: data by use, judged as promised, and files that are named when they change."""

import importlib.util
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import fit
from elastic_jax.corpus import read_corpus
from elastic_jax.data import batches
from elastic_jax.packing import Rows
from experiments import parents, run, settings, sources, training
from experiments.workdir import Workdir

CONFIGS = pathlib.Path(__file__).parents[2] / "experiments" / "configs"
CFG = ej.ModelConfig(**{**ej.presets.tiny("M").to_dict(), "vocab": 259})


def configured(**data):
    """The text experiment at smoke size, on other files."""
    spec = importlib.util.spec_from_file_location("text", CONFIGS / "text.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.smoke = True
    config.data.update({"held_out": 0.3} | data)
    return config


@pytest.fixture
def folder(tmp_path):
    """Two sources: 40 text files, and 30 lines of tokens."""
    draw = np.random.default_rng(0)
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_bytes(draw.bytes(int(draw.integers(99, 400))))
    lines = [draw.integers(0, 256, 250).tolist() for _ in range(30)]
    text = "".join(json.dumps({"tokens": line}) + "\n" for line in lines)
    (tmp_path / "lines.jsonl").write_text(text)
    return tmp_path


def both(folder) -> dict:
    files = str(folder / "*.txt"), str(folder / "lines.jsonl")
    return {"files": files, "weights": (3.0, 1.0)}


def test_a_uniform_model_needs_log2_of_its_vocabulary(folder):
    """Bits per byte: all targets, document ends too, over the bytes of the text."""
    corpus = read_corpus([str(folder / "*.txt")])
    documents = corpus.documents
    rows = Rows(documents, 64)
    params = jax.jit(ej.init_params, static_argnums=1)(jax.random.key(0), CFG)
    params["lm_head"] = jnp.zeros_like(params["lm_head"])
    targets = len(documents.tokens) - len(documents)
    expected = math.log2(259) * targets / documents.size_bytes.sum()
    for batch in (7, 32):
        found = sources.bits_per_byte(params, CFG, rows, batch=batch)
        assert found == pytest.approx(expected, rel=1e-5)


def test_what_is_judged_and_calibrated_on_is_never_trained_on(folder):
    """Every document is random, so ten bytes of one are in no other."""
    task = settings.plan(configured(**both(folder))).task

    def pieces(name):
        """Every ten tokens in a row of one segment."""
        found = set()
        for row in (task.data[name][i] for i in range(len(task.data[name]))):
            for segment in range(1, row["segment_ids"].max() + 1):
                tokens = row["tokens"][row["segment_ids"] == segment]
                found |= {tokens[i : i + 10].tobytes() for i in range(len(tokens) - 9)}
        return found

    trained = pieces("parent") | pieces("short") | pieces("long")
    assert pieces("parent") & pieces("short")
    for name in ("calibration", "evaluation"):
        assert pieces(name) and not pieces(name) & trained


def test_sources_are_mixed_by_weight(folder):
    plan = settings.plan(configured(**both(folder)))
    source = plan.task.data["short"]
    text, tokens = source.ranges
    steps = batches(source, batch=8, seed=0)
    drawn = np.concatenate([next(steps)["index"] for _ in range(25)])
    assert np.mean(np.isin(drawn, text)) == pytest.approx(0.75, abs=0.01)
    assert np.mean(np.isin(drawn, tokens)) == pytest.approx(0.25, abs=0.01)
    without = settings.plan(configured(**both(folder) | {"weights": ()}))
    assert len(without.task.data["short"]) == pytest.approx(len(source), abs=1)


def test_all_rows_of_stacked_are_there_once():
    examples = [{"a": np.full(3, i)} for i in range(5)]
    first, last = sources.stacked(examples, 4)
    np.testing.assert_array_equal(first["a"][:, 0], [0, 1, 2, 3])
    np.testing.assert_array_equal(last["a"][:, 0], [4, 0, 0, 0])


def damaged(folder, change):
    files, lines = sorted(folder.glob("*.txt")), folder / "lines.jsonl"
    if change == "edited":
        data = bytearray(files[7].read_bytes())
        data[50] ^= 1
        files[7].write_bytes(data)
        return files[7]
    if change == "shortened":
        files[7].write_bytes(files[7].read_bytes()[:-1])
        return files[7]
    if change == "missing":
        files[7].unlink()
        return files[7]
    if change == "added":
        (folder / "99.txt").write_bytes(b"new")
        return folder / "99.txt"
    text = lines.read_text().splitlines(keepends=True)
    lines.write_text("".join(text[::-1]))
    return lines


@pytest.mark.parametrize(
    "change", ["edited", "shortened", "missing", "added", "reordered"]
)
def test_a_changed_file_is_named_before_anything_runs(folder, tmp_path, change):
    """RELIABILITY: digest mismatch named before step 0."""

    class Began(Exception):
        pass

    def begin(*_, **__):
        raise Began

    def experiment():
        plan = settings.plan(configured(**both(folder)))
        run.experiment(plan, Workdir(tmp_path / "run"), allow=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parents, "parent", begin)
        for _ in range(2):  # begun, and continued with the same files
            with pytest.raises(Began):
                experiment()
        file = damaged(folder, change)
        with pytest.raises(ValueError) as error:
            experiment()
    assert f"files.{file}" in str(error.value)
    assert str(error.value).count("\n  files.") <= 2
    assert "restore what changed" in str(error.value)


def test_files_in_another_order_are_another_run(folder):
    given = both(folder)
    plans = [
        settings.plan(configured(**given | {"files": files, "weights": (1.0, 1.0)}))
        for files in (given["files"], given["files"][::-1])
    ]
    one, other = (training.identity(plan, plan.stages) for plan in plans)
    named = "\n".join(fit.differences(one, other))
    last = folder / "39.txt"
    assert f"files.{folder / 'lines.jsonl'}.after: was '{last}', is ''" in named


def test_mistakes_of_files_come_with_those_of_the_rest(folder):
    (folder / "bad.jsonl").write_text("{\n")
    config = configured(files=(str(folder / "bad.jsonl"), str(folder / "no.txt")))
    config.save_every = 0
    with pytest.raises(settings.InvalidConfig) as error:
        settings.plan(config)
    for words in (
        f"{folder / 'bad.jsonl'}:1: ",
        f"{folder / 'no.txt'}: ",
        "save_every",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"weights": (1.0,)}, "data.weights: 1 weights for 2 entries"),
        ({"held_out": 1.0}, "held_out: expected a share"),
        ({"held_out": 0.01}, "rows were asked for"),
        ({"tokenizer": "no/tokenizer.json"}, "no/tokenizer.json: no such file"),
    ],
)
def test_mistakes_of_the_group_are_named(folder, change, words):
    with pytest.raises(settings.InvalidConfig) as error:
        settings.plan(configured(**both(folder) | change))
    assert words in str(error.value)


def test_a_vocabulary_that_is_too_small_is_named(folder):
    config = configured(**both(folder))
    config.model.vocab = 256
    with pytest.raises(settings.InvalidConfig, match="256: the data need 259 tokens"):
        settings.plan(config)


def test_the_two_tasks_answer_the_same_questions(folder):
    """Of either: rows for all uses in one form, and an evaluation with a value."""
    tiny = pathlib.Path(CONFIGS / "tiny.py")
    spec = importlib.util.spec_from_file_location("tiny", tiny)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.smoke = True
    for chosen in (config, configured(**both(folder))):
        plan = settings.plan(chosen)
        assert set(plan.task.data) == {
            "parent", "calibration", "evaluation", "short", "long",
        }  # fmt: skip
        for source in plan.task.data.values():
            row = source[0]
            assert set(row) == {
                "tokens", "targets", "segment_ids", "weights", "answer",
            }  # fmt: skip
            assert row["tokens"].max() < plan.task.vocab <= plan.cfg.vocab
            assert len(source.digest()) == 64
        cfg = ej.ModelConfig(**CFG.to_dict() | {"vocab": plan.cfg.vocab})
        params = jax.jit(ej.init_params, static_argnums=1)(jax.random.key(0), cfg)
        found = plan.task.evaluate(params, cfg)
        assert plan.task.measure.low <= found["value"] <= plan.task.measure.high
        assert len(found["parts"]) > 1
        checked = plan.task.check(params, cfg)
        assert plan.task.measure.low <= checked <= plan.task.measure.high
