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

from experiments import compilation  # noqa: E402

if "--config.smoke=True" in sys.argv:
    compilation.quick()

import jax  # noqa: E402
from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

import elastic_jax as ej  # noqa: E402
from elastic_jax import checkpoint, fit, manifest, report  # noqa: E402
from experiments import pipeline, settings  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", None, "the experiment's file")
WORKDIR = flags.DEFINE_string("workdir", None, "where everything is kept")
ALLOW_CHANGES = flags.DEFINE_boolean(
    "allow_changes", False, "continue a saved run though its configuration changed"
)


def main(_) -> None:
    """Validates, then runs all phases under the workdir's lock."""
    plan = settings.plan(CONFIG.value)
    workdir = pathlib.Path(WORKDIR.value)
    with manifest.locked(workdir):
        jax.config.update("jax_compilation_cache_dir", str(workdir / "jax_cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        experiment(plan, pipeline.Workdir(workdir), ALLOW_CHANGES.value)


def experiment(plan: settings.Plan, workdir: pipeline.Workdir, allow: bool) -> None:
    """Parent, scores, nested training, checkpoint, evaluation, controls, report."""
    console = pipeline.console
    done = workdir.read("results.json")
    name = pipeline.identity(plan, plan.stages) | {"controls": plan.values["controls"]}
    if done is not None:
        changed = fit.differences(done["identity"], name)
        if not changed:
            _report(workdir, done)
            console.print(f"complete: {workdir.path / 'report.md'}")
            return
        if not allow and any(not line.startswith("controls") for line in changed):
            raise ValueError(
                f"{workdir.path} holds a complete run of another configuration:\n  "
                + "\n  ".join(changed)
                + "\nuse a new --workdir, or --allow_changes"
            )

    for line in plan.feasible:
        console.print(line)
    with workdir.phase("parent", "parent"):
        params, parent = pipeline.parent(plan, workdir, allow_changes=allow)
    with workdir.phase("scores", "importance"):
        scores, depth = pipeline.scores(plan, workdir, params)
        specs = ej.param_specs(plan.cfg)
        nested = ej.permute_params(params, specs, ej.rank(scores))
    with workdir.phase("orders", "untrained slices: our order against random ones"):
        orders = workdir.read("orders.json")
        if orders is None:
            orders = pipeline.orders(plan, params, scores, depth)
            workdir.write("orders.json", orders)
    with workdir.phase("elastic", "elastic training"):
        state, counts, elastic = pipeline.elastic_training(
            plan, workdir, "elastic", nested, allow_changes=allow
        )
    path = workdir.path / "checkpoint"
    with workdir.phase("checkpoint", "nested checkpoint"):
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
            },
            overwrite=True,
        )
    with workdir.phase("evaluate", "answers generated from restored slices"):
        budgets = _evaluated(plan, path, counts, nested)
    divergence = {
        "main": pipeline.divergences(
            plan, workdir, "elastic", nested, state.params, counts
        )
    }
    seeds = {"none": 0, "one": 1, "full": 3}[plan.values["controls"]]
    with workdir.phase("controls", "controls: the same from a random order"):
        for seed in range(seeds):
            arm = f"random-{seed}"
            shuffled = ej.permute_params(
                params, specs, pipeline.random_ranks(scores, seed)
            )
            control, _, _ = pipeline.elastic_training(
                plan, workdir, arm, shuffled, counts=counts, allow_changes=allow
            )
            divergence[arm] = pipeline.divergences(
                plan, workdir, arm, shuffled, control.params, counts
            )
            for row in budgets:
                small, cfg = _sliced(plan, control.params, counts[row["name"]])
                row["random_accuracy"].append(
                    pipeline.evaluate(plan, cfg, small)["accuracy"]
                )
    results = {
        "identity": name,
        "title": plan.values["title"],
        "command": f"python experiments/run.py {_shown(sys.argv[1:])}",
        "date": datetime.date.today().isoformat(),
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "smoke": plan.values["smoke"],
        "seconds": workdir.seconds,
        "parent": parent,
        "budgets": budgets,
        "evaluation": plan.values["evaluation"],
        "divergence": divergence,
        "orders": orders,
        "importance": {
            axis: [leaf.ravel().tolist() for leaf in jax.tree.leaves(scores[axis])]
            for axis in scores
        },
        "never_routed": pipeline.never_routed(plan.cfg, scores),
        "router": {"feasible": list(plan.feasible)},
        "metrics": fit.MetricLog(workdir.path / "elastic" / "metrics").rows(),
        "parent_metrics": fit.MetricLog(workdir.path / "parent" / "metrics").rows(),
    }
    results["alarms"] = _alarms(results["metrics"])
    workdir.write("results.json", results)
    _report(workdir, results)
    console.print(f"done: {workdir.path / 'report.md'}")


def _report(workdir, results) -> None:
    shown = {name: value for name, value in results.items() if name != "identity"}
    report.write_report(workdir.path, shown)


def _evaluated(plan, path, counts, nested) -> list[dict]:
    """One row per budget, from the slice that the checkpoint restores."""
    opened, rows = ej.open_nested(path), []
    specs = ej.param_specs(plan.cfg)
    for name, budget in plan.budgets:
        kept = counts[name]
        small, cfg = opened.restore(name)
        untrained, _ = _sliced(plan, nested, kept)
        cost = ej.cost(specs, plan.cfg, counts=kept)
        ratio = budget.ratio(specs, ej.cache_specs(plan.cfg), plan.cfg, counts=kept)
        row = {
            "name": name,
            "target": budget.target,
            "counts": {a: n for a, n in kept.items()},
            "active_params": cost.active_params,
            "total_params": cost.total_params,
            "weight_bytes": cost.weight_bytes("bf16"),
            "cost_over_target": float(ratio),
            "untrained_accuracy": pipeline.evaluate(plan, cfg, untrained)["accuracy"],
            "random_accuracy": [],
        }
        rows.append(row | pipeline.evaluate(plan, cfg, small))
        pipeline.console.print(f"{name}: {rows[-1]['accuracy']:.1%} exact")
    return rows


def _sliced(plan, params, counts):
    cfg = ej.slice_config(plan.cfg, counts)
    return ej.slice_params(params, ej.param_specs(plan.cfg), counts), cfg


def _alarms(rows) -> dict[str, int]:
    causes = [key for row in rows for key in row if key.startswith("alarm/")]
    return {cause.removeprefix("alarm/"): causes.count(cause) for cause in set(causes)}


def _shown(arguments) -> str:
    """The flags as a reader would type them; the workdir is theirs to choose."""
    shown = ["--workdir=DIR" if a.startswith("--workdir") else a for a in arguments]
    return " ".join(shown)


def command_line() -> int:
    """Runs, and turns every foreseen failure into a message and an exit code."""
    try:
        settings.check_command_line(sys.argv[1:])
        app.run(main)
    except ValueError as error:
        pipeline.console.print(str(error), style="red", markup=False)
        return 2
    except fit.StopRequested as stop:
        pipeline.console.print(f"{stop}; run the same command to continue")
        return fit.EXIT_STOPPED
    except (pipeline.Failed, fit.NonFinite, OSError) as error:
        pipeline.console.print(str(error), style="red", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    sys.exit(command_line())
