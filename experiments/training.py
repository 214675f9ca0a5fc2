"""Training of an experiment: stages that resume, and all budgets at once."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

import elastic_jax as ej
from elastic_jax import checkpoint, data, fit, fold, objectives, saves, train
from elastic_jax.elastic import Elastic, settled_counts
from elastic_jax.manifest import plain
from elastic_jax.router import budget_input, make_router
from experiments.settings import Plan
from experiments.workdir import Workdir, bar, console

SNAPSHOTS = (50, 100)  # steps at which divergences are compared


def run_stages(
    plan: Plan,
    workdir: Workdir,
    name: str,
    stages,
    objective,
    params: Any,
    *,
    router: Any = None,
    allow_changes: bool = False,
    weight_decay: float = 0.0,
    about: Mapping[str, Any] | None = None,
    **hooks: Any,
) -> tuple[train.TrainState, dict[str, Any]]:
    """Trains in `workdir/name`, with a bar per stage; resumes if it was cut short.

    `about` joins what a save belongs to.
    """
    folder = workdir.path / name
    optimizer = train.optimizer(ej.param_specs(plan.cfg), weight_decay=weight_decay)
    state = train.init_state(params, optimizer, router)
    log = fit.MetricLog(folder / "metrics")
    with contextlib.ExitStack() as shown, saves.TrainCheckpoints(folder) as saved:
        bars: dict[str, Any] = {}

        def observe(stage, done, state, row):
            if stage.name not in bars:
                shown.close()  # the bar of the stage before
                bars[stage.name] = shown.enter_context(
                    bar(stage.name, stage.total_steps)
                )
            bars[stage.name](done, f"loss {row['loss']:.4f}")
            for cause in (k for k in row if k.startswith("alarm/")):
                advice = fit.Alarms.ADVICE.get(cause.removeprefix("alarm/"), "")
                console.print(f"step {int(state.step)}: {cause} {advice}", style="red")
            if "observe" in hooks:
                hooks["observe"](stage, done, state, row)

        run = fit.Run(
            stages=stages,
            objective=objective,
            batches=lambda stage: data.batches(
                plan.task.data[stage.name], batch=stage.batch, seed=plan.values["seed"]
            ),
            optimizer=optimizer,
            identity=identity(plan, stages) | plain(about or {}, "about"),
            checkpoints=saved,
            save_every=plan.values["save_every"],
            log_every=plan.values["log_every"],
            on_nonfinite=plan.values["on_nonfinite"],
            metrics=log,
            **hooks | {"observe": observe},
        )
        return fit.fit(run, state, allow_changes=allow_changes)


def identity(plan: Plan, stages) -> dict[str, Any]:
    """What a save belongs to: configuration, data and software."""
    apart = ("controls", "control", "quantization", "stages", "claim")
    values = {k: v for k, v in plan.values.items() if k not in apart}
    staged = {stage.name: dataclasses.asdict(stage) for stage in stages}
    digests = {stage.name: plan.task.data[stage.name].digest() for stage in stages}
    whole = {
        "config": values,
        "stages": staged,
        "data": digests,
        "files": plan.task.files,
        "parent": plan.parent_files,
        **fit.software(),
    }
    return json.loads(json.dumps(whole))


def elastic_parent(plan: Plan, teacher: Any) -> Elastic:
    """The parent `teacher` with the plan's budgets, and a router to choose for them."""
    return Elastic(
        cfg=plan.cfg,
        teacher=teacher,
        router=make_router(plan.cfg, plan.elastic, len(plan.budgets)),
        budgets=plan.budgets,
        seed=plan.values["seed"],
        cache_specs=ej.cache_specs(plan.cfg),
        hard_probability=plan.values["router"]["hard_probability"],
    )


def first_router(plan: Plan, elastic: Elastic, steps: int) -> Any:
    """Parameters of the router before any model has been trained with it.

    Args:
      steps: updates on the budget loss alone.
    """
    key = jax.random.key(plan.values["seed"])
    drawn = elastic.router.init(key, budget_input(0, len(plan.budgets)))
    return train.fit_router(elastic, drawn, steps=steps) if steps else drawn


def elastic_training(
    plan: Plan,
    workdir: Workdir,
    name: str,
    teacher: Any,
    *,
    counts: Mapping[str, ej.Counts] | None = None,
    begin: Any = None,
    keep_stages: bool = False,
    allow_changes: bool = False,
) -> tuple[train.TrainState, dict[str, ej.Counts], Elastic]:
    """Distils all budgets at once; learns their counts unless they are given.

    With `keep_stages` the weights at the end of every stage stay in the workdir.

    Args:
      begin: the weights to start from; None are those of the teacher.
    """
    elastic = elastic_parent(plan, teacher)
    stages = plan.stages
    if counts is not None:
        stages = tuple(dataclasses.replace(s, router="frozen") for s in stages)
    first = 0 if counts is not None else plan.values["router"]["fit_first"]
    learned = first_router(plan, elastic, first)
    given = {} if counts is None else {n: dict(c) for n, c in counts.items()}

    def settled(facts) -> dict[str, ej.Counts]:
        return {
            name: ej.counts(plan.cfg, **_tuples(kept))
            for name, kept in (given or facts["counts"]).items()
        }

    def objective(stage, facts):
        if stage.router == "train":
            return objectives.masked_objective(elastic, stage)
        if stage.mixed_prefixes:
            return objectives.mixed_objective(elastic, stage, settled(facts))
        return objectives.sliced_objective(elastic, stage, settled(facts))

    def finish(stage, state, facts):
        learned = {}
        if stage.router == "train":
            kept = settled_counts(elastic, state.router)
            learned = {"counts": {name: dict(c) for name, c in kept.items()}}
        if keep_stages:
            path, kept = stage_end(workdir, name, stage.name), settled(facts | learned)
            checkpoint.save_nested(
                path, state.params, plan.cfg, budgets=kept, overwrite=True
            )
        return learned

    def snapshot(stage, done, state, row):
        step = int(state.step)
        target = workdir.path / "snapshots" / f"{name}-{step}"
        if step in SNAPSHOTS and not target.exists():
            checkpoint.save_nested(target, state.params, plan.cfg, budgets={})

    state, facts = run_stages(
        plan,
        workdir,
        name,
        stages,
        objective,
        teacher if begin is None else begin,
        router=learned,
        finish=finish,
        observe=snapshot,
        allow_changes=allow_changes,
        about={} if begin is None else {"begin": fold.params_digest(begin)},
    )
    return state, settled(facts), elastic


def of_seed(plan: Plan, seed: int) -> tuple[Plan, str]:
    """The plan with other draws, and the name of its elastic training."""
    if seed == 0:
        return plan, "elastic"
    values = plan.values | {"seed": plan.values["seed"] + seed}
    return dataclasses.replace(plan, values=values), f"elastic-{seed}"


def stage_end(workdir: Workdir, name: str, stage: str) -> pathlib.Path:
    """Where the weights of a training run at the end of a stage are kept."""
    return workdir.path / "stages" / f"{name}-{stage}"


def _tuples(kept: Mapping[str, Any]) -> dict[str, Any]:
    return {a: tuple(n) if isinstance(n, list) else n for a, n in kept.items()}
