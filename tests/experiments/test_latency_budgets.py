"""A run whose budgets are seconds: its table is measured once, read back, and fits."""

import dataclasses
import itertools

import pytest

import elastic_jax as ej
from elastic_jax import latency
from elastic_jax.latency_grid import ENDS, PHASES, Grid, axes_of
from elastic_jax.latency_table import FIXED, LatencyTable
from experiments import latency_budgets, settings, training
from experiments.configs import tiny
from experiments.workdir import Workdir


def config(**changes):
    made = tiny.get_config()
    made.smoke = True
    made.budgets.kind = "latency_seconds"
    for name, value in changes.items():
        made.latency[name] = value
    return made


def thought_of(params, cfg, elastic, *, phases, batch, prompt, context, **_):
    """In the place of a measurement: every block takes as long as it is wide."""
    offered = dict(elastic.choices)

    def grid(kind):
        widths = tuple(
            (a, tuple(sorted(offered.get(a, (getattr(cfg, a),)))))
            for a in axes_of(kind)
        )
        took = tuple(
            1e-6 * sum(at) for at in itertools.product(*(n for _, n in widths))
        )
        return Grid(kind, widths, tuple((phase, took) for phase in phases))

    fixed = tuple((name, getattr(cfg, name)) for name in FIXED)
    grids = tuple(map(grid, (*dict.fromkeys(cfg.pattern), ENDS)))
    scale = tuple((phase, 1.0) for phase in phases)
    about = "a thought", "today", "0", "float32", batch, prompt, context, scale
    return LatencyTable(*about, fixed, grids)


@pytest.fixture
def measured(monkeypatch):
    """The calls of measurements, which are thought of instead."""
    calls = []

    def measure(*given, **options):
        calls.append(options)
        return thought_of(*given, **options)

    monkeypatch.setattr(latency, "measure_latency", measure)
    return calls


def test_a_table_is_measured_once_and_read_back(measured, tmp_path):
    planned = settings.plan(config())
    assert planned.feasible == () and planned.budgets[1][1].latency is None
    first = latency_budgets.measured(planned, Workdir(tmp_path))
    again = latency_budgets.measured(planned, Workdir(tmp_path))
    assert len(measured) == 1 and measured[0]["phases"] == PHASES
    assert (first.budgets, first.elastic) == (again.budgets, again.elastic)
    assert any("combinations in its zone" in line for line in first.feasible)
    table = LatencyTable.read(tmp_path / "latency.json")
    assert first.budgets[0][1].latency == table
    assert (table.prompt, table.context) == (64, 128)
    # What is measured is not part of what a run is; what was asked for is.
    names = [training.identity(plan, plan.stages) for plan in (planned, first)]
    assert names[0] == names[1] and names[0]["config"]["latency"]["prompt"] == 64


def test_a_table_of_other_settings_is_refused(measured, tmp_path):
    workdir = Workdir(tmp_path)
    latency_budgets.measured(settings.plan(config()), workdir)
    with pytest.raises(ValueError, match="latency.json is not of .*'prompt': 32"):
        latency_budgets.measured(settings.plan(config(prompt=32)), workdir)
    other = config()
    other.elastic.embed = (96, 16)
    with pytest.raises(ValueError, match="embed: 16 in .*measured at 48 to 96"):
        latency_budgets.measured(settings.plan(other), workdir)


def test_budgets_that_the_table_makes_impossible_are_refused(measured, tmp_path):
    impossible = config(phase="decode")
    impossible.when_smoke.budgets.targets = (1.0, 0.01)
    with pytest.raises(ValueError, match="impossible budgets:\n  small: none of"):
        latency_budgets.measured(settings.plan(impossible), Workdir(tmp_path))
    assert measured[0]["phases"] == ("decode",)


def test_targets_in_seconds_name_their_kind():
    seconds = config()
    seconds.when_smoke.budgets.targets = (1.0, "5ms")
    (_, full), (_, small) = settings.plan(seconds).budgets
    assert full.relative and not small.relative and small.target == 0.005
    seconds.budgets.kind = "total_params"
    with pytest.raises(settings.InvalidConfig, match="in seconds, but its kind is"):
        settings.plan(seconds)


def test_predicted_stands_beside_measured(measured, monkeypatch, tmp_path):
    planned = latency_budgets.measured(settings.plan(config()), Workdir(tmp_path))
    counts = {"full": ej.counts(planned.cfg), "small": ej.counts(planned.cfg, embed=48)}
    took = {name: {"prefill": 2e-3, "decode": 1e-3} for name in counts}
    monkeypatch.setattr(latency, "measure_models", lambda models, **_: took)

    @dataclasses.dataclass
    class Opened:
        restore = staticmethod(lambda name: None)

    monkeypatch.setattr(ej, "open_nested", lambda path: Opened())
    found = latency_budgets.whole_latency(planned, tmp_path, counts)
    rows = {row.pop("name"): row for row in found["budgets"]}
    for name, budget in planned.budgets:
        specs = ej.param_specs(planned.cfg)
        seconds = budget.measure(ej.cost(specs, planned.cfg, counts=counts[name]), None)
        assert rows[name] == {
            "predicted": seconds,
            "measured": pytest.approx(2e-3 + 64 * 1e-3),
        }
