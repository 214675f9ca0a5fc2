"""Budgets in seconds: the table they are measured by, and whether it was right."""

import pathlib
from typing import Any

import elastic_jax as ej
from elastic_jax import latency
from elastic_jax.latency_grid import PHASES
from experiments import imported
from experiments.parents import random_parent
from experiments.settings import Plan, with_table
from experiments.workdir import Workdir, bar, console


def measured(plan: Plan, workdir: Workdir) -> Plan:
    """The plan with a latency table: read back, or measured on a parent's sizes.

    Raises:
      ValueError: a table of other settings, or budgets that are impossible by it.
    """
    file, load = workdir.path / "latency.json", _load(plan)
    if file.exists():
        table = ej.LatencyTable.read(file)
        if (here := latency.device_name()) != table.device:
            console.print(
                f"{file}: measured on {table.device}, and this is {here}: budgets are "
                "seconds there"
            )
        if any(getattr(table, name) != n for name, n in load.items()):
            raise ValueError(f"{file} is not of {load}: move it away to measure again")
    else:
        directory = plan.values["parent"]
        params = imported.load(directory) if directory else random_parent(plan)
        repeats = plan.values["latency"]["repeats"]
        with bar("latency", 1) as advance:
            table = latency.measure_latency(
                params,
                plan.cfg,
                plan.elastic,
                **load,
                phases=_phases(plan),
                repeats=repeats,
                on_compiled=lambda done, total: advance(done / total, "programs"),
            )
        table.save(file)
    return with_table(plan, table)


def whole_latency(plan: Plan, path: pathlib.Path, counts) -> dict[str, Any]:
    """Every budget's latency as the table says, and as its slice really takes."""
    opened, asked = ej.open_nested(path), plan.values["latency"]
    models = {name: opened.restore(name) for name, _ in plan.budgets}
    phases, once = _phases(plan), {"repeats": asked["repeats"], **_load(plan)}
    found = latency.measure_models(models, phases=phases, **once)
    per = {"prefill": 1, "decode": 1}
    if asked["phase"] == "answer":
        per["decode"] = asked["new_tokens"]
    rows = []
    for name, budget in plan.budgets:
        cost = ej.cost(ej.param_specs(plan.cfg), plan.cfg, counts=counts[name])
        predicted = budget.measure(cost, None)
        took = sum(per[phase] * seconds for phase, seconds in found[name].items())
        rows.append({"name": name, "predicted": predicted, "measured": took})
        console.print(
            f"{name}: {1e3 * predicted:.3f} ms by the table, {1e3 * took:.3f} measured"
        )
    return asked | {"device": latency.device_name(), "budgets": rows}


def _phases(plan: Plan) -> tuple[str, ...]:
    phase = plan.values["latency"]["phase"]
    return PHASES if phase == "answer" else (phase,)


def _load(plan: Plan) -> dict[str, int]:
    """What a measured pass reads."""
    asked = plan.values["latency"]
    context = asked["prompt"] + asked["new_tokens"]
    return {"batch": asked["batch"], "prompt": asked["prompt"], "context": context}
