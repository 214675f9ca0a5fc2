"""The specification of causal attention: one masked softmax over all keys.

    b batch   t time   s key time   k kv_heads   q q_per_kv   h head_dim
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_attention(
    q: Float[Array, "b t k q h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    segment_ids: Int[Array, "b t"] | None = None,
    offset: Int[Array, " b"] | None = None,
) -> Float[Array, "b t k q h"]:
    (b, t, _, _, h), s = q.shape, k.shape[1]
    held = jnp.zeros(b, jnp.int32) if offset is None else offset
    visible = jnp.arange(s) <= held[:, None, None] + jnp.arange(t)[:, None]
    if segment_ids is not None:
        visible &= segment_ids[:, :, None] == segment_ids[:, None, :]

    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btkqh,bskh->bkqts", q, k, preferred_element_type=wide)
    weights = jax.nn.softmax(scores * h**-0.5, where=visible[:, None, None])
    return jnp.einsum("bkqts,bskh->btkqh", weights.astype(q.dtype), v).astype(q.dtype)
