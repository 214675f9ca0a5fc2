"""The phases of an experiment: each reads and writes the workdir, and can resume.

    workdir/
      parent/        the parent's training run        scores.npz   calibration
      latency.json   the table of latency budgets
      elastic/       nested training                  random-0/    the control runs
      checkpoint/    the nested checkpoint            results.json report.md *.png
      elastic-1/     the same with another seed       stages/      weights at stage ends
      control.json   thinking and answering           budget_control.md
      quantized/     quantized nested checkpoints     quantization.json, .md and .png
      qad-0/ qat-0/  training for them                inputs-0.npz   their calibration

`experiments/claims.py` runs the same phases in folders of its own.

A phase that is complete is read back, not run again.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import elastic_jax as ej
from elastic_jax import checkpoint, data, fit, fold, latency, objectives, saves, train
from elastic_jax.axes import AXES, blocks_with
from elastic_jax.elastic import Elastic, settled_counts
from elastic_jax.importance import calibrate, depth_importance
from elastic_jax.latency_grid import PHASES
from elastic_jax.manifest import plain
from elastic_jax.packing import read, stacked
from elastic_jax.router import budget_input, make_router
from experiments import parents
from experiments.settings import Plan, with_table

SNAPSHOTS = (50, 100)  # steps at which divergences are compared
console = Console()


class Failed(RuntimeError):
    """A phase ended without what it was asked for."""


def exit_code(work: Callable[[], None]) -> int:
    """Works, and turns every foreseen failure into a message and an exit code."""
    try:
        work()
    except ValueError as error:
        console.print(str(error), style="red", markup=False)
        return 2
    except fit.StopRequested as stop:
        console.print(f"{stop}; run the same command to continue")
        return fit.EXIT_STOPPED
    except (Failed, fit.NonFinite, OSError) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    return 0


@dataclasses.dataclass
class Workdir:
    """Where a run lives, and how long each phase took, over all its resumptions."""

    path: pathlib.Path

    def __post_init__(self):
        self.path.mkdir(parents=True, exist_ok=True)
        self.seconds = self.read("seconds.json") or {}

    def read(self, name: str) -> Any:
        """A JSON file of the workdir; None where there is none."""
        file = self.path / name
        return json.loads(file.read_text()) if file.exists() else None

    def write(self, name: str, value: Any) -> None:
        """Writes a JSON file as a whole or not at all."""
        beside = self.path / f"{name}.tmp"
        beside.write_text(json.dumps(value, indent=1) + "\n")
        beside.replace(self.path / name)

    @contextlib.contextmanager
    def phase(self, name: str, title: str) -> Iterator[None]:
        """Announces a phase and adds up its seconds, also when it is cut short."""
        console.rule(f"[bold]{title}", align="left")
        start = time.monotonic()
        try:
            yield
        finally:
            spent = self.seconds.get(name, 0) + time.monotonic() - start
            self.seconds[name] = round(spent, 1)
            self.write("seconds.json", self.seconds)


@contextlib.contextmanager
def bar(title: str, total: int) -> Iterator[Any]:
    """A progress bar with the time left; yields `advance(done, note)`."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=False) as progress:
        task = progress.add_task(title, total=total, note="")
        yield lambda done, note="": progress.update(task, completed=done, note=note)


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


def parent(
    plan: Plan,
    workdir: Workdir,
    *,
    allow_changes: bool,
    objective: Callable = objectives.language_objective,
) -> tuple[Any, dict[str, Any]]:
    """The parent and what is known about it: imported, or trained where it is not yet.

    Args:
      objective: (cfg, stage) -> what a toy learns.

    Raises:
      Failed: the toy ended below its floor.
    """
    cost = ej.cost(ej.param_specs(plan.cfg), plan.cfg)
    known = {
        "pattern": plan.cfg.pattern,
        "total_params": cost.total_params,
        "active_params": cost.active_params,
    }
    if directory := plan.values["parent"]:
        params = parents.load(directory)
        value = plan.task.check(params, plan.cfg)
        console.print(f"{directory}: {_said(plan, value)}")
        return params, known | {"value": value, "imported": directory}
    params, facts = _toy_parent(plan, workdir, allow_changes, objective)
    asked = plan.values["parent_training"]
    return params, known | facts | {name: asked[name] for name in ("floor", "target")}


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
        params = parents.load(directory) if directory else _random_parent(plan)
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


def _random_parent(plan: Plan) -> Any:
    key = jax.random.key(plan.values["seed"])
    return jax.jit(ej.init_params, static_argnums=1)(key, plan.cfg)


def companions(plan: Plan) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the checkpoint keeps for an export: fields of config.json, a tokenizer."""
    carried, files = parents.companions(plan.values["parent"])
    if plan.task.tokenizer:
        files |= {"tokenizer.json": plan.task.tokenizer}
    return carried, files


def _toy_parent(plan: Plan, workdir: Workdir, allow_changes: bool, objective):
    """Trains a parent from scratch; returns its parameters, value and steps."""
    values, stage = plan.values["parent_training"], plan.parent_stage
    measure = plan.task.measure

    def enough(_, done, state):
        if done % values["check_every"] or done == stage.total_steps:
            return False
        value = plan.task.check(state.params, plan.cfg)
        return measure.gain(value, values["target"]) >= 0

    def finish(_, state, __):
        value = plan.task.check(state.params, plan.cfg)
        return {"value": value, "steps": int(state.step)}

    state, facts = run_stages(
        plan,
        workdir,
        "parent",
        (stage,),
        lambda stage, _: objective(plan.cfg, stage),
        _random_parent(plan),
        weight_decay=values["weight_decay"],
        enough=enough,
        finish=finish,
        allow_changes=allow_changes,
    )
    console.print(f"parent: {_said(plan, facts['value'])} after {facts['steps']} steps")
    if measure.gain(facts["value"], values["floor"]) < 0:
        raise Failed(
            f"the parent has {_said(plan, facts['value'])}, worse than its floor of "
            f"{measure.form(values['floor'])} (parent_training.floor): give it more "
            "steps (parent_training.steps), or another seed"
        )
    return state.params, facts


def _said(plan: Plan, value: float) -> str:
    return f"{plan.task.measure.form(value)} {plan.task.measure.name}"


def calibration_batches(plan: Plan, rows: int) -> list[dict[str, Any]]:
    """The first `rows` rows of the calibration split, in batches."""
    task = plan.task.data["calibration"]
    return stacked([task[i] for i in range(rows)], plan.values["calibration"]["batch"])


def read_batches(plan: Plan) -> list[dict[str, Any]]:
    """The calibration batches as a pass over them takes them."""
    rows = plan.values["calibration"]["rows"]
    return [read(batch) for batch in calibration_batches(plan, rows)]


def scores(plan: Plan, workdir: Workdir, params: Any):
    """Importance of every width axis, and of whole blocks."""
    batches = read_batches(plan)
    with bar("scores", len(batches)) as advance:
        seen = iter(range(1, len(batches) + 1))
        found = calibrate(
            params,
            batches,
            plan.cfg,
            path=workdir.path / "scores.npz",
            provenance={"data": plan.task.data["calibration"].digest()},
            on_batch=lambda _: advance(next(seen)),
        )
    depth = depth_importance(params, batches[:1], plan.cfg)
    for block, experts in never_routed(plan.cfg, found).items():
        console.print(f"block {block}: experts {experts} were never routed to")
    return found, np.asarray(depth)


def never_routed(cfg: ej.ModelConfig, found) -> dict[str, list[int]]:
    """MoE block -> its experts that no calibration token reached, where there are."""
    blocks = map(str, blocks_with(cfg.pattern, "experts"))
    each = zip(blocks, found.never_routed, strict=True)
    return {block: [int(e) for e in idle] for block, idle in each if len(idle)}


def orders(plan: Plan, params: Any, found, depth) -> list[dict[str, Any]]:
    """KL of untrained slices on one axis at a time, in our order and in random ones."""
    cfg, specs = plan.cfg, ej.param_specs(plan.cfg)
    batches = calibration_batches(plan, plan.values["orders"]["rows"])
    draws = plan.values["orders"]["random"]

    def measure(ranks, counts) -> float:
        moved = ej.permute_params(params, specs, ranks)
        return _kl(plan, params, *sliced(plan, moved, counts), batches)

    asked = plan.values["orders"]["axes"] or AXES
    cases = [(axis, "", found) for axis in found if axis in asked and axis != "experts"]
    if "experts" in found and "experts" in asked:
        metrics = ("reap", "mass", "frequency")
        cases += [("experts", m, found.with_experts(m)) for m in metrics]
    rows = []
    with bar("orders", len(cases) + ("layers" in asked)) as advance:
        for i, (axis, variant, ours) in enumerate(cases, start=1):
            full = getattr(cfg, axis)
            kept = _middle(cfg, axis)
            if kept is None:
                continue
            counts = ej.counts(cfg, **{axis: kept})
            shuffled = (random_ranks(found, seed, axis) for seed in range(draws))
            random = [measure(ranks, counts) for ranks in shuffled]
            rows.append(
                {
                    "axis": axis,
                    "variant": variant,
                    "kept": kept,
                    "full": full,
                    "ours": measure(ej.rank({axis: ours[axis]}), counts),
                    "random": random,
                }
            )
            advance(i, axis)
        if "layers" not in asked:
            return rows
        kept = cfg.layers - 1
        keep = lambda scores: ej.counts(
            cfg, layers=ej.keep_layers(ej.rank({"layers": scores}), kept)
        )
        rng = np.random.default_rng(0)
        rows.append(
            {
                "axis": "layers",
                "variant": "",
                "kept": kept,
                "full": cfg.layers,
                "ours": measure({}, keep(depth)),
                "random": [
                    measure({}, keep(rng.random(cfg.layers))) for _ in range(draws)
                ],
            }
        )
        advance(len(cases) + 1)
    return rows


def random_ranks(scores: Mapping, seed: int, axis: str | None = None) -> dict[str, Any]:
    """Random permutations in the shapes of `scores`, of one axis or of all."""
    rng = np.random.default_rng([7, seed])
    drawn = {
        name: jax.tree.map(lambda s: jnp.asarray(rng.random(s.shape)), scores[name])
        for name in scores
        if axis in (None, name)
    }
    return ej.rank(drawn)


def _middle(cfg: ej.ModelConfig, axis: str) -> int | None:
    """About half of the axis, in its steps; None where there is nothing between."""
    full, step = getattr(cfg, axis), AXES[axis].step
    least = cfg.top_k if axis == "experts" else step
    half = max(least, full // 2 // step * step)
    return half if half < full else None


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


def divergences(plan, workdir, name, teacher, final, counts) -> dict[str, Any]:
    """KL of every budget at its final counts: at the snapshots and at the end."""
    batches = calibration_batches(plan, plan.values["orders"]["rows"])
    saved = {}
    for step in SNAPSHOTS:
        path = workdir.path / "snapshots" / f"{name}-{step}"
        if path.exists():
            saved[str(step)] = ej.open_nested(path).restore()[0]
    saved["end"] = final
    return {
        budget: {
            when: _kl(plan, teacher, *sliced(plan, params, kept), batches)
            for when, params in saved.items()
        }
        for budget, kept in counts.items()
    }


def evaluate(
    plan: Plan,
    params: Any,
    cfg: ej.ModelConfig,
    teacher: Any,
    *,
    teacher_cfg: ej.ModelConfig | None = None,
) -> dict[str, Any]:
    """One model by the task's own measure, and its KL from `teacher`.

    Args:
      teacher_cfg: of the teacher; None is the parent's.
    """
    source, count = plan.task.data["evaluation"], plan.values["orders"]["rows"]
    every = max(1, len(source) // count)
    examples = [source[i] for i in range(0, min(every * count, len(source)), every)]
    batches = stacked(examples, plan.values["calibration"]["batch"])
    kl = _kl(plan, teacher, params, cfg, batches, teacher_cfg=teacher_cfg)
    return plan.task.evaluate(params, cfg) | {"kl": kl}


def _kl(plan: Plan, teacher, params, cfg, batches, *, teacher_cfg=None) -> float:
    """KL from the parent, if no other teacher is given."""
    whole = teacher_cfg or plan.cfg
    return objectives.divergence(teacher, params, cfg, batches, teacher_cfg=whole)


def sliced(plan: Plan, params: Any, counts: ej.Counts) -> tuple[Any, ej.ModelConfig]:
    """A submodel of the parent's shape, and its configuration."""
    cfg = ej.slice_config(plan.cfg, counts)
    return ej.slice_params(params, ej.param_specs(plan.cfg), counts), cfg


def _tuples(kept: Mapping[str, Any]) -> dict[str, Any]:
    return {a: tuple(n) if isinstance(n, list) else n for a, n in kept.items()}
