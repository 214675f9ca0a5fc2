"""A report is whole: every budget, every plot, and every gap is said."""

import copy
import json

import pytest

from elastic_jax import report

BUDGETS = ("full", "mid", "small")
CHOICES = {"embed": (32, 16), "experts": (4, 2)}


def metrics(step):
    row = {"step": step, "stage": "short" if step < 6 else "long", "loss": 1.0}
    for i, name in enumerate(BUDGETS):
        row[f"loss/{name}"] = (i + 1) / (step + 1)
        if step < 6:
            row[f"{name}/cost_over_target"] = 1.2 - step / 30
            for axis, counts in CHOICES.items():
                row[f"{name}/{axis}/count"] = float(counts[i > 0])
                row |= {f"{name}/{axis}/p/{n}": 0.5 for n in counts}
    return row


def whole():
    """Results of a run in which everything was measured."""
    return {
        "title": "Test",
        "measure": "exact answers",
        "command": "python run.py",
        "date": "2026-01-01",
        "versions": {"jax": "0"},
        "device": "cpu",
        "smoke": False,
        "seconds": {"parent": 61.0, "elastic": 2.0},
        "parent": {"value": 0.99, "floor": 0.95, "target": 0.98, "steps": 1500},
        "budgets": [
            {
                "name": name,
                "target": 1 - i / 4,
                "counts": {axis: n[i > 0] for axis, n in CHOICES.items()},
                "active_params": 241_312 - 51_001 * i,
                "total_params": 402_112 - 71_001 * i,
                "weight_bytes": 804_224 - 142_002 * i,
                "cost_over_target": 1.0 + i / 100,
                "value": 0.98 - i / 20,
                "parts": {"2 steps": 0.9, "10 steps": 0.5},
                "kl": 0.01 * i,
                "untrained_value": 0.98 - i / 3,
                "untrained_kl": 0.3 * i,
                "random_values": [0.97 - i / 5],
            }
            for i, name in enumerate(BUDGETS)
        ],
        "evaluation": {"problems": 512, "min_steps": 2, "max_steps": 8},
        "divergence": {
            run: {name: {"50": kl, "100": kl / 2, "end": kl / 4} for name in BUDGETS}
            for run, kl in (("main", 0.4), ("random-0", 0.6))
        },
        "orders": [
            {"axis": axis, "kept": 1, "full": 2, "ours": 0.5, "random": [0.6, 0.7]}
            for axis in CHOICES
        ],
        "importance": {"embed": [[3.0, 1.0]], "experts": [[1.0, 2.0], [0.0, 0.0]]},
        "never_routed": {"1": [3]},
        "router": {"feasible": ["mid: 6 combinations"], "accept": ["nested"]},
        "metrics": [metrics(step) for step in range(12)],
        "parent_metrics": [{"step": 0, "loss": 2.5}, {"step": 1, "loss": 0.5}],
        "alarms": {},
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return report.write_report(tmp_path_factory.mktemp("report"), whole())


def test_every_budget_has_its_row(written):
    lines = written.read_text().splitlines()
    for budget in whole()["budgets"]:
        cells = [f"{budget['active_params']:,}", f"{budget['value']:.1%}"]
        assert any(
            line.startswith(f"| {budget['name']} ") and all(c in line for c in cells)
            for line in lines
        )


def test_every_plot_is_a_png_shown_in_the_text(written):
    shown = set(report.PLOTS)
    assert {path.stem for path in written.parent.glob("*.png")} == shown
    for name in shown:
        path = written.parent / f"{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert f"]({path.name})" in written.read_text()


def test_a_whole_run_has_no_gaps(written):
    text = written.read_text()
    for sign in ("No plot", "unknown", "not recorded", "ot measured", "Not shown"):
        assert sign not in text


def test_lengths_of_problems_are_in_order(written):
    heading = next(x for x in written.read_text().splitlines() if "10 steps |" in x)
    assert heading.index(" 2 steps") < heading.index("10 steps")


def test_a_report_depends_on_the_results_alone(written, tmp_path):
    given = json.loads(json.dumps(whole()))
    before = copy.deepcopy(given)
    again = report.write_report(tmp_path, given)
    assert given == before
    assert again.read_text() == written.read_text()
    for path in written.parent.glob("*.png"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


GAPS = {
    "command": ["the command is unknown"],
    "date": ["at an unknown date"],
    "versions": ["unknown versions"],
    "device": ["an unknown device"],
    "seconds": ["*Not recorded.*"],
    "parent": ["The parent was not evaluated"],
    "evaluation": ["the number of problems is unknown"],
    "divergence": ["Not measured on both sides: KL after 50 steps"],
    "orders": ["slices were not compared with random orders"],
    "importance": ["there are no scores"],
    "never_routed": ["Experts that no token reached were not recorded"],
    "router": ["The checks of the router were not recorded"],
    "metrics": ["hold no losses of budgets", "hold no choices of a router"],
    "parent_metrics": ["The parent's losses were not recorded"],
    "alarms": ["Alarms were not recorded"],
    "value": ["Not measured: trained budgets", "no budget was evaluated"],
    "untrained_value": ["Not measured: untrained slices"],
    "random_values": ["Not measured: the control from a random order"],
    "kl": ["Not measured: the KL of restored slices"],
    "parts": ["Exact answers by length of the problem were not recorded"],
}


@pytest.mark.parametrize("part", GAPS)
def test_a_missing_part_is_said(part, tmp_path, monkeypatch):
    monkeypatch.setattr(report.Figure, "savefig", lambda _, path: path.touch())
    given = whole()
    given.pop(part, None)
    for budget in given["budgets"]:
        budget.pop(part, None)
    text = report.write_report(tmp_path, given).read_text()
    for gap in GAPS[part]:
        assert gap in text
    for name in report.PLOTS:
        assert (tmp_path / f"{name}.png").exists() == (f"]({name}.png)" in text)


BARE = {"title": "Bare", "measure": "exact answers"}


def test_without_controls_no_win_is_claimed(tmp_path):
    given = BARE | {"budgets": whole()["budgets"][:1]}
    del given["budgets"][0]["value"]
    text = report.write_report(tmp_path, given).read_text()
    assert "no win can be claimed" in text and "ours wins" not in text
    assert list(tmp_path.iterdir()) == [tmp_path / "report.md"]


def test_a_plot_of_other_results_does_not_stay(tmp_path):
    (tmp_path / "losses.png").write_text("old")
    report.write_report(tmp_path, BARE | {"budgets": bare(1)})
    assert not (tmp_path / "losses.png").exists()


def bare(n):
    row = {"active_params": 10, "counts": {}}
    return [row | {"name": f"b{i}"} for i in range(n)]


@pytest.mark.parametrize("n", [1, 3, 9])
def test_every_budget_has_a_colour_of_its_own(n):
    colours = report._colours({"budgets": bare(n)})
    assert len(set(colours.values())) == n


def test_all_required_parts_that_are_missing_are_named_together(tmp_path):
    given = {"budgets": [{"name": "a"}], "orders": [{"axis": "embed", "random": []}]}
    with pytest.raises(ValueError) as error:
        report.write_report(tmp_path / "never", given)
    for name in ("title", "measure", "budgets[0].active_params", "orders[0].random"):
        assert name in str(error.value)
    assert not (tmp_path / "never").exists()


def test_bits_per_byte_are_told_as_such(tmp_path):
    """The same report, with no word of answers, accuracy or problems."""
    given = whole() | {"measure": "bits per byte"}
    given["parent"] |= {"value": 2.1, "floor": 3.5, "target": 2.0}
    given["evaluation"] = {"rows": 256, "size_bytes": 32_700.0}
    for i, budget in enumerate(given["budgets"]):
        budget |= {"value": 2.0 + i / 4, "parts": {"a/*.py": 2.0, "b.jsonl": 2.5}}
        budget |= {"untrained_value": 3.0 + i, "random_values": [2.3 + i / 4]}
    text = report.write_report(tmp_path, given).read_text()
    for word in ("answer", "ccuracy", "problem", "No plot", "not recorded"):
        assert word not in text
    for words in ("## Bits per byte", "31.9 KiB in 256 rows", "| 2.250 |", "a/*.py"):
        assert words in text
    assert "Bits per byte: ours wins at `full` by 0.300 (13.0%)" in text


def test_an_unknown_measure_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'speed': expected one of exact answers"):
        report.write_report(tmp_path / "never", whole() | {"measure": "speed"})
    assert not (tmp_path / "never").exists()


def test_awkward_values_are_drawn(tmp_path):
    """Zeros on logarithmic axes, one step only, counts per block, many budgets."""
    given = whole()
    given["budgets"] = [
        given["budgets"][0] | {"name": f"b{i}", "value": 0.0, "random_values": []}
        for i in range(8)
    ]
    for i, budget in enumerate(given["budgets"]):
        budget["counts"] = {"experts": [4, 4 - i % 2], "layers": [1, i % 2]}
    given["orders"][0] |= {"ours": 0.0, "random": [0.0, 0.0]}
    given["importance"] = {"experts": [[0.0, 0.0]], "layers": [[1.0, 2.0]], "ffn": []}
    given["metrics"] = [
        {"step": 0, "loss/b0": 0.0, "loss/b1": 1e-9, "loss/b2": 1.0}
        | {"b0/cost_over_target": 1.0, "b0/experts/0/count": 4.0}
        | {"b0/experts/1/count": 2.0, "b0/experts/0/p/4": 1.0, "b0/experts/1/p/2": 0.0}
    ]
    text = report.write_report(tmp_path, given).read_text()
    assert "No plot" not in text and "4/3" in text
