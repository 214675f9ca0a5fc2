"""Requests in text, answered in batches; one that is wrong takes no other down.

Requests that share a submodel, or a pair of them, and what ends their rows run in one
batch. A batch is compiled before it is timed, so seconds are those of the work.
"""

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from elastic_jax import nesting
from elastic_jax.axes import Counts
from elastic_jax.budget_control import think_and_answer
from elastic_jax.checkpoint import Nested, open_nested
from elastic_jax.config import ModelConfig, did_you_mean
from elastic_jax.convert import parse_budget_or_counts
from elastic_jax.generate import generate
from elastic_jax.request import NAMES, Reply, Request, problems_of_request
from elastic_jax.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one batch.

    Attributes:
      requests: in the batch.
      seconds: by phase: "read" and "write", or "read", "think", "hand_over", "answer".
      tokens: written by phase.
      first_token_seconds: from the start of the batch to its first token.
    """

    requests: int
    seconds: Mapping[str, float]
    tokens: Mapping[str, int]
    first_token_seconds: float


@dataclasses.dataclass(frozen=True)
class Server:
    """What all requests share.

    Attributes:
      params, cfg: the parent that submodels are cut from.
      budgets: name -> counts; None is all.
      tokenizer: between text and tokens.
      stop_tokens: end every text and answer.
      end_of_thinking: text that ends a thought.
      batch: requests that run together, at most.
      max_length: tokens of prompt, thought and answer together, at most.
      exact: as of `generate`.
    """

    params: Any
    cfg: ModelConfig
    budgets: Mapping[str, Counts | None]
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...] = ()
    end_of_thinking: str = "</think>"
    batch: int = 8
    max_length: int = 8192
    exact: bool = False

    def serve(
        self,
        requests: Iterable[Request],
        *,
        on_timing: Callable[[Timing], None] = lambda timing: None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[Reply]:
        """Replies batch by batch, bad requests first.

        Args:
          on_timing: called after every batch.
          on_text: called with a request's number and the text that it has so far.
        """
        groups: dict[Any, list[tuple[int, Request, np.ndarray]]] = {}
        for number, request in enumerate(requests):
            try:
                tokens = self._checked(request)
                groups.setdefault(self._together(request), []).append(
                    (number, request, tokens)
                )
            except ValueError as error:
                yield Reply(number, request.id, error=str(error))
        for asked in groups.values():
            # Long prompts beside long ones: a batch is as long as its longest.
            asked.sort(key=lambda each: (len(each[2]), each[0]))
            for start in range(0, len(asked), self.batch):
                yield from self._batch(
                    asked[start : start + self.batch], on_timing, on_text
                )

    def submodel(self, name: str | None) -> Counts | None:
        """The counts that a request names.

        Raises:
          ValueError: no budget has that name.
        """
        if name is None:
            return None
        if name in self.budgets:
            return self.budgets[name]
        if "=" not in name:
            known = did_you_mean(name, self.budgets)
            raise ValueError(
                f"unknown budget {name!r}{known}, have {', '.join(self.budgets)}; "
                "counts are written embed=1920,expert_ffn=960"
            )
        return nesting.counts(self.cfg, **parse_budget_or_counts(name))

    def _together(self, request: Request) -> tuple:
        """Requests run in one batch where this is equal."""
        writers = tuple(map(self.submodel, request.writers))
        thinking = request.thinks and (request.hand_over, request.grace)
        drafting = request.draft and (
            self.submodel(request.draft),
            request.draft_tokens,
        )
        return writers, thinking, drafting, tuple(request.stop)

    def _checked(self, request: Request) -> np.ndarray:
        """The prompt's tokens.

        Raises:
          ValueError: with everything that is wrong with the request.
        """
        problems = list(problems_of_request(request))
        tokens = np.zeros(0, int)
        if isinstance(request.prompt, str):
            if not request.prompt:
                problems.append("prompt: expected text, got nothing")
            else:
                tokens = np.asarray(self.tokenizer.prompt(request.prompt.encode()))
        else:
            tokens = np.asarray(request.prompt)
            if tokens.ndim != 1 or not tokens.size or tokens.dtype.kind not in "iu":
                problems.append(f"prompt: expected a list of tokens, got {tokens}")
                tokens = np.zeros(0, int)
        outside = tokens[(tokens < 0) | (tokens >= self.cfg.vocab)]
        if outside.size:
            problems.append(
                f"prompt: token {outside[0]} is outside the vocabulary of "
                f"{self.cfg.vocab}"
            )
        for name in NAMES:
            if isinstance(budget := getattr(request, name), str):
                try:
                    self.submodel(budget)
                except ValueError as error:
                    problems.append(f"{name}: {error}")
        if request.budget is not None and request.thinks:
            problems.append("give budget, or think and answer, not both")
        if not problems:
            asked = len(tokens) + request.max_new_tokens
            if request.thinks:
                end = self.tokenizer.plain(self.end_of_thinking)
                asked += request.thinking_cap + request.grace + len(end)
            if asked > self.max_length:
                problems.append(
                    f"prompt of {len(tokens)} tokens: with all that may be written "
                    f"{asked}, longer than the cache of {self.max_length}; ask for "
                    "less, or raise the length"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return tokens

    def _batch(self, asked, on_timing, on_text) -> Iterator[Reply]:
        """Runs one batch; if it cannot run as a whole, each of its requests alone."""
        try:
            replies, timing = self._run(asked, on_text)
        except ValueError as error:
            if len(asked) == 1:
                number, request, _ = asked[0]
                yield Reply(number, request.id, error=str(error))
                return
            for each in asked:
                yield from self._batch([each], on_timing, on_text)
            return
        on_timing(timing)
        yield from replies

    def _run(self, asked, on_text) -> tuple[list[Reply], Timing]:
        requests = [request for _, request, _ in asked]
        lengths = np.array([len(tokens) for *_, tokens in asked])
        prompts = np.zeros((len(asked), lengths.max()), np.int32)
        for row, (*_, tokens) in zip(prompts, asked, strict=True):
            row[: len(tokens)] = tokens
        first = requests[0]
        column = lambda name: np.array([getattr(r, name) for r in requests])
        options: dict[str, Any] = {
            "lengths": lengths,
            "stop_tokens": self.stop_tokens,
            "stop_strings": first.stop,
            "pieces": self.tokenizer.pieces if first.stop else None,
            "exact": self.exact,
            "draft": self.submodel(first.draft),
            "draft_tokens": first.draft_tokens,
            "seeds": column("seed"),
            **{name: column(name) for name in ("temperature", "top_k", "top_p")},
        }
        if first.thinks:
            run, phases = self._thinking(first, column, options), ("think", "answer")
        else:
            options["max_new_tokens"] = column("max_new_tokens")
            options["counts"] = self.submodel(first.budget)
            run, phases = generate, ("write",)
        run = functools.partial(run, self.params, prompts, self.cfg, **options)
        heard = _Heard(asked, self.tokenizer, on_text)
        listener = heard if first.thinks else functools.partial(heard, "write")
        run(rehearse=True, listener=listener)
        heard.start = time.perf_counter()
        out = run(listener=listener)
        if first.thinks:
            written = (out.thought_lengths, out.answer_lengths)
        else:
            written = (out.lengths,)
        tokens = {p: int(n.sum()) for p, n in zip(phases, written, strict=True)}
        timing = Timing(len(asked), out.seconds, tokens, heard.first)
        reply = self._thought if first.thinks else self._text
        return [
            reply(number, row, request, out)
            for row, (number, request, _) in enumerate(asked)
        ], timing

    def _thinking(self, first: Request, column, options) -> Callable:
        writers = map(self.submodel, first.writers)
        options |= {
            **dict(zip(("think", "answer"), writers, strict=True)),
            "thinking_cap": column("thinking_cap"),
            "max_answer": column("max_new_tokens"),
            "grace": first.grace,
            "end_of_thinking": self.tokenizer.plain(self.end_of_thinking),
            "newline": self._newlines,
            "hand_over": first.hand_over,
        }
        return think_and_answer

    @functools.cached_property
    def _newlines(self) -> tuple[int, ...]:
        """The tokens that end a line."""
        try:
            pieces = self.tokenizer.pieces
        except ValueError:  # without bytes of its own, a token is one if it says so
            return tuple(self.tokenizer.plain("\n"))
        return tuple(i for i, piece in enumerate(pieces) if piece.endswith(b"\n"))

    def _text(self, number: int, row: int, request: Request, out) -> Reply:
        tokens = out.tokens[row, : out.lengths[row]]
        return Reply(
            number,
            request.id,
            text=self._shown(tokens, request),
            tokens=len(tokens),
            stopped=bool(out.stopped[row]),
            rounds=int(out.rounds[row]),
        )

    def _thought(self, number: int, row: int, request: Request, out) -> Reply:
        thought = out.thoughts[row, : out.thought_lengths[row]]
        answer = out.answers[row, : out.answer_lengths[row]]
        return Reply(
            number,
            request.id,
            text=self._shown(answer, request),
            thought=self.tokenizer.decode(thought.tolist()),
            tokens=len(answer),
            thought_tokens=len(thought),
            stopped=bool(out.stopped[row]),
            capped=bool(out.capped[row]),
            rounds=int(sum(rounds[row] for rounds in out.rounds.values())),
        )

    def _shown(self, tokens: np.ndarray, request: Request) -> str:
        """The text, without a stop token at its end or a stop string and the rest."""
        kept = tokens.tolist()
        if kept and kept[-1] in self.stop_tokens:
            kept = kept[:-1]
        text = self.tokenizer.decode(kept)
        ends = [at for at in map(text.find, request.stop) if at >= 0]
        return text[: min(ends, default=len(text))]


class _Heard:
    """Notes when the first token came, and passes on the text of each request."""

    def __init__(self, asked, tokenizer: Tokenizer, on_text):
        self.start = self.first = 0.0
        self._asked, self._tokenizer, self._on_text = asked, tokenizer, on_text
        self._tokens: list[list[int]] = [[] for _ in asked]

    def __call__(self, phase: str, tokens: np.ndarray, lengths: np.ndarray) -> None:
        self.first = self.first or time.perf_counter() - self.start
        if self._on_text is None:
            return
        for (number, *_), row, n, held in zip(
            self._asked, tokens, lengths, self._tokens, strict=True
        ):
            if n:
                held += row[:n].tolist()
                self._on_text(number, self._tokenizer.decode(held))


def open_server(
    checkpoint: str | os.PathLike,
    submodels: Collection[str | None],
    *,
    tokenizer: str = "",
    **options: Any,
) -> Server:
    """A server of a nested checkpoint, with as much of it in memory as is needed.

    Args:
      submodels: all that requests will name; where it is one, only that is read.
      tokenizer: a `tokenizer.json`; "" takes the checkpoint's own, or else bytes.
      options: of `Server`.

    Raises:
      ValueError: no such checkpoint, budget or tokenizer.
    """
    nested = open_nested(checkpoint)
    files = nested.files()
    if tokenizer:
        if not Path(tokenizer).is_file():
            raise ValueError(f"{tokenizer}: no such tokenizer.json")
        coder = FileTokenizer(Path(tokenizer).read_bytes())
    elif "tokenizer.json" in files:
        coder = FileTokenizer(files["tokenizer.json"])
    else:
        coder = ByteTokenizer()
    params, cfg, budgets = _needed(nested, {*submodels})
    ends = {*coder.end, *_ends(nested, files)}
    stops = tuple(sorted(token for token in ends if token < cfg.vocab))
    return Server(params, cfg, budgets, coder, stop_tokens=stops, **options)


def _needed(nested: Nested, submodels: set[str | None]):
    """Parameters that hold all these submodels, and how to cut each from them."""
    if len(submodels) == 1 and (only := submodels.pop()) is not None:
        with contextlib.suppress(ValueError):  # whoever asked for it is told why
            budget = only if only in nested.budgets else parse_budget_or_counts(only)
            return *nested.restore(budget), {only: None}
    return *nested.restore(), dict(nested.budgets)


def _ends(nested: Nested, files: Mapping[str, bytes]) -> Iterator[int]:
    """The tokens that end a text, by what came with an imported checkpoint."""
    said = [nested.provenance.get("huggingface") or {}]
    try:
        said.append(json.loads(files.get("generation_config.json", b"{}")))
    except ValueError as error:
        raise ValueError(f"generation_config.json: {error}") from error
    for fields in said:
        given = fields.get("eos_token_id") if isinstance(fields, Mapping) else None
        for token in given if isinstance(given, list) else [given]:
            if type(token) is int and token >= 0:
                yield token
