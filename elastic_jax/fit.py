"""The loop around a training step: what makes a run survive faults, bit for bit.

Everything that happens at a step is a function of the state, the data position and
the step number, and those three are what a save holds. A save also names the run it
belongs to, so that a run is never continued with other data or another
configuration by accident.

Exit codes of a process that runs this: 0 done, 2 the configuration or the input is
wrong, 75 stopped on request after saving, 1 anything else.
"""

import contextlib
import importlib.metadata
import json
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from elastic_jax.curriculum import Stage
from elastic_jax.data import Batches
from elastic_jax.manifest import plain
from elastic_jax.metrics import Alarms, MetricLog
from elastic_jax.objectives import Objective
from elastic_jax.saves import TrainCheckpoints
from elastic_jax.train import TrainState, update

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
      metrics: where rows of metrics go; None keeps none.
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
    metrics: MetricLog | None = None
    observe: Callable[[Stage, int, TrainState, Mapping], None] = lambda *_: None
    enough: Callable[[Stage, int, TrainState], bool] = lambda *_: False

    def __post_init__(self):
        problems = [
            f"{name}: expected at least 1, got {getattr(self, name)}"
            for name in ("save_every", "log_every")
            if getattr(self, name) < 1
        ]
        if self.on_nonfinite not in ("stop", "skip"):
            problems.append(
                f"on_nonfinite: expected 'stop' or 'skip', got {self.on_nonfinite!r}"
            )
        if problems:
            raise ValueError("invalid Run:\n  " + "\n  ".join(problems))


def fit(
    run: Run, state: TrainState, *, allow_changes: bool = False
) -> tuple[TrainState, dict[str, Any]]:
    """Trains through all stages, from the last complete save if there is one.

    Args:
      state: where a run without a save starts; a step donates it.
      allow_changes: continue a save of another run. Other data goes on behind the
        number of examples that were seen.

    Returns:
      the final state, and the facts that the stages learned.

    Raises:
      ValueError: the save belongs to another run; lists what changed.
      NonFinite: see `Run.on_nonfinite`.
      StopRequested: after SIGTERM, once the step at hand is saved.
    """
    state, record = resume(run, state, allow_changes=allow_changes)
    facts = dict(record["facts"])
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_stop_on_request())
        if run.metrics is not None:
            stack.enter_context(contextlib.closing(run.metrics))
            run.metrics.forget_after(int(state.step))
        here, data = {k: record[k] for k in ("stage", "start")}, record["data"]
        for number, stage in list(enumerate(run.stages))[record["stage"] :]:
            with contextlib.closing(run.batches(stage)) as batches:
                if data is not None:
                    _continue(batches, data, allow_changes)
                state = _stage(run, stage, state, batches, facts, stop, here)
            facts |= plain(run.finish(stage, state, facts), "facts")
            here, data = {"stage": number + 1, "start": int(state.step)}, None
            _save(run, state, facts, data, here)
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
    changed = differences(record["identity"], plain(run.identity, "identity"))
    if changed and not allow_changes:
        raise ValueError(
            "the saved run is another one:\n  "
            + "\n  ".join(changed)
            + "\nrestore what changed, use a new workdir, or allow the changes"
        )
    return run.checkpoints.restore(step, state), record


def _continue(batches: Batches, data: Mapping[str, Any], allow_changes: bool) -> None:
    """Sets `batches` to where the saved ones were."""
    if allow_changes:
        here, seen = batches.get_state(), data["position"] * data["batch"]
        data = here | {"position": seen // here["batch"]}
    batches.set_state(data)


def _stage(run, stage, state, batches, facts, stop, here):
    """All remaining steps of one stage."""
    objective, start = run.objective(stage, facts), here["start"]
    before = [] if run.metrics is None else run.metrics.rows()
    alarms = Alarms(row for row in before if row["step"] >= start)
    over = int(state.step) - start >= stage.total_steps
    while not over:
        step = int(state.step)
        batch, done = next(batches), step - start
        gradients, losses = objective.gradients(state, batch, done)
        row = _summary(losses)
        rates, finite = learning_rates(stage, done), math.isfinite(row["loss"])
        state, norms = update(run.optimizer, state, gradients, rates, finite)
        row |= {name: float(norm) for name, norm in norms.items()}
        odd = [name for name in ("loss", *norms) if not math.isfinite(row[name])]
        if odd:
            _refuse_step(run, step, stage, batch, losses, odd[0])
            row["alarm/nonfinite"] = 1
        step, done = step + 1, done + 1
        if done % run.log_every == 0 or done == stage.total_steps:
            row |= objective.health(state, done - 1)
        row |= alarms.check(row, stage, done)
        if run.metrics is not None:
            run.metrics.write(step - 1, {"stage": stage.name, **rates, **row})
        run.observe(stage, done, state, row)
        over = done == stage.total_steps or run.enough(stage, done, state)
        if not over and (stop or step % run.save_every == 0):
            _save(run, state, facts, batches.get_state(), here)
            if stop:
                raise StopRequested(f"stopped at step {step}")
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
    """What bit equality is promised per: versions and devices."""
    device = jax.devices()[0]
    try:
        version = importlib.metadata.version("elastic_jax")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    return {
        "elastic_jax": version,
        "jax": jax.__version__,
        "device": device.device_kind,
        "devices": jax.device_count(),
    }


@contextlib.contextmanager
def _stop_on_request():
    """A list that is no longer empty once SIGTERM came; a second one kills at once."""
    requests: list[int] = []

    def handle(number, frame):
        requests.append(number)
        signal.signal(number, signal.SIG_DFL)  # works also inside a long computation

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
    step = int(state.step)
    # A stage that allowed changes made shorter may be over where it was saved.
    if run.checkpoints is not None and step not in run.checkpoints.steps():
        record = {"identity": dict(run.identity), "facts": dict(facts), "data": data}
        run.checkpoints.save(step, state, record | at)


def _summary(losses) -> dict[str, float]:
    """The mean loss of a step, and the mean per budget."""
    row = {"loss": float(np.mean([loss for _, loss in losses]))}
    for name in dict.fromkeys(name for name, _ in losses):
        row[f"loss/{name}"] = float(np.mean([v for n, v in losses if n == name]))
    return row


def _refuse_step(run, step, stage, batch, losses, what):
    """Writes down a step that was not taken; stops unless the run skips such steps."""
    index, size = np.asarray(batch["index"]), stage.micro_batch
    bad = [i for i, (_, loss) in enumerate(losses) if not math.isfinite(loss)]
    suspects = bad or range(len(losses))  # the gradients of any may be the cause
    report = {
        "step": step,
        "stage": stage.name,
        "what": what,
        "budgets": sorted({losses[i][0] for i in suspects}),
        "examples": [n for i in suspects for n in index[i * size :][:size].tolist()],
        "losses": [[name, repr(loss)] for name, loss in losses],
    }
    if run.metrics is not None:
        path = run.metrics.path.with_name(f"nonfinite_{step}.json")
        path.write_text(json.dumps(report, indent=2) + "\n")
    if run.on_nonfinite == "stop":
        raise NonFinite(
            f"{what} is not finite at step {step} of stage {stage.name!r}, budgets "
            f"{report['budgets']}, examples {report['examples']}; no update was made, "
            "and a rerun continues from the last save. Look at the examples, lower the "
            "learning rate, or set on_nonfinite to 'skip'"
        )
