"""Causal attention as loops over tiles of queries and keys, none bigger than a cache.

    b batch   t time   s key time   k kv_heads   q q_per_kv   h head_dim
    n blocks of i query tokens   m blocks of j key tokens   r rows of a block = i q

Queries come in blocks; for each, an inner loop walks only over the key blocks it can
see, carrying the running maximum and sum of the softmax (arXiv:2205.14135). The bound
of that loop is a number, not a mask: half of a square is never computed, and neither
is the unused end of a cache. One loop body is compiled whatever the length, where one
unrolled block after the other compiles for seconds and runs slower.

The VJP recomputes each tile's weights from the log-sum-exp of its rows, so nothing
quadratic in time is ever kept. Query heads are rows beside the tokens of their block:
keys and values are shared by the product itself.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# A tile has at most BLOCK**2 pairs of tokens: square for a sequence, and for a single
# new token a long strip of the cache, so that decoding is not a loop of tiny steps.
BLOCK = 64

# Finite, so that a row without any visible key subtracts no infinities: its maximum
# stays at FLOOR, its weights are exp(HIDDEN - FLOOR) = 0, and its output is zero.
HIDDEN = -1e30
FLOOR = -5e29


def causal_attention(
    q: Float[Array, "b t k q h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    segment_ids: Int[Array, "b t"] | None = None,
    offset: Int[Array, " b"] | None = None,
) -> Float[Array, "b t k q h"]:
    return _attend(q, k.astype(q.dtype), v.astype(q.dtype), segment_ids, offset)


@jax.custom_vjp
def _attend(q, k, v, segment_ids, offset):
    return _forward(q, k, v, segment_ids, offset)[0]


def _forward(q, k, v, segment_ids, offset):
    i_size, j_size = _tile(q.shape[1], k.shape[1])
    rows, keys, values = _row_blocks(q, i_size), _blocks(k, j_size), _blocks(v, j_size)
    visible, seen = _sight(q.shape[1], k.shape[1], segment_ids, offset)
    scale = q.shape[-1] ** -0.5

    def query_block(_, block):
        i, q_i = block

        def tile(j, carry):
            y, top, total = carry
            scores = _dot("bkrh,bkjh->bkrj", q_i, keys[j]) * scale
            scores = _hide(scores, visible(i, j))
            higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            weights = jnp.exp(scores - higher)
            shrink = jnp.exp(top - higher)
            total = shrink * total + jnp.sum(weights, axis=-1, keepdims=True)
            add = _dot("bkrj,bkjh->bkrh", weights.astype(q.dtype), values[j])
            return shrink * y + add, higher, total

        top = jnp.full((*q_i.shape[:-1], 1), FLOOR, _wide(q))
        start = jnp.zeros_like(q_i, _wide(q)), top, jnp.zeros_like(top)
        y, top, total = jax.lax.fori_loop(0, seen(i), tile, start)
        total = jnp.maximum(total, jnp.finfo(total.dtype).tiny)
        # y stays wide: the backward pass subtracts dy . y from numbers close to it.
        return None, (y / total, top + jnp.log(total))

    _, (y, lse) = jax.lax.scan(query_block, None, (jnp.arange(len(rows)), rows))
    saved = q, k, v, segment_ids, offset, y, lse
    return _from_row_blocks(y.astype(q.dtype), q.shape), saved


def _backward(saved, dy):
    q, k, v, segment_ids, offset, y, lse = saved
    i_size, j_size = _tile(q.shape[1], k.shape[1])
    rows, keys, values = _row_blocks(q, i_size), _blocks(k, j_size), _blocks(v, j_size)
    visible, seen = _sight(q.shape[1], k.shape[1], segment_ids, offset)
    scale = q.shape[-1] ** -0.5
    dy = _row_blocks(dy, i_size)
    mean = jnp.sum(dy * y, axis=-1, keepdims=True)

    def query_block(carry, block):
        i, q_i, dy_i, lse_i, mean_i = block

        def tile(j, carry):
            dq, dk, dv = carry
            scores = _dot("bkrh,bkjh->bkrj", q_i, keys[j]) * scale
            weights = jnp.exp(_hide(scores, visible(i, j)) - lse_i)
            dweights = _dot("bkrh,bkjh->bkrj", dy_i, values[j])
            dscores = (scale * weights * (dweights - mean_i)).astype(q.dtype)
            weights = weights.astype(q.dtype)
            dq += _dot("bkrj,bkjh->bkrh", dscores, keys[j])
            dk = dk.at[j].add(_dot("bkrj,bkrh->bkjh", dscores, q_i))
            return dq, dk, dv.at[j].add(_dot("bkrj,bkrh->bkjh", weights, dy_i))

        start = (jnp.zeros_like(q_i, _wide(q)), *carry)
        dq, *carry = jax.lax.fori_loop(0, seen(i), tile, start)
        return tuple(carry), dq.astype(q.dtype)

    zeros = jnp.zeros_like(keys, _wide(q)), jnp.zeros_like(values, _wide(q))
    blocks = jnp.arange(len(rows)), rows, dy, lse, mean
    (dk, dv), dq = jax.lax.scan(query_block, zeros, blocks)
    dq, dk, dv = _from_row_blocks(dq, q.shape), _from_blocks(dk, k), _from_blocks(dv, v)
    return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)


def _tile(t: int, s: int) -> tuple[int, int]:
    """Tokens in a query block and in a key block."""
    i = _even_block(t, BLOCK)
    return i, _even_block(s, BLOCK**2 // i)


def _even_block(length: int, limit: int) -> int:
    """The size of the fewest equal blocks: padding is less than a token per block."""
    return -(-length // -(-length // limit))


def _sight(t: int, s: int, segment_ids, offset):
    """What a query sees: `visible(i, j)` in a tile, `seen(i)` key blocks at most."""
    i_size, j_size = _tile(t, s)
    first = jnp.zeros((1,), jnp.int32) if offset is None else offset
    furthest = 0 if offset is None else jnp.max(offset)
    if segment_ids is not None:
        query_segments = _split(segment_ids, i_size)
        key_segments = _split(segment_ids, j_size)

    def visible(i, j) -> Bool[Array, "#b i j"]:
        position = first[:, None] + i * i_size + jnp.arange(i_size)
        position = jnp.minimum(position, s - 1)  # The last block may end in padding.
        mask = j * j_size + jnp.arange(j_size) <= position[:, :, None]
        if segment_ids is not None:
            mask &= query_segments[i][:, :, None] == key_segments[j][:, None, :]
        return mask

    def seen(i):
        last = furthest + (i + 1) * i_size - 1
        return jnp.minimum(last, s - 1) // j_size + 1

    return visible, seen


def _hide(
    scores: Float[Array, "b k r j"], visible: Bool[Array, "#b i j"]
) -> Float[Array, "b k r j"]:
    *lead, r, j = scores.shape
    i = visible.shape[1]
    by_token = scores.reshape(*lead, i, r // i, j)
    hidden = jnp.where(visible[:, None, :, None], by_token, HIDDEN)
    return hidden.reshape(scores.shape)


def _split(a: Array, size: int) -> Array:
    """[b t ...] -> [n b i ...], padded to whole blocks."""
    b, t, *rest = a.shape
    a = jnp.pad(a, ((0, 0), (0, -t % size), *[(0, 0)] * len(rest)))
    return jnp.moveaxis(a.reshape(b, -1, size, *rest), 1, 0)


def _blocks(a: Float[Array, "b s k h"], size: int) -> Float[Array, "m b k j h"]:
    return jnp.moveaxis(_split(a, size), 3, 2)


def _from_blocks(a: Float[Array, "m b k j h"], like: Array) -> Float[Array, "b s k h"]:
    b, s, *rest = like.shape
    whole = a.transpose(1, 0, 3, 2, 4).reshape(b, -1, *rest)
    return whole[:, :s].astype(like.dtype)


def _row_blocks(a: Float[Array, "b t k q h"], size: int) -> Float[Array, "n b k r h"]:
    a = jnp.moveaxis(_split(a, size), 3, 2)
    return a.reshape(*a.shape[:3], -1, a.shape[-1])


def _from_row_blocks(a: Float[Array, "n b k r h"], shape) -> Float[Array, "b t k q h"]:
    b, t, heads, group, h = shape
    a = a.reshape(len(a), b, heads, -1, group, h).transpose(1, 0, 3, 2, 4, 5)
    return a.reshape(b, -1, heads, group, h)[:, :t]


def _dot(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=_wide(x))


def _wide(x: Array) -> jnp.dtype:
    """Scores, softmax and sums over tiles are in at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)
