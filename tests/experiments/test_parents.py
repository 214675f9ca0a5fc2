"""An imported parent: its configuration rules, its files are part of the run's name."""

import hashlib
import json

import jax
import pytest

import elastic_jax as ej
from elastic_jax import fit
from experiments import parents, settings, training
from experiments.configs import tiny
from experiments.workdir import Workdir

CFG = ej.presets.tiny("M*E")


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """A directory that stands for a checkpoint of `CFG`, and its plan."""
    folder = tmp_path / "hf"
    (folder / "sub").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "sub/more.txt", ".downloaded"):
        (folder / name).write_text(name)
    monkeypatch.setattr("experiments.imported.read_config", lambda _: CFG)

    def plan():
        config = tiny.get_config()
        config.smoke = True
        config.parent = str(folder)
        config.model.vocab = 1  # is not used
        config.elastic.heads_per_group = (4, 3, 2)
        return settings.plan(config)

    return folder, plan


def test_the_model_is_the_imported_one(imported):
    _, plan = imported
    assert plan().cfg == CFG


def test_its_files_are_named_by_digest(imported):
    folder, plan = imported
    before = training.identity(plan(), plan().stages)
    assert set(before["parent"]) == {"config.json", "model.safetensors", "sub/more.txt"}
    digest = hashlib.sha256(b"model.safetensors").hexdigest()
    assert before["parent"]["model.safetensors"]["sha256"] == digest
    assert before == training.identity(plan(), plan().stages)

    (folder / "model.safetensors").write_text("other weights")
    (changed, size) = fit.differences(before, training.identity(plan(), plan().stages))
    assert changed.startswith("parent.model.safetensors.sha256: was")
    assert size.startswith("parent.model.safetensors.size_bytes: was")


def test_it_is_loaded_and_judged_and_not_trained(imported, tmp_path, monkeypatch):
    folder, plan = imported
    weights = jax.jit(ej.init_params, static_argnums=1)(jax.random.key(0), CFG)
    load = {str(folder): weights}.__getitem__
    monkeypatch.setattr("experiments.imported.load", load)
    workdir = Workdir(tmp_path / "run")
    params, facts = parents.parent(plan(), workdir, allow_changes=False)
    assert params is weights
    assert facts["imported"] == str(folder) and 0 <= facts["value"] <= 1
    assert "floor" not in facts and not (workdir.path / "parent").exists()
    json.dumps(facts)


def test_what_is_wrong_with_it_joins_the_other_mistakes(tmp_path):
    config = tiny.get_config()
    config.parent = str(tmp_path / "nowhere")
    config.save_every = 0
    with pytest.raises(settings.InvalidConfig) as error:
        settings.plan(config)
    assert "nowhere" in str(error.value) and "save_every" in str(error.value)


def test_a_toy_has_no_files():
    assert settings.plan(tiny.get_config()).parent_files == {}
