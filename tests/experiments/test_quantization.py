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
from experiments import quantization, settings
from experiments.configs import qad, tiny
from experiments.workdir import Workdir

FLAGS = (
    "--config.quantization.arms=('nvfp4_qad',)",
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
    arms, budgets = ("bf16", "nvfp4_qad"), ("full", "small")
    assert [(r["arm"], r["budget"]) for r in rows] == [
        (arm, budget) for arm in arms for budget in budgets
    ]
    by = {(row["arm"], row["budget"]): row for row in rows}
    for budget in budgets:
        assert by["bf16", budget]["kl"] < by["nvfp4_qad", budget]["kl"]
        packed = by["nvfp4_qad", budget]["memory_bytes"]
        assert packed < 0.5 * by["bf16", budget]["memory_bytes"]
    assert "6/6" not in said  # elastic training was read back
    text = (workdir / "quantization.md").read_text()
    assert "NVFP4 QAD" in text and "A smoke run" in text


def test_a_row_is_of_what_its_checkpoint_restores(run, found):
    """Trained under scales that were frozen: those of the weights before."""
    workdir, _ = run
    opened = ej.open_nested(workdir / "quantized" / "nvfp4_qad-0")
    params, cfg = opened.restore()
    specs = ej.param_specs(cfg)
    recipe = ej.Recipe("nvfp4", (("*", "nvfp4"), ("moe/router", "keep")))
    packed = lambda leaf: isinstance(leaf, QuantArray)
    leaves = jax.tree.leaves(params, is_leaf=packed)
    assert sum(map(packed, leaves)) == len(formats(specs, cfg, recipe))
    assert {w.dtype for w in leaves if not packed(w)} == {jnp.dtype("bfloat16")}
    small = opened.restore("small")[0]
    rows = {(r["arm"], r["budget"]): r for r in found["seeds"]["0"]}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(small))
    assert rows["nvfp4_qad", "small"]["memory_bytes"] == size
    before = ej.open_nested(workdir / "checkpoint").restore()[0]
    untrained = ej.quantize(before, specs, cfg, recipe)
    one, other = params["lm_head"], untrained["lm_head"]
    assert np.array_equal(one.block_scale, other.block_scale)
    assert float(one.scale) == float(other.scale) and one.input_scale is not None
    assert not np.array_equal(one.values, other.values)


def test_what_is_measured_is_not_measured_again(run):
    """There is nothing to train from, and nothing that needs it."""
    workdir, _ = run
    config = tiny.get_config()
    config.smoke = True
    for flag in FLAGS:
        name, _, text = flag.removeprefix("--config.").partition("=")
        assert not list(settings._override(config, name, text))
    plan, before = settings.plan(config), (workdir / "quantization.json").read_bytes()
    quantization.measure(plan, Workdir(workdir), None, allow_changes=False)
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
