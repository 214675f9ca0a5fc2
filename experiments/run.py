"""Runs an experiment: `python experiments/run.py --config=FILE --workdir=DIR`.

Any field of the configuration is a flag, `--config.stages.short.steps=500`. A rerun in
the same workdir resumes, or says that the run is complete. Exit codes: 0 done, 2 the
configuration is wrong, 75 stopped on request after saving, 1 anything else.
"""

import datetime
import os
import pathlib
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

from experiments import process  # noqa: E402

if __name__ == "__main__":
    process.use_huge_pages()
    if "--config.smoke=True" in sys.argv:
        process.compile_quickly()

import jax  # noqa: E402
from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

import elastic_jax as ej  # noqa: E402
from elastic_jax import checkpoint, directories, fit, report  # noqa: E402
from elastic_jax.budgets import not_nested, relative_targets  # noqa: E402
from elastic_jax.manifest import plain  # noqa: E402
from experiments import (  # noqa: E402
    control,
    evaluation,
    latency_budgets,
    parents,
    quantization,
    ranking,
    settings,
    training,
)
from experiments.workdir import Workdir, console, exit_code  # noqa: E402

# What may change between runs in one workdir: measurements, and no weights they are of.
MEASURED = ("controls", "control", "quantization")

CONFIG = config_flags.DEFINE_config_file("config", None, "the experiment's file")
WORKDIR = flags.DEFINE_string("workdir", None, "where everything is kept")
ALLOW_CHANGES = flags.DEFINE_boolean(
    "allow_changes", False, "continue a saved run though its configuration changed"
)


def main(_) -> None:
    """Validates, then runs all phases under the workdir's lock."""
    plan = settings.plan(CONFIG.value)
    workdir = pathlib.Path(WORKDIR.value)
    with directories.locked(workdir):
        jax.config.update("jax_compilation_cache_dir", str(workdir / "jax_cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        experiment(plan, Workdir(workdir), ALLOW_CHANGES.value)


def experiment(plan: settings.Plan, workdir: Workdir, allow: bool) -> None:
    """Parent, scores, nested training, checkpoint, evaluation, controls, report."""
    name = training.identity(plan, plan.stages)
    name |= {key: plan.values[key] for key in MEASURED}
    name = plain(name, "identity")
    done, began = workdir.read("results.json"), workdir.read("identity.json")
    if done is not None and done["identity"] == name:
        _report(workdir, done)
        console.print(f"complete: {workdir.path / 'report.md'}")
        return
    changed = fit.differences(began, name) if began is not None else []
    if not allow and any(not line.startswith(MEASURED) for line in changed):
        raise ValueError(
            f"{workdir.path} holds a run of another configuration:\n  "
            + "\n  ".join(changed)
            + "\nrestore what changed, use a new --workdir, or --allow_changes"
        )
    workdir.write("identity.json", name)

    by_latency = plan.values["budgets"]["kind"] == "latency_seconds"
    if by_latency:
        with workdir.phase("latency", "latency of every kind of block"):
            plan = latency_budgets.measured(plan, workdir)
    for line in plan.feasible:
        console.print(line)
    with workdir.phase("parent", "parent"):
        params, parent = parents.parent(plan, workdir, allow_changes=allow)
    with workdir.phase("scores", "importance"):
        scores, depth = ranking.scores(plan, workdir, params)
        specs = ej.param_specs(plan.cfg)
        nested = ej.permute_params(params, specs, ej.rank(scores))
    with workdir.phase("orders", "untrained slices: our order against random ones"):
        orders = workdir.read("orders.json")
        if orders is None:
            orders = ranking.orders(plan, params, scores, depth)
            workdir.write("orders.json", orders)
    with workdir.phase("elastic", "elastic training"):
        state, counts, elastic = training.elastic_training(
            plan,
            workdir,
            "elastic",
            nested,
            keep_stages=bool(plan.values["control"]["caps"]),
            allow_changes=allow,
        )
    path = workdir.path / "checkpoint"
    with workdir.phase("checkpoint", "nested checkpoint"):
        carried, files = parents.companions(plan)
        checkpoint.save_nested(
            path,
            state.params,
            plan.cfg,
            budgets=counts,
            router=state.router,
            scores=scores,
            provenance={
                "run": plan.values,
                "parent": parent,
                "scores": scores.provenance,
                "date": datetime.date.today().isoformat(),
                "huggingface": carried,
            },
            files=files,
            overwrite=True,
        )
    with workdir.phase("evaluate", "evaluation of restored slices"):
        budgets = _evaluated(plan, path, counts, nested)
        latency = None
        if by_latency:
            latency = latency_budgets.whole_latency(plan, path, counts)
    if plan.values["control"]["caps"]:
        with workdir.phase("control", "thinking and answering"):
            control.measure(plan, workdir, nested, allow_changes=allow)
    if plan.values["quantization"]["arms"]:
        quantization.measure(plan, workdir, nested, allow_changes=allow)
    divergence = {
        "main": evaluation.divergences(
            plan, workdir, "elastic", nested, state.params, counts
        )
    }
    seeds = {"none": 0, "one": 1, "full": 3}[plan.values["controls"]]
    with workdir.phase("controls", "controls: the same from a random order"):
        for seed in range(seeds):
            arm = f"random-{seed}"
            shuffled = ej.permute_params(
                params, specs, ranking.random_ranks(scores, seed)
            )
            trained, _, _ = training.elastic_training(
                plan, workdir, arm, shuffled, counts=counts, allow_changes=allow
            )
            divergence[arm] = evaluation.divergences(
                plan, workdir, arm, shuffled, trained.params, counts
            )
            for row in budgets:
                kept = counts[row["name"]]
                small, cfg = evaluation.sliced(plan, trained.params, kept)
                row["random_values"].append(plan.task.evaluate(small, cfg)["value"])
    results = {
        "identity": name,
        "title": plan.values["title"],
        "measure": plan.task.measure.name,
        "command": f"python experiments/run.py {_shown(sys.argv[1:])}",
        "date": datetime.date.today().isoformat(),
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "smoke": plan.values["smoke"],
        "seconds": workdir.seconds,
        "parent": parent,
        "budgets": budgets,
        "evaluation": dict(plan.task.evaluation),
        "divergence": divergence,
        "orders": orders,
        "importance": {
            axis: [leaf.ravel().tolist() for leaf in jax.tree.leaves(scores[axis])]
            for axis in scores
        },
        "never_routed": ranking.never_routed(plan.cfg, scores),
        "router": {
            "feasible": list(plan.feasible),
            "accept": not_nested(counts, plan.cfg),
        },
        "metrics": fit.MetricLog(workdir.path / "elastic" / "metrics").rows(),
        "parent_metrics": fit.MetricLog(workdir.path / "parent" / "metrics").rows(),
    }
    results["alarms"] = _alarms(results["metrics"])
    if latency:
        results["latency"] = latency
    workdir.write("results.json", results)
    _report(workdir, results)
    console.print(f"done: {workdir.path / 'report.md'}")


def _report(workdir, results) -> None:
    shown = {name: value for name, value in results.items() if name != "identity"}
    report.write_report(workdir.path, shown)
    if results["identity"]["control"]["caps"]:
        control.report(workdir)
    if results["identity"]["quantization"]["arms"]:
        quantization.report(workdir)


def _evaluated(plan, path, counts, nested) -> list[dict]:
    """One row per budget, from the slice that the checkpoint restores."""
    opened, rows, measure = ej.open_nested(path), [], plan.task.measure
    specs, caches = ej.param_specs(plan.cfg), ej.cache_specs(plan.cfg)
    targets = relative_targets(plan.budgets, specs, plan.cfg, cache_specs=caches)
    for (name, budget), target in zip(plan.budgets, targets, strict=True):
        kept = counts[name]
        small, cfg = opened.restore(name)
        untrained, _ = evaluation.sliced(plan, nested, kept)
        before = evaluation.evaluate(plan, untrained, cfg, nested)
        cost = ej.cost(specs, plan.cfg, counts=kept)
        ratio = budget.ratio(specs, caches, plan.cfg, counts=kept)
        row = {
            "name": name,
            "target": target,
            "counts": {a: n for a, n in kept.items()},
            "active_params": cost.active_params,
            "total_params": cost.total_params,
            "weight_bytes": cost.weight_bytes("bf16"),
            "cost_over_target": float(ratio),
            "untrained_value": before["value"],
            "untrained_kl": before["kl"],
            "random_values": [],
        }
        rows.append(row | evaluation.evaluate(plan, small, cfg, nested))
        said = measure.form(rows[-1]["value"])
        console.print(f"{name}: {said} {measure.name}")
    return rows


def _alarms(rows) -> dict[str, int]:
    causes = [key for row in rows for key in row if key.startswith("alarm/")]
    return {cause.removeprefix("alarm/"): causes.count(cause) for cause in set(causes)}


def _shown(arguments) -> str:
    """The flags as a reader would type them; the workdir is theirs to choose."""
    shown = ["--workdir=DIR" if a.startswith("--workdir") else a for a in arguments]
    return " ".join(shown)


def command_line() -> int:
    """Checks all flags together, and runs."""

    def checked() -> None:
        settings.check_command_line(sys.argv[1:])
        app.run(main)

    return exit_code(checked)


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    sys.exit(command_line())
