"""Training stages of an experiment that the configurations do not have."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import fit
from elastic_jax.curriculum import Stage
from experiments import settings, training
from experiments.configs import base, tiny
from experiments.workdir import Workdir


@pytest.fixture(scope="module")
def plan():
    """The tiny experiment at smoke size, with a third stage, of mixed prefixes."""
    config = tiny.get_config()
    config.smoke = True
    config.save_every = config.when_smoke.log_every = 1
    config.when_smoke.model.pattern = "ME"
    sizes = {"steps": 3, "context": 64, "batch": 4, "micro_batch": 2}
    config.stages.mixed = base.stage(
        **sizes, warmup_steps=0, router="frozen", mixed_prefixes=0.5
    )
    config.stages.names = ("short", "long", "mixed")
    return settings.plan(config)


def test_a_stage_of_mixed_prefixes_is_planned_trained_and_resumed(plan, tmp_path):
    short, long, mixed = plan.stages
    assert short.mixed_prefixes == long.mixed_prefixes == 0
    assert isinstance(mixed, Stage) and mixed.mixed_prefixes == 0.5
    plan = dataclasses.replace(plan, stages=(mixed,))
    counts = {"full": ej.counts(plan.cfg)}
    counts["small"] = ej.counts(plan.cfg, embed=48, heads_per_group=4, expert_ffn=32)
    start = jax.jit(ej.init_params, static_argnums=1)(jax.random.key(0), plan.cfg)

    def train(folder):
        state, settled, _ = training.elastic_training(
            plan, Workdir(folder), "elastic", start, counts=counts
        )
        assert settled == counts
        rows = fit.MetricLog(folder / "elastic" / "metrics").rows()
        return jax.tree.map(np.asarray, state), rows

    whole, rows = train(tmp_path / "whole")
    names = {key for row in rows for key in row if key.startswith("loss/")}
    assert {name.removeprefix("loss/") for name in names} & {
        "small-to-full",
        "full-to-small",
    }
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "elastic" / "step_00000003")
    resumed, again = train(tmp_path / "cut")
    for got, want in zip(*map(jax.tree.leaves, (resumed, whole)), strict=True):
        np.testing.assert_array_equal(got, want)
    assert again == rows and len(rows) == 3
    assert np.any(np.asarray(start["lm_head"]) != whole.params["lm_head"])
