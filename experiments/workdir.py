"""Where a run lives, what it says, and how it ends.

    workdir/
      parent/        the parent's training run        scores.npz   calibration
      latency.json   the table of latency budgets
      elastic/       nested training                  random-0/    the control runs
      checkpoint/    the nested checkpoint            results.json report.md *.png
      elastic-1/     the same with another seed       stages/      weights at stage ends
      control.json   thinking and answering           budget_control.md
      quantized/     quantized nested checkpoints     quantization.json, .md and .png
      qad-0/ qat-0/  training for them                inputs-0.npz   their calibration

A phase that is complete is read back, not run again. `experiments/claims.py` runs the
same phases in folders of its own.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from elastic_jax import fit

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
