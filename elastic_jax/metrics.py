"""What a run says about itself: a row of metrics per step, and alarms among them.

Rows are the record that reports are made from, so a resumed run writes the rows that
the unbroken one would have: rows of steps to be done again are dropped first, and
alarms, which compare a loss with those before it, start from the rows kept.
"""

import collections
import functools
import json
import math
import os
import pathlib
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from tensorboardX import SummaryWriter

from elastic_jax.budgets import ZONE
from elastic_jax.curriculum import Stage


class Alarms:
    """Watches a stage for the faults that do not stop it.

    An alarm is a row entry `alarm/<cause>` and is reported with what to do.

    Args:
      rows: metrics of the stage's steps so far.
    """

    ADVICE = {
        "nonfinite": "the step was skipped: see the examples in nonfinite_<step>.json",
        "loss_spike": "a budget's loss is 10 times its recent median: lower "
        "learning_rate",
        "router_collapse": "the router is certain in the first third of the stage, and "
        "misses a budget: raise budget_loss_weight, or lower router_learning_rate",
        "budget_missed": "a budget is outside its zone in the last third of the stage: "
        "raise budget_loss_weight, or offer finer choices",
    }
    WINDOW, SPIKE = 50, 10

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
        # Budgets differ in their losses by orders, and a step sees some of them.
        empty = functools.partial(collections.deque, maxlen=self.WINDOW)
        self.recent = collections.defaultdict(empty)
        for row in rows:
            self._spiked(row)

    def check(self, row: Mapping[str, Any], stage: Stage, done: int) -> dict[str, int]:
        """The alarms of one row of metrics, as {"alarm/<cause>": 1}."""
        raised = ["loss_spike"] if self._spiked(row) else []
        ratios = [v for k, v in row.items() if k.endswith("/cost_over_target")]
        if stage.router == "train" and any(abs(ratio - 1) > ZONE for ratio in ratios):
            third = stage.total_steps / 3
            if done < third and row["certainty"] > 0.999:
                raised.append("router_collapse")
            if done > 2 * third:
                raised.append("budget_missed")
        return {f"alarm/{cause}": 1 for cause in raised}

    def _spiked(self, row: Mapping[str, Any]) -> bool:
        """Whether a budget's loss left its recent ones behind; remembers it."""
        spiked = False
        for name, loss in row.items():
            if not name.startswith("loss/") or not math.isfinite(loss):
                continue
            recent = self.recent[name]
            known = len(recent) >= self.WINDOW // 2
            spiked |= known and loss > self.SPIKE * statistics.median(recent)
            recent.append(loss)
        return spiked


class MetricLog:
    """Metrics as JSON lines and as TensorBoard event files, one row per step."""

    def __init__(self, directory: str | os.PathLike):
        self.path = pathlib.Path(directory) / "metrics.jsonl"
        self._events: SummaryWriter | None = None  # a log that is read writes nothing

    def forget_after(self, step: int) -> None:
        """Drops rows of steps that a resumed run will do again."""
        kept = [row for row in self.rows() if row["step"] < step]
        text = "".join(map(_line, kept))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(text)
        beside.replace(self.path)
        self.close()
        # Files are named by the second; a quick restart must not reuse a name.
        self._events = SummaryWriter(
            str(self.path.parent), purge_step=step, filename_suffix=f".{step}"
        )

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Appends one row; numbers also go to TensorBoard.

        JSON has no NaN and no infinities: they are written as null, read as NaN.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(_line({"step": step, **row}))
        if self._events is None:
            self._events = SummaryWriter(str(self.path.parent))
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self._events.add_scalar(name, value, step)

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows; a row cut short by a kill is not one."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [
            {k: math.nan if v is None else v for k, v in row.items()} for row in rows
        ]

    def close(self) -> None:
        """Completes the event file; a later row begins another."""
        if self._events is not None:
            self._events.close()
            self._events = None


def _line(row: Mapping[str, Any]) -> str:
    def plain(value):
        odd = isinstance(value, float) and not math.isfinite(value)
        return None if odd else value

    text = json.dumps({k: plain(v) for k, v in row.items()}, allow_nan=False)
    return text + "\n"
