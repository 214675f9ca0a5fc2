"""The gated norm on NVIDIA GPUs: read once, written once, heads that are off skipped.

b batch   t time   g groups   r heads_per_group   p head_dim   k one, or time
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from elastic_kernels import dispatch
from elastic_kernels import launch as launching
from elastic_kernels.gated_norm import kernels
from elastic_kernels.launch import alike, batch_parallel

DTYPES = ("float32", "bfloat16", "float16")
LARGEST = 16384  # channels of a group, in the registers of one program
TOKENS = 32


def gated_rms_norm(
    y: Float[Array, "b t g r p"],
    z: Float[Array, "b t g r p"],
    scale: Float[Array, "g r p"],
    *,
    live: Array | float | int,
    eps: float,
    mask: Float[Array, "*bt r p"] | None = None,
    active: Int[Array, ""] | int | None = None,
) -> Float[Array, "b t g r p"]:
    """As `elastic_kernels.gated_rms_norm`.

    Raises:
      NotImplementedError: a dtype or a width that the kernels do not have, or a GPU
        older than Ampere.
    """
    dispatch.require_capability("gated_rms_norm")
    b, _, _, r, p = y.shape
    if y.dtype.name not in DTYPES or r * p > LARGEST:
        raise NotImplementedError(
            f"gated_rms_norm: the Triton kernels take {DTYPES} and groups of up to "
            f"{LARGEST} channels, got {y.dtype} and {r * p}; use implementation='xla'"
        )
    # Whatever has no batch gets one, that `vmap` may map over it.
    scale = jnp.broadcast_to(scale, (b, *scale.shape))
    live = jnp.asarray(live, jnp.float32)
    live = live if live.ndim else jnp.broadcast_to(live, (b, 1))
    if mask is not None and mask.ndim == 2:
        mask = jnp.broadcast_to(mask, (b, 1, r, p))
    active = jnp.full((b,), r if active is None else active, jnp.int32)
    return _norm(eps, *alike(y, z.astype(y.dtype), scale, mask, live, active))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(eps, y, z, scale, mask, live, active):
    return _run(eps)(y, z, scale, mask, live, active)


def _norm_forward(eps, *arguments):
    return _norm(eps, *arguments), arguments


def _norm_backward(eps, saved, dout):
    _, _, _, mask, _, _ = saved
    dy, dz, dscale, dmask, dlive = _gradient(eps)(*saved, dout)
    return dy, dz, dscale, None if mask is None else dmask, dlive, None


_norm.defvjp(_norm_forward, _norm_backward)


@functools.cache
def _run(eps: float):
    @batch_parallel
    def run(y, z, scale, mask, live, active):
        b, t, g, *_ = y.shape
        (out,) = launching.launch(
            kernels.forward_kernel,
            (y, z, scale, _or(mask, y), live, active, t),
            (jax.ShapeDtypeStruct(y.shape, y.dtype),),
            grid=(b * t, g),
            **_constants(eps, y, mask, live),
        )
        return out

    return run


@functools.cache
def _gradient(eps: float):
    @batch_parallel
    def run(y, z, scale, mask, live, active, dout):
        b, t, g, r, p = y.shape
        parts = -(-t // TOKENS)
        constants = _constants(eps, y, mask, live)
        of_parts = jax.ShapeDtypeStruct((b, parts, g, r, p), jnp.float32)
        of_masks = {0: (b, 0), 1: of_parts.shape, 2: y.shape}[constants["MASK"]]
        dy, dz, dscale, dmask, dlive = launching.launch(
            kernels.gradient_kernel,
            (y, z, scale, _or(mask, y), live, active, dout, t, parts),
            (
                jax.ShapeDtypeStruct(y.shape, y.dtype),
                jax.ShapeDtypeStruct(z.shape, z.dtype),
                of_parts,
                jax.ShapeDtypeStruct(of_masks, jnp.float32),
                jax.ShapeDtypeStruct((b, t, g), jnp.float32),
            ),
            grid=(b * parts, g),
            TOKENS=TOKENS,
            **constants,
        )
        dscale = jnp.sum(dscale, 1).astype(scale.dtype)
        dlive = jnp.sum(dlive, 2)
        if live.shape[1] == 1:
            dlive = jnp.sum(dlive, 1, keepdims=True)
        if mask is not None:
            dmask = jnp.sum(dmask, 2)
            if mask.shape[1] == 1:
                dmask = jnp.sum(dmask, 1, keepdims=True)
            dmask = dmask.astype(mask.dtype)
        return dy, dz, dscale, dmask, dlive

    return run


def _constants(eps, y, mask, live) -> dict:
    """The kernels' constants: how often mask and counts vary, the width, the tile."""
    _, t, g, r, p = y.shape
    often = lambda a: 0 if a is None else 2 if a.shape[1] == t else 1
    block = 1 << (r * p - 1).bit_length()
    return {
        "G": g,
        "W": r * p,
        "P": p,
        "EPS": eps,
        "MASK": often(mask),
        "COUNTS": often(live),
        "BLOCK": block,
        "num_warps": min(16, max(1, block // 256)),
    }


def _or(a: jax.Array | None, anything: jax.Array) -> jax.Array:
    """`a`; where it is missing, a pointer that the kernel will not follow."""
    return anything if a is None else a
