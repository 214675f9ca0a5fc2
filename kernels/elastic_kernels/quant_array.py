"""The one place where weights meet activations."""

import jax
import jax.numpy as jnp


def contract(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """Einsum of activations `x` with one weight `w`, in the activations' dtype.

    Layers never ask how a weight is stored: a representation other than an array
    is a new case here and nowhere else.
    """
    return jnp.einsum(equation, x, w.astype(x.dtype))
