"""The loop around a training step: what makes a run survive faults, bit for bit.

Everything that happens at a step is a function of the state, the data position and
the step number, and those three are what a save holds. A save also names the run it
belongs to, so that a run is never continued with other data or another
configuration by accident.

Exit codes of a process that runs this: 0 done, 2 the configuration or the input is
wrong, 75 stopped on request after saving, 1 anything else.
"""

import contextlib
import json
import math
import os
import pathlib
import signal
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from elastic_jax.budgets import ZONE
from elastic_jax.checkpoint import TrainCheckpoints
from elastic_jax.curriculum import Stage
from elastic_jax.data import Batches
from elastic_jax.train import Objective, TrainState, update

EXIT_STOPPED = 75


class StopRequested(Exception):
    """The run was asked to stop, and has saved: run it again to continue."""


class NonFinite(FloatingPointError):
    """A loss or gradient is NaN or infinite; no update was made."""


@dataclass(frozen=True)
class Run:
    """What the loop needs besides the state.

    Attributes:
      stages: in order; steps count through all of them.
      objective: (stage, facts) -> Objective.
      batches: stage -> a fresh iterator.
      finish: (stage, state, facts) -> facts learned by the stage, for instance the
        counts that a router chose; plain values. It may refuse by raising.
      optimizer: of `train.optimizer`.
      identity: plain values that name the run; a save of another run is refused.
      checkpoints: where to save; None keeps nothing.
      save_every: steps between saves.
      log_every: steps between rows of metrics.
      on_nonfinite: `"stop"`, or `"skip"` to drop the step's update and go on.
      metrics: receives (step, row); `MetricLog.write`, for instance.
      observe: called with (stage, steps done in it, state, row) after every step.
      enough: (stage, steps done in it, state) -> whether the stage may end early. It
        must be a function of its arguments, or a resumed run is not the same run.
    """

    stages: Sequence[Stage]
    objective: Callable[[Stage, Mapping], Objective]
    batches: Callable[[Stage], Batches]
    optimizer: Any
    identity: Mapping[str, Any]
    finish: Callable[[Stage, TrainState, Mapping], Mapping] = lambda *_: {}
    checkpoints: TrainCheckpoints | None = None
    save_every: int = 100
    log_every: int = 10
    on_nonfinite: str = "stop"
    metrics: Any = None
    observe: Callable[[Stage, int, TrainState, Mapping], None] = lambda *_: None
    enough: Callable[[Stage, int, TrainState], bool] = lambda *_: False


def fit(
    run: Run, state: TrainState, *, allow_changes: bool = False
) -> tuple[TrainState, dict[str, Any]]:
    """Trains through all stages, from the last complete save if there is one.

    Returns:
      the final state, and the facts that the stages learned.

    Raises:
      ValueError: the save belongs to another run; lists what changed.
      NonFinite: see `Run.on_nonfinite`.
      StopRequested: after SIGTERM, once the step at hand is saved.
    """
    state, record = resume(run, state, allow_changes=allow_changes)
    facts = dict(record["facts"])
    if run.metrics is not None:
        run.metrics.forget_after(int(state.step))
    with _stop_on_request() as stop:
        for number in range(record["stage"], len(run.stages)):
            stage, batches = run.stages[number], run.batches(run.stages[number])
            start, data = int(state.step), None
            if number == record["stage"]:
                start, data = record["start"], record["data"]
            if data is not None:
                batches.set_state(data)
            here = {"stage": number, "start": start}
            state = _stage(run, stage, state, batches, facts, stop, here)
            facts |= run.finish(stage, state, facts)
            batches.close()
            after = {"stage": number + 1, "start": int(state.step)}
            _save(run, state, facts, None, after)
            if stop:
                raise StopRequested(f"stopped after stage {stage.name!r}")
    return state, facts


def resume(
    run: Run, state: TrainState, *, allow_changes: bool = False
) -> tuple[TrainState, dict[str, Any]]:
    """The last complete save of `run`, or the given fresh state."""
    fresh = {"facts": {}, "data": None, "stage": 0, "start": int(state.step)}
    if run.checkpoints is None or run.checkpoints.latest_step() is None:
        return state, fresh
    step = run.checkpoints.latest_step()
    record = run.checkpoints.record(step)
    changed = differences(record["identity"], run.identity)
    if changed and not allow_changes:
        raise ValueError(
            "the saved run is another one:\n  "
            + "\n  ".join(changed)
            + "\nrestore what changed, use a new workdir, or allow the changes"
        )
    return run.checkpoints.restore(step, state), record


def _stage(run, stage, state, batches, facts, stop, here):
    """All remaining steps of one stage."""
    objective = run.objective(stage, facts)
    alarms, start = Alarms(), here["start"]
    over = int(state.step) - start >= stage.total_steps
    while not over:
        done = int(state.step) - start
        batch, before = next(batches), int(state.step)
        gradients, losses = objective.gradients(state, batch, done)
        row = _summary(losses)
        finite = math.isfinite(row["loss"])
        if not finite:
            _refuse_step(run, before, stage, batch, losses, "loss")
        rates = learning_rates(stage, done)
        state, norms = update(run.optimizer, state, gradients, rates, finite)
        row |= {name: float(norm) for name, norm in norms.items()}
        if finite and not all(math.isfinite(row[name]) for name in norms):
            finite = False
            _refuse_step(run, before, stage, batch, losses, "gradient norm")
        done = int(state.step) - start
        if done % run.log_every == 0 or done == stage.total_steps:
            row |= objective.health(state, done - 1)
        if not finite:
            row["alarm/nonfinite"] = 1
        row |= alarms.check(row, stage, done)
        if run.metrics is not None:
            run.metrics.write(before, {"stage": stage.name, **rates, **row})
        run.observe(stage, done, state, row)
        over = done == stage.total_steps or run.enough(stage, done, state)
        if not over and (stop or (before + 1) % run.save_every == 0):
            _save(run, state, facts, batches.get_state(), here)
        if not over and stop:
            raise StopRequested(f"stopped at step {int(state.step)}")
    return state


def learning_rates(stage: Stage, step: int) -> dict[str, float]:
    """Rates of weights and router at a step of the stage: warm-up, then cosine."""
    if step < stage.warmup_steps:
        factor = (step + 1) / stage.warmup_steps
    else:
        span = max(1, stage.total_steps - stage.warmup_steps)
        cosine = 0.5 + 0.5 * math.cos(math.pi * (step - stage.warmup_steps) / span)
        low = stage.final_learning_rate
        factor = low + (1 - low) * cosine
    router = stage.router_learning_rate if stage.router == "train" else 0.0
    return {
        "rate/params": factor * stage.learning_rate,
        "rate/router": factor * router,
    }


def differences(old: Mapping, new: Mapping, path: str = "") -> list[str]:
    """Every leaf that differs between two nested mappings, by name."""
    found = []
    for key in sorted({*old, *new}, key=str):
        name = f"{path}{key}"
        if key not in old:
            found.append(f"{name}: new, {new[key]!r}")
        elif key not in new:
            found.append(f"{name}: was {old[key]!r}, is gone")
        elif isinstance(old[key], Mapping) and isinstance(new[key], Mapping):
            found += differences(old[key], new[key], f"{name}.")
        elif old[key] != new[key]:
            found.append(f"{name}: was {old[key]!r}, is {new[key]!r}")
    return found


def software() -> dict[str, Any]:
    """What bit equality is promised per: library version and devices."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "device": device.device_kind,
        "devices": jax.device_count(),
    }


class Alarms:
    """Watches a stage for the faults that do not stop it.

    An alarm is a row entry `alarm/<cause>` and is reported with what to do.
    """

    ADVICE = {
        "loss_spike": "the loss is 3 times its recent median: lower learning_rate",
        "router_collapse": "an axis settled in the first third of the stage: raise "
        "budget_loss_weight, or lower router_learning_rate",
        "budget_missed": "a budget is outside its zone in the last third of the stage: "
        "raise budget_loss_weight, or offer finer choices",
    }
    WINDOW = 50

    def __init__(self):
        self.recent: list[float] = []

    def check(self, row: Mapping[str, Any], stage: Stage, done: int) -> dict[str, int]:
        """The alarms of one row of metrics, as {"alarm/<cause>": 1}."""
        raised = []
        full = len(self.recent) >= self.WINDOW // 2
        if full and row["loss"] > 3 * statistics.median(self.recent):
            raised.append("loss_spike")
        self.recent = [*self.recent, row["loss"]][-self.WINDOW :]
        third = stage.total_steps / 3
        if stage.router == "train" and "certainty" in row:
            if done < third and row["certainty"] > 0.999:
                raised.append("router_collapse")
            ratios = [v for k, v in row.items() if k.endswith("/cost_over_target")]
            if done > 2 * third and any(abs(ratio - 1) > ZONE for ratio in ratios):
                raised.append("budget_missed")
        return {f"alarm/{cause}": 1 for cause in raised}


class MetricLog:
    """Metrics as JSON lines and as TensorBoard event files, one row per step."""

    def __init__(self, directory: str | os.PathLike):
        self.path = pathlib.Path(directory) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._events = SummaryWriter(str(directory))

    def forget_after(self, step: int) -> None:
        """Drops rows of steps that a resumed run will do again."""
        kept = [row for row in self.rows() if row["step"] < step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(text)
        beside.replace(self.path)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Appends one row; numbers also go to TensorBoard."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self._events.add_scalar(name, value, step)

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows; a row cut short by a kill is not one."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def close(self) -> None:
        self._events.close()


@contextlib.contextmanager
def _stop_on_request():
    """A list that is no longer empty once SIGTERM came; a second one exits at once."""
    requests: list[int] = []

    def handle(number, frame):
        if requests:
            os._exit(1)
        requests.append(number)

    try:
        previous = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not the main thread: whoever owns it decides
        yield requests
        return
    try:
        yield requests
    finally:
        signal.signal(signal.SIGTERM, previous)


def _save(run, state, facts, data, at):
    if run.checkpoints is not None:
        record = {"identity": dict(run.identity), "facts": dict(facts), "data": data}
        run.checkpoints.save(int(state.step), state, record | at)


def _summary(losses) -> dict[str, float]:
    """The mean loss of a step, and the mean per budget."""
    row = {"loss": float(np.mean([loss for _, loss in losses]))}
    for name in dict.fromkeys(name for name, _ in losses):
        row[f"loss/{name}"] = float(np.mean([v for n, v in losses if n == name]))
    return row


def _refuse_step(run, step, stage, batch, losses, what):
    """Writes down what went wrong; stops unless the run skips such steps."""
    report = {
        "step": step,
        "stage": stage.name,
        "what": what,
        "losses": [[name, repr(float(loss))] for name, loss in losses],
        "examples": np.asarray(batch["index"]).tolist(),
    }
    if run.metrics is not None:
        path = run.metrics.path.with_name(f"nonfinite_{report['step']}.json")
        path.write_text(json.dumps(report, indent=2) + "\n")
    if run.on_nonfinite == "stop":
        budgets = sorted({n for n, v in losses if not math.isfinite(v)})
        raise NonFinite(
            f"{what} is not finite at step {report['step']} of stage {stage.name!r}, "
            f"budgets {budgets or 'unknown'}, examples {report['examples']}; no update "
            "was made, and a rerun continues from the last save. Look at the examples, "
            "lower the learning rate, or set on_nonfinite to 'skip'"
        )
