"""Thinking with one submodel, answering with another, from one set of weights.

    b batch   t prompt length   n thought   a answer

A thought ends with the end-of-thinking token, or is ended: past its cap, at the next
newline, and past the grace after it in any case, the end-of-thinking tokens are
written for it (Nemotron 3 Nano's budget control, arXiv 2512.20848; two sizes as in Star
Elastic, arXiv 2605.07182). What the answering model is handed is either the text, which
it reads again (`reprefill`), or the thinking model's cache (`transplant`): cut to a
prefix, or extended by zeros, which is what a masked parent would have written.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from elastic_jax import nesting
from elastic_jax.axes import Counts
from elastic_jax.config import ModelConfig
from elastic_jax.decoding import Draft, Submodel, bucket, length_bucket
from elastic_jax.generate import (
    Batch,
    attempt,
    problems_of_counts,
    problems_of_drafts,
    problems_of_exactness,
    problems_of_limits,
    problems_of_prompts,
    ragged,
    trimmed,
)
from elastic_jax.model import init_cache
from elastic_jax.sampling import sampling
from elastic_jax.stopping import at_stop, is_token, several, stops

HAND_OVERS = ("reprefill", "transplant")


@dataclasses.dataclass(frozen=True)
class Thought:
    """What was thought and answered, on the host.

    Attributes:
      thoughts: [b, n], 0 behind a row's end.
      thought_lengths: [b], the end-of-thinking tokens included.
      capped: [b], whether the thought was ended for it.
      answers: [b, a], 0 behind a row's end.
      answer_lengths: [b], what stopped it included.
      stopped: [b], whether a stop token or string ended the answer, not its limit.
      rounds: calls of the models per row [b] in "think" and in "answer".
      seconds: of reading the prompts ("read"), "think", "hand_over" and "answer".
    """

    thoughts: Int[np.ndarray, "b n"]
    thought_lengths: Int[np.ndarray, " b"]
    capped: Bool[np.ndarray, " b"]
    answers: Int[np.ndarray, "b a"]
    answer_lengths: Int[np.ndarray, " b"]
    stopped: Bool[np.ndarray, " b"]
    rounds: Mapping[str, Int[np.ndarray, " b"]]
    seconds: Mapping[str, float]


def think_and_answer(
    params: Any,
    prompts: Int[np.ndarray, "b t"],
    cfg: ModelConfig,
    *,
    think: Counts | None = None,
    answer: Counts | None = None,
    end_of_thinking: Sequence[int],
    thinking_cap: Any,
    max_answer: Any,
    stop_tokens: int | Sequence[int] | None = (),
    stop_strings: Sequence[str | bytes] = (),
    pieces: Sequence[bytes] | None = None,
    grace: int = 0,
    newline: int | Sequence[int] | None = None,
    lengths: Int[np.ndarray, " b"] | None = None,
    hand_over: str = "reprefill",
    draft: Counts | None = None,
    draft_tokens: int = 4,
    exact: bool = False,
    listener: Callable | None = None,
    rehearse: bool = False,
    **options: Any,
) -> Thought:
    """Lets one submodel think about every prompt, and another answer it.

    Both are cut from `params` inside the compiled calls, which are those of
    `generate`: a submodel is compiled once, whoever it works with.

    Args:
      prompts, lengths: as of `generate`; a prompt ends where the thought begins.
      think, answer: counts of the two submodels; None is the whole model.
      end_of_thinking: written where a thought is ended; its last token is the one that
        ends a thought by itself.
      thinking_cap: tokens of a thought after which it is ended, one or one per row.
      grace: tokens after the cap in which it may still reach a newline.
      newline: the token, or tokens, that end a line; None ends the thought at the cap.
      max_answer: tokens of an answer, one number or one per row.
      stop_tokens, stop_strings, pieces: what ends an answer; as of `generate`.
      hand_over: "reprefill" or "transplant".
      draft, draft_tokens, exact, rehearse: as of `generate`; drafts serve both phases.
      listener: as of `generate`, with the phase, "think" or "answer", before the rest.
      options: of `sampling`.

    Raises:
      ValueError: with everything that does not fit; a transplant between submodels
        that keep different blocks.
    """
    prompts, lengths = ragged(prompts, lengths)
    rows = len(prompts) if prompts.ndim else 0
    problems = [*problems_of_prompts(prompts, lengths, cfg)]
    problems += problems_of_limits("thinking_cap", thinking_cap, rows)
    problems += problems_of_limits("max_answer", max_answer, rows)
    problems += _misfits(cfg, end_of_thinking, newline, grace)
    problems += _impossible(cfg, think, answer, hand_over)
    problems += problems_of_drafts(draft, draft_tokens, exact)
    problems += problems_of_exactness(exact, rows)
    ending = attempt(problems, stops, cfg.vocab, stop_tokens, stop_strings, pieces)
    how = attempt(problems, sampling, max(rows, 1), **options)
    if problems:
        raise ValueError("cannot think and answer:\n  " + "\n  ".join(problems))
    caps, newlines = np.broadcast_to(thinking_cap, (rows,)), several(newline)
    most_thought = caps + grace + len(end_of_thinking)
    most_answer = np.broadcast_to(max_answer, (rows,))
    longest = np.max(lengths + most_thought + most_answer)
    batch = Batch(
        params, how, rows, capacity=length_bucket(longest, exact=exact), exact=exact
    )
    drafter = None if draft is None else Draft(Submodel(cfg, draft), draft_tokens)
    thinker, answerer = (Submodel(cfg, counts, exact) for counts in (think, answer))
    clock = _Clock()

    if rehearse:
        lengths = np.ones_like(lengths)
    text = batch.read(prompts, lengths, thinker, drafter)
    clock("read")
    thought, text = batch.write(
        text,
        thinker,
        0 * most_thought if rehearse else most_thought,
        rule=_at_end_of_thought,
        data=_Thinking(
            batch.filled(caps),
            np.int32(grace),
            np.pad(
                np.asarray(newlines, np.int32),
                (0, bucket(len(newlines)) - len(newlines)),
                constant_values=-1,
            ),
            np.bool_(not newlines),
            np.asarray(end_of_thinking, np.int32),
        ),
        state=(np.int32(0), False, np.int32(-2)),  # -2 is no token
        drawn=0,
        listener=listener and functools.partial(listener, "think"),
        draft=drafter,
    )
    thoughts = trimmed(thought, rows, int(most_thought.max()))
    clock("think")
    if hand_over == "transplant":
        cache = _moved(text.cache, submodel=answerer, capacity=batch.capacity)
        text = jax.block_until_ready(text._replace(cache=cache))
    else:
        text = batch.read(
            *_joined(prompts, lengths, thoughts["tokens"], thoughts["lengths"]),
            answerer,
            drafter,
        )
    clock("hand_over")
    # A row that was ended from outside has no thought to answer from.
    limits = np.where(np.asarray(thought.ended)[:rows], most_answer, 0)
    written, _ = batch.write(
        text,
        answerer,
        limits,
        rule=at_stop,
        data=ending,
        state=np.int32(0),
        drawn=thoughts["lengths"],
        listener=listener and functools.partial(listener, "answer"),
        draft=drafter,
    )
    answers = trimmed(written, rows, int(most_answer.max()))
    clock("answer")
    return Thought(
        thoughts["tokens"],
        thoughts["lengths"],
        np.asarray(thought.state[1])[:rows],
        answers["tokens"],
        answers["lengths"],
        np.asarray(written.ended)[:rows],
        {
            phase: np.asarray(each.rounds)[:rows]
            for phase, each in (("think", thought), ("answer", written))
        },
        clock.seconds,
    )


class _Clock:
    """Names the seconds since it was last asked."""

    def __init__(self):
        self.seconds, self._last = {}, time.perf_counter()

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase], self._last = now - self._last, now


@functools.partial(jax.jit, static_argnames=("submodel", "capacity"))
def _moved(cache, *, submodel: Submodel, capacity: int):
    """The cache of one submodel, cut or extended to be that of another."""
    like = functools.partial(
        init_cache, submodel.cut_cfg, len(cache["filled"]), capacity
    )
    return nesting.resized(cache, jax.eval_shape(like))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Thinking:
    """What ends the thoughts.

    Attributes:
      caps: [b].
      grace: tokens beyond the caps.
      newlines: tokens that end a line, filled up with -1.
      anywhere: whether a thought may be ended within a line.
      end: tokens to write there.
    """

    caps: Any
    grace: Any
    newlines: Any
    anywhere: Any
    end: Any


def _at_end_of_thought(data: _Thinking, n, token, state):
    """The rule of a thought.

    The state: which end-of-thinking token is next; whether the thought was ended for
    it; the last token.
    """
    forced, capped, before = state
    after_newline = jnp.any(before[:, None] == data.newlines, axis=-1)
    at_line_end = data.anywhere | after_newline
    last = len(data.end) - 1
    capped = capped | ((n >= data.caps) & (at_line_end | (n >= data.caps + data.grace)))
    token = jnp.where(capped, data.end[forced], token)
    ends = jnp.where(capped, forced == last, token == data.end[last])
    forced = jnp.minimum(forced + capped, last)
    return token, (forced, capped, token), ends


def _joined(prompts, lengths, thoughts, counts) -> tuple[np.ndarray, np.ndarray]:
    """Each row's prompt and thought without a gap, padded at the right; its length."""
    whole = np.concatenate([prompts, thoughts], axis=1).astype(np.int32)
    for row, start, n in zip(whole, lengths, counts, strict=True):
        thought = row[prompts.shape[1] :][:n].copy()
        row[start:] = 0
        row[start : start + n] = thought
    return whole, lengths + counts


def _misfits(cfg, end, newline, grace):
    if type(grace) is not int or grace < 0:
        yield f"grace: expected an int from 0 on, got {grace!r}"
    if not len(end):
        yield "end_of_thinking: expected at least one token"
    named = [("newline", token) for token in several(newline)]
    for name, token in [*named, *(("end_of_thinking", t) for t in end)]:
        if not is_token(token, cfg.vocab):
            yield f"{name}: expected a token in 0..{cfg.vocab - 1}, got {token!r}"


def _impossible(cfg, think, answer, hand_over):
    named = {"think": think, "answer": answer}
    wrong = [p for name, c in named.items() for p in problems_of_counts(name, c)]
    yield from wrong
    if hand_over not in HAND_OVERS:
        yield f"hand_over: expected one of {HAND_OVERS}, got {hand_over!r}"
    if wrong or hand_over != "transplant":
        return
    kept = [nesting.resolved(cfg, counts or {})["layers"] for counts in named.values()]
    if kept[0] != kept[1]:
        yield (
            "transplant: the two submodels keep different blocks, whose states do not "
            "correspond; use hand_over='reprefill'"
        )
