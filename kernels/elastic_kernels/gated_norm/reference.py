"""The gated norm in plain JAX: the specification, and the portable form.

b batch   t time   g groups   r heads_per_group   p head_dim
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gated_rms_norm(
    y: Float[Array, "b t g r p"],
    z: Float[Array, "b t g r p"],
    scale: Float[Array, "g r p"],
    *,
    live: Array | float | int,
    eps: float,
    mask: Float[Array, "*bt r p"] | None = None,
) -> Float[Array, "b t g r p"]:
    wide = jnp.promote_types(y.dtype, jnp.float32)
    u = (y.astype(wide) * jax.nn.silu(z.astype(wide))).astype(y.dtype)
    if mask is not None:
        u = u * jnp.expand_dims(mask, -3).astype(y.dtype)
    u = u.astype(wide)
    total = jnp.sum(u * u, axis=(-2, -1), keepdims=True)
    count = jnp.asarray(live, wide)
    count = count.reshape(count.shape + (1,) * (total.ndim - count.ndim))
    u = u * jax.lax.rsqrt(total / count + eps)
    return (u * scale.astype(wide)).astype(y.dtype)
