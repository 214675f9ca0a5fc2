"""RMSNorm over the live channels of a slice.

    b batch   t time   d channels

A masked vector has zeros where a sliced one has nothing: the sum of squares is the
same, so dividing by the number of *live* channels gives both the same norm.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "b t *d"],
    scale: Float[Array, "*last"],
    *,
    live: Array | float | int,
    eps: float,
    dims: int = 1,
) -> Float[Array, "b t *d"]:
    """Normalises the last `dims` dimensions of `x` and multiplies by `scale`.

    Args:
      scale: shaped like the last dimensions of `x`.
      live: number of channels that count, a number or an array of shape [] or [b, t].
      eps: added to the mean square.
      dims: how many trailing dimensions share one statistic.
    """
    # Squares and the product with the scale in at least float32, then cast back.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = x.astype(wide)
    total = jnp.sum(y * y, axis=tuple(range(-dims, 0)), keepdims=True)
    count = jnp.asarray(live, wide)
    count = count.reshape(count.shape + (1,) * (total.ndim - count.ndim))
    y = y * jax.lax.rsqrt(total / count + eps)
    return (y * scale.astype(wide)).astype(x.dtype)
