"""The parent of an experiment: imported, or a toy that is trained from scratch."""

from collections.abc import Callable
from typing import Any

import jax

import elastic_jax as ej
from elastic_jax import objectives
from experiments import imported
from experiments.settings import Plan
from experiments.training import run_stages
from experiments.workdir import Failed, Workdir, console


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
        params = imported.load(directory)
        value = plan.task.check(params, plan.cfg)
        console.print(f"{directory}: {_said(plan, value)}")
        return params, known | {"value": value, "imported": directory}
    params, facts = _toy_parent(plan, workdir, allow_changes, objective)
    asked = plan.values["parent_training"]
    return params, known | facts | {name: asked[name] for name in ("floor", "target")}


def companions(plan: Plan) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the checkpoint keeps for an export: fields of config.json, a tokenizer."""
    carried, files = imported.companions(plan.values["parent"])
    if plan.task.tokenizer:
        files |= {"tokenizer.json": plan.task.tokenizer}
    return carried, files


def random_parent(plan: Plan) -> Any:
    """Parameters of the plan's shapes that nothing has trained."""
    key = jax.random.key(plan.values["seed"])
    return jax.jit(ej.init_params, static_argnums=1)(key, plan.cfg)


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
        random_parent(plan),
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
