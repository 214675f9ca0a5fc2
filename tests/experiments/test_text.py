"""The experiment on text, end to end at smoke size."""

import json

import pytest

import elastic_jax as ej


def test_it_judges_restored_slices_by_bits_per_byte(text_workdir):
    results = json.loads((text_workdir / "results.json").read_text())
    assert results["measure"] == "bits per byte"
    nested = ej.open_nested(text_workdir / "checkpoint")
    assert set(nested.budgets) == {b["name"] for b in results["budgets"]}
    for budget in results["budgets"]:
        for key in ("value", "untrained_value"):
            assert 0 < budget[key] < 12
        assert 0 <= budget["kl"] and 0 <= budget["untrained_kl"]
    full, small = results["budgets"]
    assert full["untrained_kl"] < 1e-6 < small["untrained_kl"]
    assert full["untrained_value"] == pytest.approx(results["parent"]["value"])


def test_the_report_speaks_of_text(text_workdir):
    report = (text_workdir / "report.md").read_text()
    for words in ("## Bits per byte", "held-out text", "bits per byte after 4 steps"):
        assert words in report
    for word in ("answer", "problem"):
        assert word not in report
    for plot in text_workdir.glob("*.png"):
        assert f"]({plot.name})" in report


def test_the_run_names_every_file(text_workdir):
    files = json.loads((text_workdir / "identity.json").read_text())["files"]
    assert len(files) > 50
    assert all(len(record["sha256"]) == 64 for record in files.values())
