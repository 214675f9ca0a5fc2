"""Cached decoding: prompts in, tokens out, the whole loop in one jitted call.

    b batch   t prompt length   n new tokens
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from elastic_jax.config import ModelConfig
from elastic_jax.masks import BudgetMasks
from elastic_jax.model import extend, init_cache
from elastic_jax.sampling import draw, sampling


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
    prompts = np.asarray(prompts)
    if lengths is None:
        lengths = np.full(prompts.shape[:1], prompts.shape[-1])
    lengths = np.asarray(lengths)
    problems = list(_problems(prompts, lengths, cfg, max_new_tokens, stop_token))
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
    dtype = params["embedding"].dtype
    cache = init_cache(cfg, rows, time + max_new_tokens, dtype=dtype)
    logits, cache = extend(params, prompts, cache, cfg, lengths=lengths, masks=masks)
    last = jnp.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)[:, 0]
    token = draw(last, how, 0)
    tokens = jnp.full((rows, max_new_tokens), stop_token, jnp.int32)

    def unfinished(carry):
        n, _, _, done, _, _ = carry
        return (n < max_new_tokens) & ~jnp.all(done)

    def step(carry):
        n, token, cache, done, tokens, lengths = carry
        tokens = tokens.at[:, n].set(jnp.where(done, stop_token, token))
        lengths = lengths + ~done
        done = done | (token == stop_token)
        logits, cache = extend(params, token[:, None], cache, cfg, masks=masks)
        token = draw(logits[:, 0], how, n + 1)
        return n + 1, token, cache, done, tokens, lengths

    start = (0, token, cache, jnp.zeros(rows, bool), tokens, jnp.zeros(rows, jnp.int32))
    *_, tokens, lengths = jax.lax.while_loop(unfinished, step, start)
    return Generation(tokens, lengths)


def _problems(prompts, lengths, cfg, max_new_tokens, stop_token):
    if not _is_int(max_new_tokens) or max_new_tokens < 1:
        yield f"max_new_tokens must be an int of at least 1, got {max_new_tokens!r}"
    if stop_token is not None and not _is_int(stop_token):
        yield f"stop_token must be an int or None, got {stop_token!r}"
    elif stop_token is not None and not 0 <= stop_token < cfg.vocab:
        yield f"stop_token {stop_token} is outside the vocabulary of {cfg.vocab}"
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
