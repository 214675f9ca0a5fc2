"""What a model is judged by: how a value reads, and when two values differ.

All that a report says differently for another measure stands here. Results hold
plain numbers and the name of their measure.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_jax.tables import (
    format_bits,
    format_bytes,
    format_count,
    format_nats,
    format_share,
)

Evaluation = Mapping[str, Any]  # how it was measured, as results say it
CLEAR_SHARE, CLEAR_NATS = 0.05, 1e-3  # two KLs closer than either are a tie
CLEAR_BITS = 0.01  # two bits per byte closer than this share are one


@dataclass(frozen=True)
class Measure:
    """One way to judge a model.

    Attributes:
      name: how tables and sentences call it.
      axis: how a plot's axis calls it.
      higher_is_better: the direction.
      low, high: the bounds of its values.
      form: a value in words.
      margin: the difference of two values in words.
      chance: (ours, others, evaluation) -> how far ours may be from the mean of
        others by chance.
      rule: evaluation -> `chance` in words: "1% for ...".
      method: evaluation -> how it was measured, in words.
      parts: what a value is broken down by.
    """

    name: str
    axis: str
    higher_is_better: bool
    low: float
    high: float
    form: Callable[[float | None], str]
    margin: Callable[[float, float], str]
    chance: Callable[[float, Sequence[float], Evaluation], float]
    rule: Callable[[Evaluation], str]
    method: Callable[[Evaluation], str] = lambda _: ""
    parts: str = ""

    def gain(self, ours: float, theirs: float) -> float:
        """How much better `ours` is: negative where it is worse."""
        return ours - theirs if self.higher_is_better else theirs - ours

    @property
    def worst(self) -> float:
        """The bound that no value is worse than."""
        return self.low if self.higher_is_better else self.high


def _answered(evaluation: Evaluation) -> str:
    text = "Answers are generated"
    if "problems" in evaluation:
        text += f" to {format_count(evaluation['problems'])} problems"
    if "min_steps" in evaluation and "max_steps" in evaluation:
        text += f" of {evaluation['min_steps']} to {evaluation['max_steps']} steps"
    return text


def _sampling_error(ours, others, evaluation):
    """Two standard errors of the difference of two proportions."""
    if not (problems := evaluation.get("problems")):
        return math.inf
    p = statistics.fmean([ours, *others])
    return 2 * math.sqrt(p * (1 - p) * (1 + 1 / len(others)) / problems)


def _sampling_rule(evaluation):
    if not (problems := evaluation.get("problems")):
        return "anything for exact answers, as the number of problems is unknown"
    return f"two standard errors over {problems} problems for exact answers"


def _read(evaluation: Evaluation) -> str:
    text = "Bits are counted over held-out text"
    if "size_bytes" in evaluation and "rows" in evaluation:
        text += f", {format_bytes(evaluation['size_bytes'])} in"
        text += f" {format_count(evaluation['rows'])} rows"
    return f"{text}, divided by the bytes that the tokens stand for"


def _relative(ours: float, theirs: float) -> str:
    size = max(abs(ours), abs(theirs))
    return f"{abs(ours - theirs) / size:.0%}" if size else "0%"


def _bits_apart(ours: float, theirs: float) -> str:
    return f"{format_bits(abs(ours - theirs))} ({abs(ours / theirs - 1):.1%})"


def _apart_by(share: float, least: float):
    def chance(ours, others, _):
        return max(share * max(abs(ours), abs(statistics.fmean(others))), least)

    return chance


EXACT_ANSWERS = Measure(
    name="exact answers",
    axis="problems answered exactly",
    higher_is_better=True,
    low=0.0,
    high=1.0,
    form=format_share,
    margin=lambda ours, theirs: f"{100 * abs(ours - theirs):.1f} points",
    chance=_sampling_error,
    rule=_sampling_rule,
    method=_answered,
    parts="length of the problem",
)
BITS_PER_BYTE = Measure(
    name="bits per byte",
    axis="bits per byte of held-out text, lower is better",
    higher_is_better=False,
    low=0.0,
    high=math.inf,
    form=format_bits,
    margin=_bits_apart,
    chance=_apart_by(CLEAR_BITS, 0.0),
    rule=lambda _: f"{CLEAR_BITS:.0%} for bits per byte",
    method=_read,
    parts="source of the text",
)
DIVERGENCE = Measure(
    name="KL",
    axis="KL from the parent (nats per token)",
    higher_is_better=False,
    low=0.0,
    high=math.inf,
    form=format_nats,
    margin=_relative,
    chance=_apart_by(CLEAR_SHARE, CLEAR_NATS),
    rule=lambda _: f"{CLEAR_SHARE:.0%}, or {CLEAR_NATS} nats per token, for a KL",
)
MEASURES = {measure.name: measure for measure in (EXACT_ANSWERS, BITS_PER_BYTE)}
