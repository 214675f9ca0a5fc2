"""Cached decoding: prompts in, tokens out, the whole loop in one jitted call.

    b batch   t prompt length   n new tokens   v vocab

`decode` is the loop that every way of generating runs; what ends a row is its rule.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from elastic_jax.config import ModelConfig
from elastic_jax.masks import BudgetMasks
from elastic_jax.model import extend, init_cache
from elastic_jax.sampling import Sampling, draw, sampling

Rule = Callable[[Array, Array, Any], tuple[Array, Any, Array]]


class Generation(NamedTuple):
    """What was generated.

    Attributes:
      tokens: [b, n]; after a row's stop token, the stop token again.
      lengths: [b], tokens generated per row, the stop token included.
    """

    tokens: Int[Array, "b n"]
    lengths: Int[Array, " b"]


def generate(
    params: Any,
    prompts: Int[Array, "b t"],
    cfg: ModelConfig,
    *,
    max_new_tokens: int,
    lengths: Int[Array, " b"] | None = None,
    stop_token: int | None = None,
    masks: BudgetMasks | None = None,
    **options: Any,
) -> Generation:
    """Continues every prompt until its stop token or `max_new_tokens`.

    Args:
      prompts: token ids; a ragged batch is padded at the right and says so by
        `lengths`.
      lengths: valid tokens per prompt, at least 1.
      stop_token: ends a row; None runs every row to `max_new_tokens`.
      options: of `sampling`: `temperature`, `top_k`, `top_p` and `seeds`, each one
        value or one per row. Without, every row is greedy. What a row draws depends
        on its own prompt and seed, not on the rows beside it.

    Compiles once per (cfg, shape of `prompts`, `max_new_tokens`).

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, lengths that do
        not fit the prompts, options out of range, or nothing to generate.
    """
    prompts, lengths = ragged(prompts, lengths)
    problems = [*_problems(cfg, max_new_tokens, stop_token)]
    problems += problems_of_prompts(prompts, lengths, cfg)
    if any(leaf.ndim > 1 for leaf in jax.tree.leaves(masks)):
        problems.append("masks change along time: give one mask per axis and layer")
    if problems:
        raise ValueError("cannot generate:\n  " + "\n  ".join(problems))
    return _decode(
        params,
        jnp.asarray(prompts, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        masks,
        sampling(len(prompts), **options),
        cfg,
        max_new_tokens,
        -1 if stop_token is None else stop_token,
    )


@functools.partial(jax.jit, static_argnums=(5, 6))
def _decode(params, prompts, lengths, masks, how, cfg, max_new_tokens, stop_token):
    rows, time = prompts.shape
    cache = init_cache(
        cfg, rows, time + max_new_tokens, dtype=params["embedding"].dtype
    )
    last, cache = read(params, prompts, lengths, cache, cfg, masks=masks)
    tokens, counts, _, _ = decode(
        params,
        last,
        cache,
        cfg,
        how=how,
        rule=until(stop_token),
        limit=max_new_tokens,
        masks=masks,
    )
    written = jnp.arange(max_new_tokens) < counts[:, None]
    return Generation(jnp.where(written, tokens, stop_token), counts)


def ragged(prompts, lengths) -> tuple[np.ndarray, np.ndarray]:
    """Prompts and lengths on the host, unchecked; without lengths all are full."""
    prompts = np.asarray(prompts)
    if lengths is None:
        lengths = np.full(prompts.shape[:1], prompts.shape[-1])
    return prompts, np.asarray(lengths)


def until(stop_token) -> Rule:
    """The rule of rows that end with a token."""
    return lambda n, token, state: (token, state, token == stop_token)


def read(params, tokens, lengths, cache, cfg: ModelConfig, *, masks=None):
    """Extends the cache by ragged rows; logits behind each row's last token [b, v]."""
    logits, cache = extend(params, tokens, cache, cfg, lengths=lengths, masks=masks)
    last = jnp.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)[:, 0]
    return last, cache


def decode(
    params: Any,
    logits: Float[Array, "b v"],
    cache: Any,
    cfg: ModelConfig,
    *,
    how: Sampling,
    rule: Rule,
    limit: int,
    state: Any = None,
    number: Array | int = 0,
    masks: BudgetMasks | None = None,
):
    """The loop, to be traced: draws, asks `rule`, reads; until every row has ended.

    Args:
      logits: what the first tokens are drawn from.
      rule: `(n, token [b], state) -> (token, state, ends [b])` may replace the n-th
        tokens, and says which rows end with them.
      limit: of new tokens per row.
      state: of the rule, a pytree.
      number: how many tokens each row has drawn before, an int or [b].

    Returns:
      tokens [b, limit]; how many of them each row wrote [b]; the cache, which holds
      all of a row but its last token; the rule's state.
    """
    rows = len(logits)

    def unfinished(carry):
        n, _, _, done, _, _, _ = carry
        return (n < limit) & ~jnp.all(done)

    def step(carry):
        n, logits, cache, done, tokens, counts, state = carry
        token, state, ends = rule(n, draw(logits, how, number + n), state)
        tokens = tokens.at[:, n].set(jnp.where(done, 0, token))
        counts = counts + ~done
        done = done | ends
        more = (~done & (n + 1 < limit)).astype(jnp.int32)
        logits, cache = extend(
            params, token[:, None], cache, cfg, lengths=more, masks=masks
        )
        return n + 1, logits[:, 0], cache, done, tokens, counts, state

    nothing = jnp.zeros(rows, jnp.int32)
    tokens = jnp.zeros((rows, limit), jnp.int32)
    start = (0, logits, cache, nothing > 0, tokens, nothing, state)
    _, _, cache, _, tokens, counts, state = jax.lax.while_loop(unfinished, step, start)
    return tokens, counts, cache, state


def _problems(cfg, max_new_tokens, stop_token):
    if not _is_int(max_new_tokens) or max_new_tokens < 1:
        yield f"max_new_tokens must be an int of at least 1, got {max_new_tokens!r}"
    if stop_token is not None and not _is_int(stop_token):
        yield f"stop_token must be an int or None, got {stop_token!r}"
    elif stop_token is not None and not 0 <= stop_token < cfg.vocab:
        yield f"stop_token {stop_token} is outside the vocabulary of {cfg.vocab}"


def problems_of_prompts(prompts, lengths, cfg: ModelConfig) -> Iterator[str]:
    """Every reason why these cannot be prompts."""
    if prompts.ndim != 2 or not np.issubdtype(prompts.dtype, np.integer):
        yield f"prompts must be integers [b, t], got {prompts.dtype} {prompts.shape}"
        return
    rows, time = prompts.shape
    if not rows or not time:
        yield f"prompts are empty: shape {prompts.shape}"
        return
    if lengths.shape != (rows,) or not np.issubdtype(lengths.dtype, np.integer):
        yield (
            f"lengths: expected integers of shape {(rows,)}, got {lengths.dtype} "
            f"{lengths.shape}"
        )
        return
    for row in np.flatnonzero((lengths < 1) | (lengths > time)):
        yield f"row {row}: length {lengths[row]} is not in 1..{time}"
    valid = np.arange(time) < lengths[:, None]
    outside = valid & ((prompts < 0) | (prompts >= cfg.vocab))
    for row in np.flatnonzero(outside.any(axis=1)):
        bad = prompts[row][outside[row]][0]
        yield f"row {row}: token {bad} is outside the vocabulary of {cfg.vocab}"


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
