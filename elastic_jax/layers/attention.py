"""Grouped-query attention, elastic in query heads per key-value head.

    b batch   t time   s cache length   d embed   k kv_heads   g q_per_kv   h head_dim

The elastic unit is one query head inside its key-value group. Units are ranked
within the group whose keys they share, so a prefix of every group is again a
regular grouped-query attention: slicing needs no index arithmetic. There is no
positional encoding: the Mamba blocks order the tokens.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from elastic_jax.axes import CacheSpec, ParamSpec
from elastic_jax.masks import LayerMasks, elastic
from elastic_kernels import causal_attention, contract

SPECS = {
    "q": ParamSpec("embed -> kv_heads q_per_kv head_dim"),
    "k": ParamSpec("embed -> kv_heads head_dim"),
    "v": ParamSpec("embed -> kv_heads head_dim"),
    "o": ParamSpec("kv_heads q_per_kv head_dim -> embed"),
}

CACHE = {
    "k": CacheSpec("batch length kv_heads head_dim"),
    "v": CacheSpec("batch length kv_heads head_dim"),
}


def attention(
    params,
    x: Float[Array, "b t d"],
    masks: LayerMasks,
    *,
    segment_ids=None,
    lengths=None,
    cache=None,
    tap=None,
):
    """Mixes tokens causally; returns the update, unmasked on embed, and the cache.

    With a cache, `cache["filled"]` [b] says how many tokens each row already holds.
    """
    q = contract("btd,dkgh->btkgh", x, params["q"])
    k = contract("btd,dkh->btkh", x, params["k"])
    v = contract("btd,dkh->btkh", x, params["v"])

    offset = None
    if cache is not None:
        offset = cache["filled"]
        k = _append(cache["k"], k, offset, lengths)
        v = _append(cache["v"], v, offset, lengths)
        cache = {"k": k, "v": v}
    y = causal_attention(q, k, v, segment_ids=segment_ids, offset=offset)
    y = elastic(y, masks, "q_per_kv", dim=-2, tap=tap)

    return contract("btkgh,kghd->btd", y, params["o"]), cache


def _append(
    stored: Float[Array, "b s k h"], new: Float[Array, "b t k h"], filled, lengths
) -> Float[Array, "b s k h"]:
    """Writes the valid tokens of each row behind those it already holds."""
    steps = jnp.arange(new.shape[1])
    at = filled[:, None] + steps
    if lengths is not None:
        at = jnp.where(steps < lengths[:, None], at, stored.shape[1])
    rows = jnp.arange(new.shape[0])[:, None]
    # Out of range means "not a token": dropped by design, not clamped.
    return stored.at[rows, at].set(new.astype(stored.dtype), mode="drop")
