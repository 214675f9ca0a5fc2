"""The specification of grouped products: every expert sees every row, most for nothing.

m tokens   c choices (top_k)   e experts   d embed   f expert_ffn
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from elastic_kernels.products import FakeQuant, met
from elastic_kernels.quant_array import QuantArray


def grouped_matmul(
    x: Float[Array, "m c d"],
    w: Float[Array | QuantArray | FakeQuant, "e d f"],
    experts: Int[Array, "m c"],
) -> Float[Array, "m c f"]:
    def add(y, expert):
        index, w_e = expert
        mine = (experts == index)[..., None]
        return y + jnp.where(mine, met(x, w_e) @ w_e.astype(x.dtype), 0), None

    zeros = jnp.zeros((*experts.shape, w.shape[-1]), x.dtype)
    y, _ = jax.lax.scan(add, zeros, (jnp.arange(len(w)), w))
    return y


def expert_mlp(
    x: Float[Array, "m d"],
    up: Float[Array | QuantArray | FakeQuant, "e d f"],
    down: Float[Array | QuantArray | FakeQuant, "e f d"],
    experts: Int[Array, "m c"],
    gates: Float[Array, "m c"],
    hidden_mask: Float[Array, "*m f"] | None = None,
) -> Float[Array, "m d"]:
    mask = 1 if hidden_mask is None else hidden_mask.astype(x.dtype)

    def add(y, expert):
        index, up_e, down_e = expert
        gate = jnp.sum(jnp.where(experts == index, gates, 0), axis=-1, keepdims=True)
        hidden = jax.nn.relu(met(x, up_e) @ up_e.astype(x.dtype)) ** 2 * mask
        out = met(hidden, down_e) @ down_e.astype(x.dtype)
        return y + gate.astype(x.dtype) * out, None

    y, _ = jax.lax.scan(add, jnp.zeros_like(x), (jnp.arange(len(up)), up, down))
    return y
