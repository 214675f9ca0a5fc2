"""Mamba-2, elastic in heads per group, head channels and state channels.

    b batch   t time   w conv_width   d embed
    g ssm_groups   r heads_per_group   p ssm_head_dim   n ssm_state

Heads of a group share B and C. They are ranked inside their group, so a prefix of
every group keeps the sharing regular; one channel pattern serves every head. The
parts that a checkpoint fuses into `in_proj` stay apart: each has axes of its own.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from elastic_jax.axes import CacheSpec, ParamSpec
from elastic_jax.masks import (
    LayerMasks,
    elastic,
    extent,
    live,
    varies_along_time,
    written,
)
from elastic_kernels import contract, gated_rms_norm, ssd

HEADS = "ssm_groups heads_per_group ssm_head_dim"
STATE = "ssm_groups ssm_state"

SPECS = {
    "z": ParamSpec(f"embed -> {HEADS}", fused="in_proj"),
    "x": ParamSpec(f"embed -> {HEADS}", fused="in_proj"),
    "B": ParamSpec(f"embed -> {STATE}", fused="in_proj"),
    "C": ParamSpec(f"embed -> {STATE}", fused="in_proj"),
    "dt": ParamSpec("embed -> ssm_groups heads_per_group", fused="in_proj"),
    "conv_x": ParamSpec(f"conv_width -> {HEADS}", fused="conv1d"),
    "conv_B": ParamSpec(f"conv_width -> {STATE}", fused="conv1d"),
    "conv_C": ParamSpec(f"conv_width -> {STATE}", fused="conv1d"),
    "conv_x_bias": ParamSpec(f"-> {HEADS}", init="zeros", fused="conv1d_bias"),
    "conv_B_bias": ParamSpec(f"-> {STATE}", init="zeros", fused="conv1d_bias"),
    "conv_C_bias": ParamSpec(f"-> {STATE}", init="zeros", fused="conv1d_bias"),
    "dt_bias": ParamSpec("-> ssm_groups heads_per_group", init="dt_bias"),
    "A_log": ParamSpec("-> ssm_groups heads_per_group", init="A_log"),
    "D": ParamSpec("-> ssm_groups heads_per_group", init="ones"),
    "gate_norm": ParamSpec(f"-> {HEADS}", init="ones"),
    "out": ParamSpec(f"{HEADS} -> embed"),
}

CACHE = {
    "conv_x": CacheSpec(f"batch conv_width {HEADS}"),
    "conv_B": CacheSpec(f"batch conv_width {STATE}"),
    "conv_C": CacheSpec(f"batch conv_width {STATE}"),
    "state": CacheSpec(f"batch {HEADS} ssm_state", dtype="float32"),
}


def mamba2(
    params,
    x: Float[Array, "b t d"],
    masks: LayerMasks,
    *,
    norm_eps: float,
    scan: str | None = None,
    segment_ids=None,
    lengths=None,
    cache=None,
    tap=None,
    tentative: bool = False,
):
    """Mixes tokens by a selective state space; returns the update and the cache.

    Args:
      scan: the implementation of `ssd`.
      tentative: leave the cache as it was, and what was read beside it for `settle`.
    """
    z = contract("btd,dgrp->btgrp", x, params["z"])
    u = contract("btd,dgrp->btgrp", x, params["x"])
    B = contract("btd,dgn->btgn", x, params["B"])
    C = contract("btd,dgn->btgn", x, params["C"])
    dt = contract("btd,dgr->btgr", x, params["dt"])

    # Tails and state may be read under another mask than they were written under.
    lasting = cache is not None or varies_along_time(masks)
    store = (lambda a, axes: _written(a, masks, axes)) if lasting else (lambda a, _: a)
    u, B, C = store(u, "rp"), store(B, "n"), store(C, "n")
    held = cache or {}
    read = {"conv_x": u, "conv_B": B, "conv_C": C}
    u = _conv(params, "conv_x", u, held.get("conv_x"), segment_ids)
    B = _conv(params, "conv_B", B, held.get("conv_B"), segment_ids)
    C = _conv(params, "conv_C", C, held.get("conv_C"), segment_ids)
    u, B = store(u, "rp"), store(B, "n")
    if tap is not None:
        tap("ssm_B", B)
    C = elastic(C, masks, "ssm_state", dim=-1, tap=tap)

    # Step sizes, decays and the scan state in at least float32.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dt = jax.nn.softplus(dt.astype(wide) + params["dt_bias"].astype(wide))
    dt = _until(dt, lengths)
    y, state = ssd(
        u,
        dt,
        -jnp.exp(params["A_log"].astype(wide)),
        B,
        C,
        params["D"].astype(wide),
        initial_state=held.get("state"),
        resets=_resets(segment_ids),
        implementation=scan,
    )
    if tentative:
        cache = held | {"read": read | {"x": u, "dt": dt, "B": B}}
    elif cache is not None:
        cache = _advanced(held, read, state, lengths)

    y = _gated_norm(params["gate_norm"], y, z, masks, norm_eps, tap)
    return contract("btgrp,grpd->btd", y, params["out"]), cache


def _written(value: Array, masks: LayerMasks, axes: str) -> Array:
    """What a submodel would have stored of `value`, whose last dims are `axes`."""
    names = {"r": "heads_per_group", "p": "ssm_head_dim", "n": "ssm_state"}
    for i, axis in enumerate(axes):
        value = written(value, masks, names[axis], dim=i - len(axes))
    return value


def _gated_norm(
    scale: Float[Array, "g r p"],
    y: Float[Array, "b t g r p"],
    z: Float[Array, "b t g r p"],
    masks: LayerMasks,
    eps: float,
    tap,
) -> Float[Array, "b t g r p"]:
    """Gates heads, masks them, and normalises what is live of each group."""
    _, r, p = scale.shape
    count = live(masks, "heads_per_group", r) * live(masks, "ssm_head_dim", p)
    if tap is not None:  # it sees the heads before their mask
        wide = jnp.promote_types(y.dtype, jnp.float32)
        gated = y.astype(wide) * jax.nn.silu(z.astype(wide))
        tap("heads_per_group", gated.astype(y.dtype))
    heads, channels = masks.get("heads_per_group"), masks.get("ssm_head_dim")
    mask = None
    if heads is not None or channels is not None:
        heads = jnp.ones(r) if heads is None else heads
        channels = jnp.ones(p) if channels is None else channels
        mask = heads[..., None] * channels[..., None, :]
    active = extent(masks, "heads_per_group")
    return gated_rms_norm(y, z, scale, mask=mask, live=count, active=active, eps=eps)


def _resets(segment_ids):
    """True where a token starts another segment than its predecessor's; [b, t]."""
    if segment_ids is None:
        return None
    return jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0


def settle(params, cache, lengths: Int[Array, " b"], *, scan: str | None = None):
    """The cache behind the first `lengths` of the tokens that were read tentatively.

    One saved state and the inputs since are enough: the scan runs once more, over its
    state alone, with dt zeroed behind the tokens that stay.

    Args:
      cache: what `mamba2` returned; `read` may hold the tokens of several calls, one
        behind the other.
    """
    read = cache["read"]
    dt = _until(read["dt"], lengths)
    A = -jnp.exp(params["A_log"].astype(dt.dtype))
    inputs = read["x"], dt, A, read["B"], read["B"], jnp.zeros_like(A)
    _, state = ssd(*inputs, initial_state=cache["state"], implementation=scan)
    return _advanced(cache, read, state, lengths)


def _advanced(held, read, state, lengths):
    """The cache with a new state, and tails that end with each row's last token."""
    names = ("conv_x", "conv_B", "conv_C")
    tails = {name: _tail(held[name], read[name], lengths) for name in names}
    return tails | {"state": state.astype(held["state"].dtype)}


def _until(dt: Float[Array, "b t g r"], lengths) -> Float[Array, "b t g r"]:
    """Steps of zero, which leave the state alone, behind each row's valid tokens."""
    if lengths is None:
        return dt
    valid = jnp.arange(dt.shape[1]) < lengths[:, None]
    return jnp.where(valid[..., None, None], dt, 0)


def _conv(params, name: str, x: Float[Array, "b t *c"], tail, segment_ids):
    """Causal depthwise convolution and silu; `tail` holds the `w` inputs before."""
    kernel, bias = params[name].astype(x.dtype), params[f"{name}_bias"]
    width, time = kernel.shape[0], x.shape[1]
    if tail is None:
        past = jnp.zeros((x.shape[0], width - 1, *x.shape[2:]), x.dtype)
    else:
        past = tail[:, 1:].astype(x.dtype)
    inputs = jnp.concatenate([past, x], axis=1)

    y = x * kernel[-1] + bias.astype(x.dtype)
    for back in range(1, width):
        start = width - 1 - back
        earlier = inputs[:, start : start + time]
        if segment_ids is not None:
            same = _same_segment(segment_ids, back)
            same = same.reshape(*same.shape, *[1] * (x.ndim - 2))
            earlier = jnp.where(same, earlier, 0)
        y = y + earlier * kernel[start]
    return jax.nn.silu(y)


def _tail(tail: Float[Array, "b w *c"], x: Float[Array, "b t *c"], lengths):
    """The last `w` inputs of each row, up to its length."""
    width, time = tail.shape[1], x.shape[1]
    held = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    if lengths is None:
        return held[:, time:].astype(tail.dtype)
    at = lengths[:, None] + jnp.arange(width)
    at = at.reshape(*at.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(held, at, axis=1).astype(tail.dtype)


def _same_segment(segment_ids, back: int):
    """Whether the token `back` steps earlier exists and is of the same segment."""
    same = segment_ids[:, back:] == segment_ids[:, :-back]
    return jnp.pad(same, ((0, 0), (back, 0)))[:, : segment_ids.shape[1]]
