"""Reading that gives the same bits however the work is split: tiles of one shape.

    b batch   t time   v vocab

How a product is computed, and with it the last bit of every sum, depends on its shape:
a token that is read alone, in a chunk, or beside other rows comes out differently.
Here every call reads one tile of `ROWS` rows by `TOKENS` tokens, mostly padding where
one token is decoded; the scan goes token by token; and the tile is the body of a loop,
which is compiled alike whatever stands around it. What is padding has no influence on
what is not, so a row's logits are a function of its text alone.

The price is the padding: this is for proofs, comparisons and replays, not for speed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from elastic_jax import model
from elastic_jax.config import ModelConfig

ROWS, TOKENS = 8, 16
# Attention over a cache walks in blocks whose size depends on its capacity; up to the
# multiples of this one, they are all of the same size.
CAPACITY = 256


def extend(
    params,
    tokens: Int[Array, "b t"],
    cache,
    cfg: ModelConfig,
    *,
    lengths: Int[Array, " b"],
    masks=None,
) -> tuple[Float[Array, "b t v"], Any]:
    """Reads at most `TOKENS` tokens tentatively, as `model.extend`; then `settle`.

    Raises:
      ValueError: more tokens, another number of rows than `ROWS`, or a cache whose
        length is no multiple of `CAPACITY`.
    """
    _check(tokens.shape, model.cache_length(cache, cfg))
    time = tokens.shape[1]
    tokens = jnp.pad(tokens, ((0, 0), (0, TOKENS - time)))

    def tile(tokens, lengths, cache):
        return model.extend(
            params,
            tokens,
            cache,
            cfg,
            lengths=lengths,
            masks=masks,
            tentative=True,
            scan="reference",
        )

    logits, cache = _apart(tile, tokens, lengths, cache)
    return logits[:, :time], cache


def settle(params, cache, cfg: ModelConfig, *, lengths: Int[Array, " b"]) -> Any:
    """Keeps the first `lengths` of the tokens that were read, as `model.settle`."""

    def tile(lengths, cache):
        return model.settle(params, cache, cfg, lengths=lengths, scan="reference")

    return _apart(tile, lengths, cache)


def _apart(function, *given):
    """Calls `function` where the compiler cannot mix it with what stands around it."""

    def body(_, carry):
        given, _ = carry
        return given, function(*jax.lax.optimization_barrier(given))

    shapes = jax.eval_shape(function, *given)
    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    # A number that the compiler cannot see: a loop of one turn would be none to it.
    once = jax.lax.optimization_barrier(jnp.int32(1))
    return jax.lax.fori_loop(0, once, body, (given, nothing))[1]


def _check(shape, capacity):
    rows, time = shape
    if rows != ROWS or time > TOKENS:
        raise ValueError(
            f"exact reading: {rows} rows of {time} tokens, expected {ROWS} rows and at "
            f"most {TOKENS} tokens"
        )
    if capacity is not None and capacity % CAPACITY:
        raise ValueError(
            f"exact reading: a cache of length {capacity}, expected a multiple of "
            f"{CAPACITY}"
        )
