"""The two compiled calls of generation: reading a text, and writing behind it.

    b batch   t text length   n new tokens   k drafted tokens   v vocab

What stands between calls is a `Text`: a cache that holds all but the last token, and
that token. A prompt, a thought handed over and a row in the middle of its answer all
look alike, so one loop writes for all of them; what ends a row is its rule.

A submodel is cut from the parent inside the call: all sizes run from one copy of the
weights. Everything that differs between requests is traced; shapes are rounded up to
buckets, and rows of a bucket that nobody asked for write nothing. So a call is compiled
once per submodel, batch bucket and length bucket.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from elastic_jax import exact as exactly
from elastic_jax import model as models
from elastic_jax import nesting
from elastic_jax.axes import Counts
from elastic_jax.config import ModelConfig
from elastic_jax.listeners import Listener, listening, tell
from elastic_jax.sampling import Sampling, draw
from elastic_jax.speculative import propose

# (data, number [b], token [b], state) -> (token, state, ends [b]): may replace each
# row's token, the number-th that it writes, and says which rows end with it.
Rule = Callable[[Any, Array, Array, Any], tuple[Array, Any, Array]]

CHUNK = 512  # tokens of a prompt read at a time
LEAST = 16  # the smallest length bucket


@dataclasses.dataclass(frozen=True)
class Submodel:
    """Who reads and writes; hashable, so static under `jit`.

    Attributes:
      cfg: of the parameters that are given.
      counts: what is cut from them; None is all.
      exact: whether the bits of logits are a function of the text alone; see `exact`.
    """

    cfg: ModelConfig
    counts: Counts | None = None
    exact: bool = False

    @property
    def cut_cfg(self) -> ModelConfig:
        if not self.counts:
            return self.cfg
        return nesting.slice_config(self.cfg, self.counts)

    def of(self, params: Any, masks: Any = None) -> "_Model":
        """The submodel's own parameters, to be traced."""
        if self.counts:
            specs = models.param_specs(self.cfg)
            params = nesting.slice_params(params, specs, self.counts)
        return _Model(params, self.cut_cfg, masks, self.exact)


class _Model(NamedTuple):
    params: Any
    cfg: ModelConfig
    masks: Any
    exact: bool

    def extend(self, tokens, cache, lengths, *, tentative: bool):
        given, options = (self.params, tokens, cache, self.cfg), {"lengths": lengths}
        if not self.exact:
            options |= {"masks": self.masks, "tentative": tentative}
            return models.extend(*given, **options)
        logits, cache = exactly.extend(*given, masks=self.masks, **options)
        return logits, cache if tentative else self.settle(cache, lengths)

    def settle(self, cache, lengths):
        door = exactly if self.exact else models
        return door.settle(self.params, cache, self.cfg, lengths=lengths)


class Text(NamedTuple):
    """Rows of text as a submodel holds them.

    Attributes:
      cache: has read all but the last token.
      last: the last token of each row.
      drafter: the drafting submodel's cache, likewise; None without one.
    """

    cache: Any
    last: Int[Array, " b"]
    drafter: Any = None


class Written(NamedTuple):
    """What a call has written.

    Attributes:
      tokens: [b, n], 0 behind a row's end.
      lengths: [b], tokens written per row.
      ended: [b], whether the rule ended the row, and not its limit.
      state: of the rule.
      rounds: [b], calls of the model that the row took part in.
      logits: [b, n, v] that the tokens were drawn from; None if they were not kept.
    """

    tokens: Int[Array, "b n"]
    lengths: Int[Array, " b"]
    ended: Bool[Array, " b"]
    state: Any
    rounds: Int[Array, " b"]
    logits: Float[Array, "b n v"] | None = None


# ------------------------------------------------------------------------- buckets


def bucket(n: int, least: int = 1) -> int:
    """The power of two that `n` is rounded up to."""
    return max(least, 1 << max(0, int(n) - 1).bit_length())


def batch_bucket(rows: int, *, exact: bool = False) -> int:
    """Rows that a call of `rows` rows is compiled for."""
    return bucket(rows, exactly.ROWS if exact else 1)


def length_bucket(tokens: int, *, exact: bool = False) -> int:
    """Tokens that a cache for `tokens` tokens holds."""
    return bucket(tokens, exactly.CAPACITY if exact else LEAST)


# ------------------------------------------------------------------------- reading


def read(
    params: Any,
    tokens: np.ndarray,
    lengths: np.ndarray,
    *,
    submodel: Submodel,
    capacity: int,
    masks: Any = None,
) -> Text:
    """The text of ragged rows [b, t], all but the last token of each in the cache.

    Args:
      lengths: at least 1 per row.
      capacity: tokens that the cache shall hold; a bucket.
    """
    chunk = exactly.TOKENS if submodel.exact else min(CHUNK, bucket(tokens.shape[1]))
    chunk = min(max(chunk, LEAST), capacity)
    width = chunk * bucket(-(-tokens.shape[1] // chunk))
    padded = np.zeros((len(tokens), width), np.int32)
    padded[:, : tokens.shape[1]] = tokens
    last = padded[np.arange(len(tokens)), lengths - 1]
    cache = _read(
        params,
        padded,
        np.asarray(lengths - 1, np.int32),
        masks,
        submodel=submodel,
        capacity=capacity,
        chunk=chunk,
    )
    return Text(cache, jnp.asarray(last))


@functools.partial(jax.jit, static_argnames=("submodel", "capacity", "chunk"))
def _read(params, tokens, lengths, masks, *, submodel, capacity, chunk):
    model = submodel.of(params, masks)
    cache = models.init_cache(model.cfg, len(tokens), capacity, dtype=_dtype(params))

    def body(i, cache):
        start = i * chunk
        here = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        valid = jnp.clip(lengths - start, 0, chunk)
        # Logits are not asked for, and so never computed.
        return model.extend(here, cache, valid, tentative=False)[1]

    return jax.lax.fori_loop(0, -(-jnp.max(lengths) // chunk), body, cache)


def _dtype(params) -> jnp.dtype:
    """Of activations, and of what the cache holds of them."""
    return params["embedding"].dtype


# ------------------------------------------------------------------------- writing


@dataclasses.dataclass(frozen=True)
class Draft:
    """Who drafts, and how many tokens at a time; static under `jit`."""

    submodel: Submodel
    tokens: int


class Asked(NamedTuple):
    """What rows ask for; all of it is traced.

    Attributes:
      how: the ways of sampling.
      limits: tokens that each row may write; 0 leaves a row alone.
      drawn: how many tokens each row has drawn before.
      data, state: of the rule; the state has one entry per row.
    """

    how: Sampling
    limits: Int[Array, " b"]
    drawn: Int[Array, " b"]
    data: Any
    state: Any


def write(
    params: Any,
    text: Text,
    asked: Asked,
    *,
    submodel: Submodel,
    capacity: int,
    rule: Rule,
    draft: Draft | None = None,
    masks: Any = None,
    listener: Listener | None = None,
    keep_logits: bool = False,
) -> tuple[Written, Text]:
    """Writes behind every row until its rule or its limit ends it; waits for it.

    Args:
      text: given away: its arrays must not be used again.
      capacity: of the cache.
      rule: a function of a module; what differs between requests is in its data.
      listener: is told after every round what each row wrote in it.
    """
    with listening(listener) as number:
        return jax.block_until_ready(
            _write(
                params,
                text,
                asked,
                masks,
                number,
                submodel=submodel,
                capacity=capacity,
                rule=rule,
                draft=draft,
                heard=listener is not None,
                keep_logits=keep_logits,
            )
        )


_STATIC = ("submodel", "capacity", "rule", "draft", "heard", "keep_logits")


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="text")
def _write(
    params,
    text,
    asked,
    masks,
    listener,
    *,
    submodel,
    capacity,
    rule,
    draft,
    heard,
    keep_logits,
):
    how, limits, drawn, data, state = asked
    model, rows = submodel.of(params, masks), jnp.arange(len(limits))
    k = draft.tokens if draft else 0
    drafter = draft.submodel.of(params) if draft else None
    none = jnp.zeros_like(limits)
    logits = None
    if keep_logits:
        kind = jnp.promote_types(_dtype(params), jnp.float32)
        logits = jnp.zeros((len(limits), capacity, submodel.cfg.vocab), kind)
    written = Written(
        tokens=jnp.zeros((len(limits), capacity), jnp.int32),
        lengths=none,
        ended=none > 0,
        state=state,
        rounds=none,
        logits=logits,
    )

    def round_(carry):
        text, written, done = carry
        before = written.lengths
        lengths = jnp.where(done, 0, jnp.minimum(k + 1, limits - before))
        chunk, cache = text.last[:, None], text.drafter
        if draft:
            drafts, cache = propose(
                drafter, cache, text.last, lengths, how, drawn + before, k
            )
            chunk = jnp.concatenate([chunk, drafts], axis=1)
        logits, held = model.extend(chunk, text.cache, lengths, tentative=k > 0)
        tokens = _drawn(logits, how, drawn + before)
        last, alive = text.last, ~done
        for j in range(k + 1):
            alive = alive & (j < lengths)
            token, state, ends = rule(
                data, written.lengths, tokens[:, j], written.state
            )
            at = jnp.where(alive, written.lengths, capacity)
            kept = written.logits
            if keep_logits:
                kept = kept.at[rows, at].set(logits[:, j], mode="drop")
            written = Written(
                written.tokens.at[rows, at].set(token, mode="drop"),
                written.lengths + alive,
                written.ended | (alive & ends),
                jax.tree.map(functools.partial(_where, alive), state, written.state),
                written.rounds + (alive if j == 0 else 0),
                kept,
            )
            last = jnp.where(alive, token, last)
            alive = alive & ~ends
            if j < k:
                # The next logits are behind a draft: they count where it was right.
                alive = alive & (token == chunk[:, j + 1])
        new = written.lengths - before
        if k:
            held, cache = model.settle(held, new), drafter.settle(cache, new)
        done = done | written.ended | (written.lengths >= limits)
        if heard:
            news = _since(written.tokens, before, k + 1)
            done = done | tell(listener, news, new)
        return Text(held, last, cache), written, done

    start = text, written, limits < 1
    text, written, _ = jax.lax.while_loop(
        lambda carry: ~jnp.all(carry[2]), round_, start
    )
    return written, text


def _drawn(logits: Float[Array, "b c v"], how: Sampling, number) -> Int[Array, "b c"]:
    """The token that each position draws, with the random numbers of its place."""
    (rows, time, vocab), each = logits.shape, jnp.arange(logits.shape[1])
    how = jax.tree.map(lambda a: jnp.repeat(a, time), how)
    numbers = (number[:, None] + each).reshape(-1)
    return draw(logits.reshape(-1, vocab), how, numbers).reshape(rows, time)


def _where(alive: Bool[Array, " b"], new: Array, old: Array) -> Array:
    return jnp.where(alive.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _since(tokens: Int[Array, "b n"], start: Int[Array, " b"], count: int):
    """`count` tokens of every row from `start` on; 0 past the end."""
    at = start[:, None] + jnp.arange(count)
    return tokens.at[jnp.arange(len(tokens))[:, None], at].get(
        mode="fill", fill_value=0
    )
