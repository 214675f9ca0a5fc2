"""The selective state space recurrence, one token at a time: the specification.

    b batch   t time   g ssm_groups   r heads_per_group   p ssm_head_dim   n ssm_state

Nothing here is fast. It is the shortest honest statement of what the operation
means, and every other implementation is tested against it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def ssd(
    x: Float[Array, "b t g r p"],
    dt: Float[Array, "b t g r"],
    A: Float[Array, "g r"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, "g r"],
    *,
    initial_state: Float[Array, "b g r p n"] | None = None,
    resets: Bool[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t g r p"], Float[Array, "b g r p n"]]:
    """Scans tokens; arguments and results as in `elastic_kernels.ssd`."""
    b, t, g, r, p = x.shape
    n = B.shape[-1]
    dtype = jnp.promote_types(x.dtype, jnp.float32)  # the state decays: never less
    if initial_state is None:
        initial_state = jnp.zeros((b, g, r, p, n))
    if resets is None:
        resets = jnp.zeros((b, t), bool)

    def token(state, inputs):
        x, dt, B, C, reset = inputs
        state = jnp.where(reset[:, None, None, None, None], 0, state)
        decay = jnp.exp(dt * A)
        state = decay[..., None, None] * state + jnp.einsum(
            "bgrp,bgn->bgrpn", dt[..., None] * x, B
        )
        y = jnp.einsum("bgrpn,bgn->bgrp", state, C) + D[..., None] * x
        return state, y

    A, D, state = (a.astype(dtype) for a in (A, D, initial_state))
    tokens = [jnp.moveaxis(a.astype(dtype), 1, 0) for a in (x, dt, B, C)]
    state, y = jax.lax.scan(token, state, (*tokens, jnp.moveaxis(resets, 1, 0)))
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), state
