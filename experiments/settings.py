"""From flags to a plan: everything wrong with a configuration, found together.

A `ConfigDict` is read here and goes no further; what runs is a `Plan` of validated
values.
"""

import ast
import dataclasses
import difflib
import functools
import importlib.util
import math
import pathlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

import elastic_jax as ej
from elastic_jax import budgets as budget_zone
from elastic_jax.budget_control import HAND_OVERS
from elastic_jax.curriculum import Stage, check_stages
from elastic_jax.quantize import formats
from elastic_jax.quantized_training import SCALES, TEACHERS
from elastic_kernels import quant_array
from experiments import imported
from experiments.sources import SOURCES, Task

CONTROLS = ("none", "one", "full")
QUANTIZED = "quantized"  # the stage that trains for a quantized checkpoint
# Arm -> format, and how the weights come to it.
ARMS = {
    f"{format}_{way}": (format, way)
    for format in quant_array.FORMATS
    for way in ("ptq", "qad", "qat")
}


class InvalidConfig(ValueError):
    """All problems of a command line and its configuration."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("invalid configuration:\n  " + "\n  ".join(self.problems))


@dataclass(frozen=True)
class Plan:
    """A run as validated values.

    Attributes:
      values: the whole configuration as plain values, to name the run by.
      cfg: the parent, imported or toy.
      elastic: axes the router chooses on, reduced to those that move a budget.
      budgets: (name, Budget), the full model first.
      feasible: lines about what the budgets allow, for the report.
      parent_stage, stages: training stages.
      quantized_stage: for a quantized checkpoint.
      recipes: arm of `quantization` -> which parameters it rounds.
      task: its data, and how models are judged.
    """

    values: dict[str, Any]
    cfg: ej.ModelConfig
    elastic: ej.ElasticConfig
    budgets: tuple[tuple[str, ej.Budget], ...]
    feasible: tuple[str, ...]
    parent_stage: Stage
    stages: tuple[Stage, ...]
    quantized_stage: Stage
    recipes: dict[str, ej.Recipe]
    task: Task

    @functools.cached_property
    def parent_files(self) -> dict[str, dict[str, Any]]:
        """Size and digest of every file of an imported parent; read when asked."""
        directory = self.values["parent"]
        return imported.files(directory) if directory else {}


def plan(config: ConfigDict) -> Plan:
    """Validates a configuration.

    Raises:
      InvalidConfig: with every problem.
    """
    return _planned(config, [])


def check_command_line(arguments: Sequence[str]) -> None:
    """Checks `--config`, every `--config.x=y` and the plan that they make.

    Raises:
      InvalidConfig: unknown names (with a suggestion), values of the wrong type, a
        missing file, and all that `plan` finds, together.
    """
    problems, flags = [], {}
    known = ("config", "workdir", "allow_changes")
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("--") or not (equals or name == "allow_changes"):
            problems.append(f"{argument!r}: write flags as --name=value")
        elif name not in known and not name.startswith("config."):
            problems.append(f"unknown flag --{name}{_did_you_mean(name, known)}")
        else:
            flags[name] = value
    for name in ("config", "workdir"):
        if not flags.get(name):
            problems.append(f"missing flag --{name}=...")
    config = _load(flags.get("config"), problems)
    if config is None:
        raise InvalidConfig(problems)
    for name, text in flags.items():
        if name.startswith("config."):
            problems += _override(config, name.removeprefix("config."), text)
    _planned(config, problems)


def _planned(config: ConfigDict, problems: list[str]) -> Plan:
    values = config.to_dict()
    smoke = values.pop("when_smoke")
    if values["smoke"]:
        problems += _lay_over(values, smoke)
    attempt = _Attempt(problems)

    if directory := values["parent"]:
        cfg = attempt(lambda: imported.read_config(directory))
    else:
        cfg = attempt(lambda: ej.ModelConfig(**values["model"]))
    groups = dict(values["stages"])
    names = groups.pop("names")
    if unknown := sorted(set(names) - set(groups)):
        problems.append(f"stages.names: no group for {unknown}, have {sorted(groups)}")
    staged = {name: groups[name] for name in names if name in groups}
    quantized = values["quantization"]
    parent_stage = attempt(lambda: _stage("parent", values["parent_training"]))
    stages = [attempt(lambda n=n, g=g: _stage(n, g)) for n, g in staged.items()]
    quantized_stage = attempt(lambda: _stage(QUANTIZED, quantized["stage"]))
    elastic = attempt(lambda: _elastic(values["elastic"]))
    budgets = attempt(lambda: _budgets(values["budgets"], values["latency"]))
    if None not in stages and budgets is not None:
        attempt(lambda: check_stages(stages, len(budgets)))
        if stages and stages[0].router != "train":
            problems.append(f"stages: the first, {names[0]!r}, must train the router")
    feasible = None
    if None not in (cfg, elastic, budgets):
        feasible = attempt(lambda: _feasible(elastic, cfg, budgets))
    task = None
    if (source := values["data"]["source"]) in SOURCES:
        read = staged | {QUANTIZED: quantized["stage"]} if quantized["arms"] else staged
        task = attempt(lambda: SOURCES[source](values, read))
    else:
        problems.append(f"data.source {source!r}{_did_you_mean(source, SOURCES)}")
    problems += _odd_values(values, cfg, task)
    if values["control"]["caps"]:
        problems += _odd_control(values)
    if quantized["arms"]:
        problems += _odd_quantization(values, quantized_stage, budgets)
    recipes = {} if cfg is None else attempt(lambda: _recipes(quantized, cfg))
    if problems:
        raise InvalidConfig(problems)
    return Plan(
        values=values,
        cfg=cfg,
        elastic=feasible[0],
        budgets=budgets,
        feasible=feasible[1],
        parent_stage=parent_stage,
        stages=tuple(stages),
        quantized_stage=quantized_stage,
        recipes=recipes,
        task=task,
    )


class _Attempt:
    """Calls a constructor; its ValueError joins the problems."""

    def __init__(self, problems: list[str]):
        self.problems = problems

    def __call__(self, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except (ValueError, TypeError) as error:
            self.problems.append(str(error))
            return None


def _stage(name: str, group: dict[str, Any]) -> Stage:
    fields = {f: v for f, v in group.items() if f in Stage.__dataclass_fields__}
    return Stage(name=name, **fields | {"sampling": group.get("sampling") or None})


def _elastic(group: dict[str, Any]) -> ej.ElasticConfig:
    choices = {axis: tuple(n) for axis, n in group.items() if axis != "per_layer"}
    return ej.ElasticConfig(
        tuple((axis, n) for axis, n in choices.items() if n), tuple(group["per_layer"])
    )


def with_table(plan: Plan, table: ej.LatencyTable) -> Plan:
    """The plan with budgets that are measured by `table`.

    Raises:
      ValueError: a table of another model, or budgets that are impossible by it.
    """
    table.check(plan.cfg, plan.elastic)
    budgets = tuple(
        (name, dataclasses.replace(budget, latency=table))
        for name, budget in plan.budgets
    )
    elastic, lines = _feasible(plan.elastic, plan.cfg, budgets)
    return dataclasses.replace(plan, elastic=elastic, budgets=budgets, feasible=lines)


def _feasible(elastic: ej.ElasticConfig, cfg: ej.ModelConfig, budgets):
    """What is offered, and lines for the log; latency is known once it is measured."""
    if any(b.kind == "latency_seconds" and b.latency is None for _, b in budgets):
        elastic.validate(cfg)
        return elastic, ()
    specs, cache_specs = ej.param_specs(cfg), ej.cache_specs(cfg)
    return budget_zone.feasible(elastic, specs, cfg, budgets, cache_specs=cache_specs)


def _budgets(
    group: dict[str, Any], latency: dict[str, Any]
) -> tuple[tuple[str, ej.Budget], ...]:
    names, targets = group["names"], group["targets"]
    if len(names) != len(targets) or not names:
        raise ValueError(f"budgets: {len(names)} names for {len(targets)} targets")
    if odd := [name for name in names if not isinstance(name, str) or not name]:
        raise ValueError(f"budgets.names: expected non-empty strings, got {odd}")
    counted = {name: latency[name] for name in ("phase", "new_tokens")}
    return tuple(
        (name, ej.parse_budget(target, kind=group["kind"], **counted))
        for name, target in zip(names, targets, strict=True)
    )


def _odd_values(values, cfg, task) -> Iterator[str]:
    """What no constructor checks."""
    if values["controls"] not in CONTROLS:
        yield f"controls: expected one of {CONTROLS}, got {values['controls']!r}"
    if values["on_nonfinite"] not in ("stop", "skip"):
        yield f"on_nonfinite: expected 'stop' or 'skip', got {values['on_nonfinite']!r}"
    positive = {
        "save_every": values["save_every"],
        "log_every": values["log_every"],
        "parent_training.check_every": values["parent_training"]["check_every"],
        "parent_training.examples": values["parent_training"]["examples"],
        "evaluation.examples": values["evaluation"]["examples"],
        "calibration.batch": values["calibration"]["batch"],
        "calibration.rows": values["calibration"]["rows"],
        "orders.rows": values["orders"]["rows"],
        "orders.random": values["orders"]["random"],
    }
    sizes = ("batch", "prompt", "new_tokens", "repeats")
    positive |= {f"latency.{name}": values["latency"][name] for name in sizes}
    for name, n in positive.items():
        if n < 1:
            yield f"{name}: expected at least 1, got {n}"
    if (first := values["router"]["fit_first"]) < 0:
        yield f"router.fit_first: expected a number of updates, at least 0, got {first}"
    if values["calibration"]["rows"] % max(1, values["calibration"]["batch"]):
        yield "calibration.rows: expected a multiple of calibration.batch"
    share = values["router"]["hard_probability"]
    if not 0 <= share <= 1:  # false of NaN too
        yield f"router.hard_probability: expected a share in 0..1, got {share}"
    for name in ("floor", "target"):
        value, measure = values["parent_training"][name], task and task.measure
        if task and not (measure.low <= value <= measure.high and value < math.inf):
            yield (
                f"parent_training.{name}: expected {measure.name} in "
                f"{measure.low:g}..{measure.high:g}, got {value}"
            )
    if odd := [w for w in values["data"]["weights"] if not 0 < w < math.inf]:
        yield f"data.weights: expected positive numbers, got {odd}"
    if cfg is not None and task is not None and cfg.vocab < task.vocab:
        whose = values["parent"] or "model"
        yield f"{whose}.vocab {cfg.vocab}: the data need {task.vocab} tokens"


def _odd_control(values) -> Iterator[str]:
    """What keeps pairs of budgets from being measured."""
    group, named = values["control"], values["budgets"]["names"]
    if (source := values["data"]["source"]) != "reasoning":
        yield f"control.caps: thoughts need data.source='reasoning', got {source!r}"
    caps = group["caps"]
    if any(type(n) is not int or n < 1 for n in caps) or len(set(caps)) < len(caps):
        yield f"control.caps: expected different ints from 1 on, got {caps}"
    pair = group["budgets"]
    if len(pair) != 2 or len({*pair} & {*named}) != 2:
        hints = (_did_you_mean(name, named) for name in pair if name not in named)
        yield (
            f"control.budgets: expected two of {named}, large and small, got {pair}"
            f"{next(hints, '')}"
        )
    elif list(named).index(pair[0]) > list(named).index(pair[1]):
        yield f"control.budgets: expected the larger one first, got {pair}"
    for name, known in (
        ("hand_overs", HAND_OVERS),
        ("stages", values["stages"]["names"]),
    ):
        given = group[name]
        if not given or tuple(n for n in known if n in given) != tuple(given):
            yield (
                f"control.{name}: expected some of {tuple(known)}, in this order, got "
                f"{given}"
            )
    least = {"seeds": 1, "problems": 2, "repeats": 1, "grace": 0, "max_answer": 1}
    for name, n in least.items():
        if group[name] < n:
            yield f"control.{name}: expected at least {n}, got {group[name]}"


def _recipes(group: dict[str, Any], cfg: ej.ModelConfig) -> dict[str, ej.Recipe]:
    """What each known arm rounds.

    Raises:
      ValueError: rules that no recipe has, or that do not fit the parent.
    """
    recipes, specs = {}, ej.param_specs(cfg)
    for arm in group["arms"]:
        if arm not in ARMS:
            continue
        format, _ = ARMS[arm]
        if odd := [rule for rule in group["rules"] if len(rule) != 2]:
            raise ValueError(f"quantization.rules: expected (pattern, format): {odd}")
        rules = ((p, format if f == "arm" else f) for p, f in group["rules"])
        recipes[arm] = ej.Recipe(format, tuple(rules), group["block_scale"])
        formats(specs, cfg, recipes[arm])
    return recipes


def _odd_quantization(values, stage, budgets) -> Iterator[str]:
    """What keeps a nested checkpoint from being quantized and measured."""
    group = values["quantization"]
    arms = group["arms"]
    words = {"scales": SCALES, "teacher": TEACHERS}
    for name, known in words.items():
        if group[name] not in known:
            yield f"quantization.{name}: expected one of {known}, got {group[name]!r}"
    if odd := [arm for arm in arms if arm not in ARMS]:
        yield f"quantization.arms: expected some of {tuple(ARMS)}, got {odd}"
    if len({*arms}) < len(arms):
        yield f"quantization.arms: each once, got {arms}"
    if (source := values["data"]["source"]) != "reasoning":
        yield f"quantization.arms: need data.source='reasoning', got {source!r}"
    if group["seeds"] < 1:
        yield f"quantization.seeds: expected at least 1, got {group['seeds']}"
    if stage is not None and (stage.router != "frozen" or stage.mixed_prefixes):
        yield "quantization.stage: needs router='frozen' and mixed_prefixes=0"
    elif stage is not None and budgets is not None:
        try:
            stage.budget_weights(len(budgets))
        except ValueError as error:
            yield f"quantization.{error}"


def _load(path: str | None, problems: list[str]) -> ConfigDict | None:
    if not path:
        return None
    file = pathlib.Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(
            file.name, [p.name for p in file.parent.glob("*.py")], n=1
        )
        hint = f"; did you mean {file.parent / near[0]}?" if near else ""
        problems.append(f"--config={path}: no such file{hint}")
        return None
    spec = importlib.util.spec_from_file_location("experiment_config", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
        if not isinstance(config, ConfigDict):
            raise TypeError(f"get_config() returned {type(config).__name__}")
    except Exception as error:  # the file is the user's: anything may go wrong in it
        trace = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in trace if frame.filename == str(file)]
        where = f"{file}:{lines[-1]}" if lines else str(file)
        problems.append(
            f"--config={path}: {type(error).__name__} at {where}: {error}; expected "
            "a Python file with get_config() that returns a ConfigDict"
        )
        return None
    return config


def _override(config: ConfigDict, name: str, text: str) -> Iterator[str]:
    """Sets one dotted field from text, as the flags will; yields what is wrong."""
    *groups, field = name.split(".")
    here = config
    for depth, group in enumerate([*groups, field]):
        if not isinstance(here, ConfigDict) or group not in here:
            known = list(here) if isinstance(here, ConfigDict) else []
            yield f"unknown --config.{name}{_did_you_mean(group, known)}"
            return
        if depth < len(groups):
            here = here[group]
    old = here[field]
    try:
        here[field] = _parsed(old, text)
    except (KeyError, ValueError, SyntaxError, TypeError):
        yield (
            f"--config.{name}={text}: expected {type(old).__name__}, such as {old!r}"
        )


def _parsed(old: Any, text: str) -> Any:
    if isinstance(old, str):
        return text
    if isinstance(old, bool):
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if isinstance(old, (int, float)):
        return type(old)(text)
    value = ast.literal_eval(text)
    return value if isinstance(value, type(old)) else (value,)


def _lay_over(values: dict[str, Any], changes: dict[str, Any], at="") -> Iterator[str]:
    """Replaces fields of nested `values` in place; yields names that do not exist."""
    for name, change in changes.items():
        if name not in values:
            yield f"when_smoke.{at}{name}: no such field{_did_you_mean(name, values)}"
        elif isinstance(change, dict) and isinstance(values[name], dict):
            yield from _lay_over(values[name], change, f"{at}{name}.")
        elif type(change) is not type(values[name]):
            yield (
                f"when_smoke.{at}{name}: expected {type(values[name]).__name__}, such "
                f"as {values[name]!r}, got {change!r}"
            )
        else:
            values[name] = change


def _did_you_mean(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {sorted(known)}"
