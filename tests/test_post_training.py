"""From a nested checkpoint and text to a quantized one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import axes
from elastic_jax.post_training import CalibrationText, quantize_nested
from elastic_jax.quantize import Recipe, formats
from elastic_kernels import QuantArray

CFG = dataclasses.replace(ej.presets.tiny("ME-"), vocab=260)
SPECS = ej.param_specs(CFG)
BUDGETS = {"full": ej.counts(CFG), "small": ej.counts(CFG, embed=48, experts=5)}
RECIPE = Recipe("nvfp4", (("mlp/*", "fp8"), ("moe/shared*", "keep")))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)

    def draw(path, spec):
        shape = axes.shape(CFG, SPECS, path, spec)
        return jnp.asarray(rng.standard_normal(shape) * 0.2 + (spec.init == "ones"))

    return axes.map_specs(draw, SPECS)


@pytest.fixture(scope="module")
def plain(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("nested") / "plain"
    ej.save_nested(
        path,
        params,
        CFG,
        budgets=BUDGETS,
        router={"w": np.ones(3)},
        scores={"embed": np.arange(CFG.embed, dtype=np.float32)},
        provenance={"imported": "somewhere"},
    )
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes(b"what one reads to learn how loud one is. " * 20)
    return str(file)


def test_a_quantized_checkpoint_holds_all_that_the_plain_one_did(
    params, plain, text, tmp_path
):
    calls, state = [], tmp_path / "inputs.npz"
    calibration = CalibrationText((text,), 5, context=24, batch=2, state=str(state))
    done = quantize_nested(
        plain,
        tmp_path / "packed",
        RECIPE,
        calibration=calibration,
        progress=lambda *call: calls.append(call),
    )
    opened = ej.open_nested(tmp_path / "packed")
    assert opened.budgets == BUDGETS
    assert np.array_equal(opened.router()["w"], np.ones(3))
    assert len(opened.scores()["embed"]) == CFG.embed
    record = opened.provenance["quantized"]
    assert opened.provenance["imported"] == "somewhere"
    assert record["recipe"]["rules"] == [list(rule) for rule in RECIPE.rules]
    assert record["calibration"]["batches"] == 3 and state.exists()
    assert [call for call in calls if call[0] == "calibrate"][-1][1:] == (3, 3)

    got = opened.restore()[0]
    leaves = {path: axes.leaf(got, path) for path, _ in SPECS}
    packed = {p: w for p, w in leaves.items() if isinstance(w, QuantArray)}
    assert {p: w.format for p, w in packed.items()} == formats(SPECS, CFG, RECIPE)
    assert all(jnp.all(w.input_scale > 0) for w in packed.values())
    again = ej.quantize(params, SPECS, CFG, RECIPE, like=got)
    for a, b in zip(*map(jax.tree.leaves, (got, again)), strict=True):
        assert np.array_equal(a, b)
    assert {row.path for row in done.errors} == set(packed)
    small, cfg = opened.restore("small")
    tokens = np.arange(12).reshape(1, 12)
    assert np.isfinite(ej.apply(small, tokens, cfg)).all()


def test_without_text_weights_alone(plain, tmp_path):
    done = quantize_nested(plain, tmp_path / "packed", Recipe("fp8"))
    up = ej.open_nested(tmp_path / "packed").restore()[0]["layers"][1]["up"]
    assert up.format == "fp8" and up.input_scale is None
    assert done.never_met == {} and done.table

    def refused(message, *given, **options):
        with pytest.raises(ValueError, match=message):
            quantize_nested(*given, Recipe("fp8"), **options)

    refused("exists: take another path", plain, tmp_path / "packed")
    refused("quantized already", tmp_path / "packed", tmp_path / "other")
    refused("is what is read", plain, plain, overwrite=True)
    assert not (tmp_path / "other").exists()


def test_text_that_does_not_fit(params, text, tmp_path):
    cfg = dataclasses.replace(CFG, vocab=64)
    ends = {"embedding": params["embedding"][:64], "lm_head": params["lm_head"][:, :64]}
    cut = params | ends
    ej.save_nested(tmp_path / "narrow", cut, cfg, budgets={})
    calibration = CalibrationText((text,))
    with pytest.raises(ValueError, match=r"the text needs \d+ tokens.* no tokenizer"):
        quantize_nested(
            tmp_path / "narrow",
            tmp_path / "packed",
            Recipe("fp8"),
            calibration=calibration,
        )
    with pytest.raises(ValueError, match=r"(?s)rows: .*got 0.*at least one"):
        CalibrationText((), rows=0)
