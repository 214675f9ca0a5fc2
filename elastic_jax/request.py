"""One request in text, and what came of it."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from elastic_jax.budget_control import HAND_OVERS
from elastic_jax.config import did_you_mean
from elastic_jax.sampling import sampling


@dataclasses.dataclass(frozen=True)
class Request:
    """One text to be continued, or thought about and answered.

    Attributes:
      prompt: text, or tokens.
      id: returned with the reply.
      budget: who writes: a budget's name, or counts as of `parse_budget_or_counts`;
        None is the parent. Not with `think` and `answer`.
      think, answer: who thinks, and who answers; one alone does both.
      max_new_tokens: of the text or the answer.
      thinking_cap, grace: tokens of a thought, and until the next line's end.
      hand_over: from thought to answer, "reprefill" or "transplant".
      draft: who drafts; None is nobody.
      draft_tokens: drafted at a time.
      temperature, top_k, top_p, seed: as of `sampling`.
      stop: strings that end the text or the answer.
    """

    prompt: str | Sequence[int]
    id: Any = None
    budget: str | None = None
    think: str | None = None
    answer: str | None = None
    max_new_tokens: int = 256
    thinking_cap: int = 512
    grace: int = 64
    hand_over: str = "reprefill"
    draft: str | None = None
    draft_tokens: int = 4
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    @property
    def thinks(self) -> bool:
        return self.think is not None or self.answer is not None

    @property
    def writers(self) -> tuple[str | None, ...]:
        """Who thinks and who answers, or who writes."""
        if not self.thinks:
            return (self.budget,)
        return self.think or self.answer, self.answer or self.think

    @property
    def submodels(self) -> tuple[str | None, ...]:
        """All that take part."""
        return self.writers if self.draft is None else (*self.writers, self.draft)


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came of a request.

    Attributes:
      number: the request's place among all.
      id: of the request.
      error: why there is nothing else; None where there is.
      text: the continuation or the answer, without what stopped it.
      thought: None where none was asked for.
      tokens, thought_tokens: how many were written.
      stopped: whether the text ended by itself, not by its limit.
      capped: whether the thought was ended for it.
      rounds: calls of the models; fewer than tokens with drafts.
    """

    number: int
    id: Any
    error: str | None = None
    text: str = ""
    thought: str | None = None
    tokens: int = 0
    thought_tokens: int = 0
    stopped: bool = False
    capped: bool = False
    rounds: int = 0


def problems_of_request(request: Request) -> Iterator[str]:
    """Everything that is wrong with the numbers and words of a request."""
    for name, least in (("max_new_tokens", 1), ("thinking_cap", 1), ("grace", 0)):
        value = getattr(request, name)
        if type(value) is not int or value < least:
            yield f"{name}: expected an int from {least} on, got {value!r}"
    if type(request.draft_tokens) is not int or request.draft_tokens < 1:
        yield f"draft_tokens: expected an int from 1 on, got {request.draft_tokens!r}"
    if request.hand_over not in HAND_OVERS:
        yield f"hand_over: expected one of {HAND_OVERS}, got {request.hand_over!r}"
    try:
        names = ("temperature", "top_k", "top_p")
        sampling(1, seeds=request.seed, **{n: getattr(request, n) for n in names})
    except ValueError as error:
        yield from (line.strip() for line in str(error).split("\n")[1:])
    strings = isinstance(request.stop, list | tuple)
    if not strings or not all(isinstance(s, str) and s for s in request.stop):
        yield f"stop: expected strings that are not empty, got {request.stop!r}"
    yield from _misnamed({name: getattr(request, name) for name in NAMES})


def _misnamed(fields: Mapping[str, Any]) -> Iterator[str]:
    for name in NAMES:
        if not isinstance(given := fields.get(name), str | None):
            yield f"{name}: expected the name of one budget, got {given!r}"


NAMES = ("budget", "think", "answer", "draft")
FIELDS = tuple(field.name for field in dataclasses.fields(Request))


def parse_request(fields: Any, **defaults: Any) -> Request:
    """A request from a mapping, as of a line of JSON.

    Raises:
      ValueError: it is no mapping, has no prompt, or names what no request has.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object, got {type(fields).__name__}")
    problems = [
        f"unknown field {name!r}{did_you_mean(name, FIELDS)}"
        for name in fields
        if name not in FIELDS
    ]
    if "prompt" not in fields:
        problems.append("no prompt")
    elif not isinstance(fields["prompt"], str | list):
        problems.append("prompt: expected text or a list of tokens")
    problems += _misnamed(fields)
    if problems:
        raise ValueError("; ".join(problems))
    if {"think", "answer"} & set(fields):
        defaults.pop("budget", None)
    elif "budget" in fields:
        defaults = {k: v for k, v in defaults.items() if k not in ("think", "answer")}
    given = defaults | fields
    if isinstance(stop := given.get("stop", ()), list | str):
        given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return Request(**given)
