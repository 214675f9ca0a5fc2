"""Thinking with one submodel, answering with another, from one set of weights.

    b batch   t prompt length   n thought   a answer   v vocab

A thought ends with the end-of-thinking token, or is ended: past its cap, at the next
newline, and past the grace after it in any case, the end-of-thinking tokens are
written for it (Nemotron 3 Nano's budget control, arXiv 2512.20848; two sizes as in Star
Elastic, arXiv 2605.07182). What the answering model is handed is either the text, which
it reads again (`reprefill`), or the thinking model's cache (`transplant`): cut to a
prefix, or extended by zeros, which is what a masked parent would have written.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from elastic_jax import nesting
from elastic_jax.axes import Counts
from elastic_jax.config import ModelConfig
from elastic_jax.generate import decode, problems_of_prompts, ragged, read, until
from elastic_jax.model import init_cache, param_specs
from elastic_jax.sampling import sampling

HAND_OVERS = ("reprefill", "transplant")


class Thought(NamedTuple):
    """What was thought and answered.

    Attributes:
      thoughts: [b, n], 0 behind a row's end.
      thought_lengths: [b], the end-of-thinking tokens included.
      capped: [b], whether the thought was ended for it.
      answers: [b, a], 0 behind a row's end.
      answer_lengths: [b], the stop token included.
    """

    thoughts: Int[Array, "b n"]
    thought_lengths: Int[Array, " b"]
    capped: Bool[Array, " b"]
    answers: Int[Array, "b a"]
    answer_lengths: Int[Array, " b"]


def think_and_answer(
    params: Any,
    prompts: Int[Array, "b t"],
    cfg: ModelConfig,
    *,
    think: Counts | None = None,
    answer: Counts | None = None,
    end_of_thinking: Sequence[int],
    stop_token: int,
    thinking_cap: Any,
    max_answer: int,
    grace: int = 0,
    newline: int | None = None,
    lengths: Int[Array, " b"] | None = None,
    hand_over: str = "reprefill",
    **options: Any,
) -> Thought:
    """Lets one submodel think about every prompt, and another answer it.

    Both are cut from `params` inside the compiled call.

    Args:
      prompts, lengths: as of `generate`; a prompt ends where the thought begins.
      think, answer: counts of the two submodels; None is the whole model.
      end_of_thinking: written where a thought is ended; its last token is the one that
        ends a thought by itself.
      thinking_cap: tokens of a thought after which it is ended, one or one per row.
      grace: tokens after the cap in which it may still reach a newline.
      newline: the token that ends a line; None ends the thought at the cap.
      max_answer, stop_token: the answer's cap, and what ends it.
      hand_over: "reprefill" or "transplant".
      options: of `sampling`.

    Compiles once per pair of counts, shape of `prompts`, largest cap and `max_answer`.

    Raises:
      ValueError: with everything that does not fit; a transplant between submodels
        that keep different blocks.
    """
    (prompts, lengths), caps = ragged(prompts, lengths), np.asarray(thinking_cap)
    rows = len(prompts) if prompts.ndim else 0
    problems = [*problems_of_prompts(prompts, lengths, cfg)]
    problems += _misfits(
        cfg, caps, rows, end_of_thinking, stop_token, newline, grace, max_answer
    )
    whole = nesting.counts(cfg)
    think, answer = think or whole, answer or whole
    problems += _impossible(cfg, think, answer, hand_over)
    if problems:
        raise ValueError("cannot think and answer:\n  " + "\n  ".join(problems))
    end = tuple(int(token) for token in end_of_thinking)
    limit = int(caps.max()) + grace + len(end)
    return _run(
        params,
        jnp.asarray(prompts, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(np.broadcast_to(caps, (rows,)), jnp.int32),
        sampling(rows, **options),
        cfg=cfg,
        think=think,
        answer=answer,
        end=end,
        stop_token=stop_token,
        newline=newline,
        grace=grace,
        limits=(limit, max_answer),
        hand_over=hand_over,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        *("cfg", "think", "answer", "end", "stop_token", "newline", "grace"),
        *("limits", "hand_over"),
    ),
)
def _run(
    params,
    prompts,
    lengths,
    caps,
    how,
    *,
    cfg,
    think,
    answer,
    end,
    stop_token,
    newline,
    grace,
    limits,
    hand_over,
):
    (rows, time), (most_thought, most_answer) = prompts.shape, limits
    capacity = time + most_thought + most_answer
    specs, dtype = param_specs(cfg), params["embedding"].dtype
    thinker, thinker_cfg = (
        nesting.slice_params(params, specs, think),
        nesting.slice_config(cfg, think),
    )
    empty = init_cache(thinker_cfg, rows, capacity, dtype=dtype)
    last, cache = read(thinker, prompts, lengths, empty, thinker_cfg)
    rule, state = _thinking(rows, caps, end, newline, grace)
    thoughts, n, cache, (_, capped, *_) = decode(
        thinker,
        last,
        cache,
        thinker_cfg,
        how=how,
        rule=rule,
        limit=most_thought,
        state=state,
    )

    model = nesting.slice_params(params, specs, answer)
    model_cfg = nesting.slice_config(cfg, answer)
    fresh = init_cache(model_cfg, rows, capacity, dtype=dtype)
    if hand_over == "transplant":
        cache = nesting.resized(cache, fresh)
        final = jnp.take_along_axis(thoughts, n[:, None] - 1, axis=1)
        last, cache = read(model, final, jnp.ones_like(n), cache, model_cfg)
    else:
        text = _joined(prompts, lengths, thoughts, n)
        last, cache = read(model, text, lengths + n, fresh, model_cfg)
    answers, m, _, _ = decode(
        model,
        last,
        cache,
        model_cfg,
        how=how,
        rule=until(stop_token),
        limit=most_answer,
        number=n,
    )
    return Thought(thoughts, n, capped, answers, m)


def _thinking(rows: int, caps, end, newline, grace):
    """The rule of a thought, and its state.

    The state: which end-of-thinking token is next; whether the thought was ended; the
    last token; whether the row is over, for the rule is asked about such rows too.
    """
    forced_tokens = jnp.asarray(end, jnp.int32)

    def rule(n, token, state):
        forced, capped, before, over = state
        at_line_end = newline is None or before == newline
        late = (n >= caps) & (at_line_end | (n >= caps + grace))
        capped = capped | (late & ~over)
        token = jnp.where(capped, forced_tokens[forced], token)
        ends = jnp.where(capped, forced == len(end) - 1, token == end[-1])
        forced = jnp.minimum(forced + capped, len(end) - 1)
        return token, (forced, capped, token, over | ends), ends

    nothing = jnp.zeros(rows, jnp.int32)
    return rule, (nothing, nothing > 0, nothing - 1, nothing > 0)


def _joined(prompts, lengths, thoughts, counts):
    """Each row's prompt and thought without a gap: [b, t + n], padded at the right."""
    whole = jnp.concatenate([prompts, thoughts], axis=1)
    at, time = jnp.arange(whole.shape[1]), prompts.shape[1]
    start = lengths[:, None]
    source = jnp.where(at < start, at, at - start + time)
    valid = at < start + counts[:, None]
    moved = jnp.take_along_axis(whole, jnp.where(valid, source, 0), axis=1)
    return jnp.where(valid, moved, 0)


def _misfits(cfg, caps, rows, end, stop_token, newline, grace, max_answer):
    if caps.shape not in ((), (rows,)) or caps.dtype.kind not in "iu" or caps.min() < 1:
        yield f"thinking_cap: expected ints from 1 on, one or {rows}, got {caps}"
    for name, number, least in (("grace", grace, 0), ("max_answer", max_answer, 1)):
        if type(number) is not int or number < least:
            yield f"{name}: expected an int from {least} on, got {number!r}"
    if not len(end):
        yield "end_of_thinking: expected at least one token"
    named = {"stop_token": stop_token, "newline": newline}
    for name, token in [*named.items(), *(("end_of_thinking", t) for t in end)]:
        inside = isinstance(token, int | np.integer) and 0 <= token < cfg.vocab
        if not inside and not (name == "newline" and token is None):
            yield f"{name}: expected a token in 0..{cfg.vocab - 1}, got {token!r}"


def _impossible(cfg, think, answer, hand_over):
    if hand_over not in HAND_OVERS:
        yield f"hand_over: expected one of {HAND_OVERS}, got {hand_over!r}"
        return
    blocks = [nesting.resolved(cfg, counts)["layers"] for counts in (think, answer)]
    if hand_over == "transplant" and blocks[0] != blocks[1]:
        yield (
            "transplant: the two submodels keep different blocks, whose states do not "
            "correspond; use hand_over='reprefill'"
        )
