"""The journeys of the users, end to end on one smoke run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax.__main__ import main
from elastic_jax.budgets import ZONE


@pytest.fixture(scope="module")
def nested(smoke_workdir):
    return ej.open_nested(smoke_workdir / "checkpoint")


def test_an_experiment_leaves_what_it_promises(smoke_workdir):
    results = json.loads((smoke_workdir / "results.json").read_text())
    assert {b["name"] for b in results["budgets"]} == {"full", "small"}
    for budget in results["budgets"]:
        assert abs(budget["cost_over_target"] - 1) <= ZONE
    counts = [json.dumps(b["counts"], sort_keys=True) for b in results["budgets"]]
    assert len(set(counts)) == len(counts)
    assert {"parent", "scores", "elastic", "controls"} <= set(results["seconds"])
    assert results["parent"]["floor"] == 0
    report = (smoke_workdir / "report.md").read_text()
    for plot in smoke_workdir.glob("*.png"):
        assert f"]({plot.name})" in report
    assert list((smoke_workdir / "elastic" / "metrics").glob("events.*"))


def test_a_rerun_says_that_the_run_is_complete(smoke_run, smoke_workdir):
    before = {p: p.stat().st_mtime_ns for p in smoke_workdir.rglob("manifest.json")}
    done = smoke_run(smoke_workdir)
    assert done.returncode == 0, done.stdout
    assert "complete" in done.stdout
    after = {p: p.stat().st_mtime_ns for p in smoke_workdir.rglob("manifest.json")}
    assert before == after


def test_another_configuration_in_the_same_workdir_is_refused(smoke_run, smoke_workdir):
    done = smoke_run(smoke_workdir, "--config.seed=5")
    assert done.returncode == 2
    assert "seed" in done.stdout and "Traceback" not in done.stdout


def test_slices_are_cut_in_one_jitted_call(nested):
    """Trained budgets and counts nobody planned; the restored submodel is the slice."""
    params, cfg = nested.restore()
    specs = ej.param_specs(cfg)
    slice_fn = jax.jit(ej.slice_params, static_argnums=(1, 2))
    unplanned = ej.counts(cfg, embed=64, experts=5, q_per_kv=1)
    before = slice_fn._cache_size()  # shared by all jits of one function
    for counts in [*nested.budgets.values(), unplanned]:
        small = slice_fn(params, specs, counts)
        restored, small_cfg = nested.restore(counts)
        assert small_cfg == ej.slice_config(cfg, counts)
        assert jax.tree.structure(small) == jax.tree.structure(restored)
        for ours, theirs in zip(*map(jax.tree.leaves, (small, restored)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    compiled = slice_fn._cache_size()
    assert compiled == before + len(nested.budgets) + 1
    slice_fn(params, ej.param_specs(cfg), unplanned)
    assert slice_fn._cache_size() == compiled


def test_a_budget_generates_what_its_masked_parent_does(nested):
    params, cfg = nested.restore()
    small, small_cfg = nested.restore("small")
    masks = ej.masks_from_counts(cfg, nested.budgets["small"])
    prompts = np.random.default_rng(0).integers(5, cfg.vocab, (4, 6))
    options = {"max_new_tokens": 8, "lengths": [6, 3, 5, 1]}
    sliced = ej.generate(small, prompts, small_cfg, **options)
    masked = ej.generate(params, prompts, cfg, masks=masks, **options)
    np.testing.assert_array_equal(sliced.tokens, masked.tokens)


def test_a_budget_leaves_for_transformers(smoke_workdir, nested, tmp_path):
    """The experiment's checkpoint, exported by the command line, read by PyTorch."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path, out = str(smoke_workdir / "checkpoint"), str(tmp_path / "small")
    assert main(["export", path, out, "--budget", "small"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for block in model.model.layers:  # its prefill clamps dt, its decoding does not
        if hasattr(block.mixer, "time_step_limit"):
            block.mixer.time_step_limit = (0.0, float("inf"))
    params, cfg = nested.restore("small")
    tokens = np.arange(24).reshape(2, 12) % cfg.vocab
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), use_cache=False).logits.numpy()
    ours = ej.apply(params, jnp.asarray(tokens), cfg)
    bound = 2e-5 * np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)
