"""Arms of quantization, on a nested training that is there already."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax.quantize import formats
from elastic_kernels import QuantArray
from experiments import settings
from experiments.configs import qad, tiny

FLAGS = (
    "--config.quantization.arms=('nvfp4_ptq', 'nvfp4_qad')",
    "--config.quantization.rules=(('*', 'arm'), ('moe/router', 'keep'))",
    "--config.quantization.stage.steps=2",
    "--config.quantization.stage.batch=4",
    "--config.quantization.stage.micro_batch=2",
    "--config.quantization.stage.warmup_steps=1",
    "--config.quantization.scales=frozen",
)


@pytest.fixture(scope="module")
def run(smoke_workdir, smoke_run, tmp_path_factory):
    """A finished run that is asked for quantization afterwards."""
    workdir = tmp_path_factory.mktemp("quantized") / "run"
    shutil.copytree(smoke_workdir, workdir)
    done = smoke_run(workdir, *FLAGS)
    assert done.returncode == 0, done.stdout
    return workdir, done.stdout


@pytest.fixture(scope="module")
def found(run):
    return json.loads((run[0] / "quantization.json").read_text())


def test_every_budget_of_every_arm_is_there(run, found):
    workdir, said = run
    rows = found["seeds"]["0"]
    arms, budgets = ("bf16", "nvfp4_ptq", "nvfp4_qad"), ("full", "small")
    assert [(r["arm"], r["budget"]) for r in rows] == [
        (arm, budget) for arm in arms for budget in budgets
    ]
    by = {(row["arm"], row["budget"]): row for row in rows}
    for budget in budgets:
        assert by["bf16", budget]["kl"] < by["nvfp4_ptq", budget]["kl"]
        packed = by["nvfp4_ptq", budget]["memory_bytes"]
        assert packed < 0.5 * by["bf16", budget]["memory_bytes"]
    assert "step 6" not in said  # elastic training was read back
    text = (workdir / "quantization.md").read_text()
    assert "NVFP4 QAD" in text and "A smoke run" in text


def test_a_row_is_of_what_its_checkpoint_restores(run, found):
    """The arms differ in weights, and share the scales, which were frozen."""
    workdir, _ = run
    trees = {}
    for arm in ("nvfp4_ptq", "nvfp4_qad"):
        opened = ej.open_nested(workdir / "quantized" / f"{arm}-0")
        params, cfg = opened.restore()
        specs = ej.param_specs(cfg)
        rules = (("*", "nvfp4"), ("moe/router", "keep"))
        chosen = formats(specs, cfg, ej.Recipe("nvfp4", rules))
        packed = lambda leaf: isinstance(leaf, QuantArray)
        leaves = jax.tree.leaves(params, is_leaf=packed)
        assert sum(map(packed, leaves)) == len(chosen)
        assert {w.dtype for w in leaves if not packed(w)} == {jnp.dtype("bfloat16")}
        trees[arm] = params["lm_head"]
        small = opened.restore("small")[0]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(small))
        rows = {(r["arm"], r["budget"]): r for r in found["seeds"]["0"]}
        assert rows[arm, "small"]["memory_bytes"] == size
    one, other = trees.values()
    assert np.array_equal(one.block_scale, other.block_scale)
    assert float(one.input_scale) == float(other.input_scale)
    assert not np.array_equal(one.values, other.values)


def test_a_second_run_measures_nothing_again(run, smoke_run):
    workdir, _ = run
    before = (workdir / "quantization.json").read_bytes()
    (workdir / "results.json").unlink()  # as if it had been killed before the end
    done = smoke_run(workdir, *FLAGS)
    assert done.returncode == 0, done.stdout
    assert "quantization: seed" not in done.stdout
    assert (workdir / "quantization.json").read_bytes() == before


def test_the_config_is_a_plan():
    for smoke in (False, True):
        config = qad.get_config()
        config.smoke = smoke
        plan = settings.plan(config)
        assert plan.quantized_stage.router == "frozen"
        assert all(recipe.rules for recipe in plan.recipes.values())
    assert {"nvfp4_qad", "nvfp4_qat", "fp8_ptq"} < set(settings.ARMS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arms": ("nvfp4",)}, r"arms: expected some of \('fp8_ptq'.*\['nvfp4'\]"),
        ({"arms": ("fp8_ptq", "fp8_ptq")}, "each once"),
        ({"arms": ("fp8_ptq",), "seeds": 0}, "seeds: expected at least 1"),
        ({"arms": ("fp8_ptq",), "rules": (("moe/uq", "keep"),)}, "no parameter; did"),
        ({"arms": ("fp8_ptq",), "scales": "warm"}, r"scales: .*'recomputed', 'frozen'"),
        ({"arms": ("fp8_qad",), "stage": {"router": "train"}}, "router='frozen'"),
        ({"arms": ("fp8_qad",), "stage": {"sampling": (1.0,)}}, "sampling has 1 "),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(changes, message):
    config = tiny.get_config()
    config.quantization.update(changes)
    with pytest.raises(settings.InvalidConfig, match=message):
        settings.plan(config)
