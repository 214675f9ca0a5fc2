"""Who thinks and who answers: exact answers against seconds, over caps of the thought.

Two budgets of one nested checkpoint, large and small, take both parts in all four
pairs, on the same held-out problems. A pair of one budget goes on from its own cache:
capped thinking at its cheapest, which the mixed pairs have to beat. Seconds are of a
batch of all problems, taken in turns, so that whatever else the machine does meets all
pairs alike. Beside them stands a cost that is the same on every machine: active
parameters times tokens processed.
"""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import elastic_jax as ej
from elastic_jax import control_report
from elastic_jax.budget_control import Thought
from elastic_jax.fronts import OWN_CACHE
from elastic_jax.manifest import plain
from experiments import training
from experiments.settings import Plan
from experiments.tasks import END_THINK, EOS, NEWLINE, prompts, score
from experiments.workdir import Failed, Workdir, bar, console

FILE = "control.json"


class Arm(NamedTuple):
    """One way to solve a problem.

    Attributes:
      think, answer: names of budgets.
      hand_over: as of `think_and_answer`, or `OWN_CACHE` where one budget does both.
    """

    think: str
    answer: str
    hand_over: str


def arms(large: str, small: str, hand_overs: Sequence[str]) -> list[Arm]:
    """All pairs of two budgets; those of different ones once per hand-over."""
    own = [Arm(name, name, OWN_CACHE) for name in (large, small)]
    pairs = (small, large), (large, small)
    return own + [Arm(*pair, how) for pair in pairs for how in hand_overs]


def passes(
    prompt: np.ndarray, thought: np.ndarray, answer: np.ndarray, hand_over: str
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that the thinking and the answering model process, from lengths [b].

    The last token of a text is processed with the one that is written behind it.
    """
    again = prompt + thought - 1 if hand_over == "reprefill" else 0
    return prompt - 1 + thought, again + answer


def measure(plan: Plan, workdir: Workdir, nested: Any, *, allow_changes: bool) -> None:
    """Sweeps every seed, trains those that are missing, and writes the report.

    A seed that `control.json` holds is not measured again.

    Args:
      nested: the permuted parent that elastic training starts from.

    Raises:
      Failed: the weights at the end of a stage were not kept.
    """
    asked = plan.values["control"]
    name = training.identity(plan, plan.stages)
    name["control"] = plain({k: v for k, v in asked.items() if k != "seeds"}, "control")
    found = workdir.read(FILE)
    if found is None or found["identity"] != name:
        found = {"identity": name, "seeds": {}}
    for seed in range(asked["seeds"]):
        if str(seed) not in found["seeds"]:
            folder = _trained(plan, workdir, nested, seed, allow_changes)
            found["seeds"][str(seed)] = _seed(plan, workdir, folder)
            workdir.write(FILE, found)
    large, small = asked["budgets"]
    problems = plan.task.evaluation | {"problems": asked["problems"]}
    found |= {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "smoke": plan.values["smoke"],
        "large": large,
        "small": small,
        "stages": list(asked["stages"]),
        "mixed": [stage.name for stage in plan.stages if stage.mixed_prefixes],
        "evaluation": problems,
        "repeats": asked["repeats"],
    }
    found["seeds"] = {str(i): found["seeds"][str(i)] for i in range(asked["seeds"])}
    workdir.write(FILE, found)


def measured_seed(
    plan: Plan, workdir: Workdir, nested: Any, seed: int
) -> dict[str, Any]:
    """Trains with one seed, also the first, unless that is done, and sweeps it."""
    seeded, folder = training.of_seed(plan, seed)
    training.elastic_training(seeded, workdir, folder, nested, keep_stages=True)
    return _seed(plan, workdir, folder)


def report(workdir: Workdir) -> None:
    """Writes the report from the numbers, where there are any."""
    if (found := workdir.read(FILE)) is not None:
        path = control_report.write_control_report(workdir.path, found)
        console.print(f"thinking and answering: {path}")


def _trained(plan, workdir, nested, seed: int, allow_changes: bool) -> str:
    """The folder of elastic training with this seed; trains unless it is complete."""
    seeded, folder = training.of_seed(plan, seed)
    if seed:
        options = {"keep_stages": True, "allow_changes": allow_changes}
        training.elastic_training(seeded, workdir, folder, nested, **options)
    return folder


def _seed(plan: Plan, workdir: Workdir, folder: str) -> dict[str, Any]:
    """What one training run is measured to do: rows for every stage asked for."""
    asked, rows = plan.values["control"], []
    large, small = asked["budgets"]
    for stage in asked["stages"]:
        path = training.stage_end(workdir, folder, stage)
        if not path.exists():
            raise Failed(
                f"{path} is missing: this workdir was trained without control.caps; "
                "use a new --workdir"
            )
        opened = ej.open_nested(path)
        counts = {name: opened.budgets[name] for name in (large, small)}
        sweep = Sweep(plan, opened.restore()[0], counts)
        repeats = asked["repeats"] if stage == asked["stages"][-1] else 0
        total = len(sweep.cases) * (2 + repeats)
        with bar(f"{folder} {stage}", total) as advance:
            rows += [{"stage": stage} | row for row in sweep.rows(repeats, advance)]
    return {
        "rows": rows,
        "active_params": sweep.active,
        "counts": {name: dict(each) for name, each in counts.items()},
    }


class Sweep:
    """All arms at all caps, on one set of weights.

    Attributes:
      cases: (arm, cap), the order in which they take turns.
      active: active parameters of both budgets.
    """

    def __init__(self, plan: Plan, params: Any, counts: Mapping[str, ej.Counts]):
        asked, specs = plan.values["control"], ej.param_specs(plan.cfg)
        self.cases = [
            (arm, cap)
            for cap in asked["caps"]
            for arm in arms(*asked["budgets"], asked["hand_overs"])
        ]
        self.active = {
            name: ej.cost(specs, plan.cfg, counts=each).active_params
            for name, each in counts.items()
        }
        self._asked, self._counts = asked, counts
        self._model = params, plan.cfg
        task, seed = plan.task.data["evaluation"], plan.values["seed"]
        self._problems = task.problems(asked["problems"], seed=seed)
        self._prompts, self._lengths = prompts(self._problems)

    def rows(
        self, repeats: int, advance: Callable[[int], None] = lambda _: None
    ) -> list[dict[str, Any]]:
        """One row per case; with `repeats`, also the median of their seconds.

        Everything is compiled before anything is timed. Every other turn goes
        backwards: a machine that gets slower is unfair to nobody.
        """
        rows, taken = [], [[] for _ in self.cases]
        for done, case in enumerate(self.cases, start=1):
            self._solve(*case, rehearse=True)
            rows.append(self._row(*case, self._solve(*case)))
            advance(2 * done)
        numbered = list(enumerate(self.cases))
        for turn in range(repeats):
            for number, case in numbered[:: 1 if turn % 2 == 0 else -1]:
                seconds = self._solve(*case).seconds
                taken[number].append(sum(seconds.values()) / len(self._problems))
            advance((2 + turn + 1) * len(self.cases))
        for row, seconds in zip(rows, taken, strict=True):
            row["seconds"] = statistics.median(seconds) if seconds else None
        return rows

    def _solve(self, arm: Arm, cap: int, *, rehearse: bool = False) -> Thought:
        params, cfg = self._model
        own = arm.hand_over == OWN_CACHE
        return ej.think_and_answer(
            params,
            self._prompts,
            cfg,
            think=self._counts[arm.think],
            answer=self._counts[arm.answer],
            end_of_thinking=(END_THINK,),
            thinking_cap=cap,
            grace=self._asked["grace"],
            newline=NEWLINE,
            max_answer=self._asked["max_answer"],
            stop_tokens=EOS,
            lengths=self._lengths,
            hand_over="transplant" if own else arm.hand_over,
            rehearse=rehearse,
        )

    def _row(self, arm: Arm, cap: int, out: Thought) -> dict[str, Any]:
        each = zip(
            out.thoughts,
            out.thought_lengths,
            out.answers,
            out.answer_lengths,
            self._problems,
            strict=True,
        )
        right = [score([*t[:n], *a[:m]], problem) for t, n, a, m, problem in each]
        lengths = self._lengths, out.thought_lengths, out.answer_lengths
        thinking, answering = passes(*lengths, arm.hand_over)
        work = self.active[arm.think] * thinking + self.active[arm.answer] * answering
        return arm._asdict() | {
            "cap": cap,
            "right": "".join("01"[correct] for correct in right),
            "thought_tokens": float(np.mean(out.thought_lengths)),
            "answer_tokens": float(np.mean(out.answer_lengths)),
            "capped": float(np.mean(out.capped)),
            "work": float(np.mean(work)),
        }
