"""Grouped-query causal attention, over the tokens given or over a cache.

    b batch   t time   s key time   k kv_heads   q q_per_kv   h head_dim

The query heads of one key-value head are a dimension of their own, so keys and values
are never repeated, and a prefix of every group is again a call of the same shape.
"""

import jax
from jaxtyping import Array, Float, Int

from elastic_kernels.attention import reference, xla
from elastic_kernels.dispatch import select


def causal_attention(
    q: Float[Array, "b t k q h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    offset: Int[Array, " b"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "b t k q h"]:
    """Averages the values a query may see, weighted by `softmax(q . k / sqrt(h))`.

    Without `offset` the keys are those of the same tokens: query i sees keys j <= i,
    with `segment_ids` only those of its own segment. With `offset` they are a cache of
    capacity s: query i of row b sees keys j <= offset[b] + i. A query that sees
    nothing gets zeros. Nothing is dense in time squared without `offset`.

    Args:
      q, k, v: queries, keys and values.
      segment_ids: which packed document each token belongs to; any integers.
      offset: how many tokens of each row the cache held before these queries.
      implementation: see `elastic_kernels.dispatch.select`.

    Returns:
      One vector per query, in the dtype of `q`; scores, softmax and sums are in at
      least float32. Differentiable in `q`, `k` and `v`.

    Raises:
      ValueError: shapes do not fit, or both `segment_ids` and `offset` are given.
    """
    (b, t, heads, _, h), s = q.shape, k.shape[1]
    if offset is None and s != t:
        raise ValueError(
            f"causal_attention: {t} queries and {s} keys without offset; pass offset "
            "to attend to a cache, or as many keys as queries"
        )
    if offset is not None and segment_ids is not None:
        raise ValueError(
            "causal_attention: got both segment_ids and offset, expected at most one; "
            "a cache holds one document per row"
        )
    _check_shape("k", k, (b, s, heads, h))
    _check_shape("v", v, (b, s, heads, h))
    if segment_ids is not None:
        _check_shape("segment_ids", segment_ids, (b, t))
    if offset is not None:
        _check_shape("offset", offset, (b,))
    available = {
        "reference": reference.causal_attention,
        "xla": xla.causal_attention,
    }
    chosen = select("causal_attention", implementation, available)
    return chosen(q, k, v, segment_ids, offset)


def _check_shape(name: str, a: jax.Array, expected: tuple[int, ...]) -> None:
    if a.shape != expected:
        raise ValueError(
            f"causal_attention: {name} has shape {a.shape}, expected {expected}; "
            "make it fit the other arguments"
        )
