"""Mamba-2, elastic in heads per group, head channels and state channels.

    b batch   t time   w conv_width   d embed
    g ssm_groups   r heads_per_group   p ssm_head_dim   n ssm_state

Heads of a group share B and C. They are ranked inside their group, so a prefix of
every group keeps the sharing regular; one channel pattern serves every head. The
parts that a checkpoint fuses into `in_proj` stay apart: each has axes of its own.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elastic_jax.axes import CacheSpec, ParamSpec
from elastic_jax.layers.norm import rms_norm
from elastic_jax.masks import LayerMasks, elastic, live, varies_along_time, written
from elastic_kernels import contract, ssd

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
    segment_ids=None,
    lengths=None,
    cache=None,
    tap=None,
):
    """Mixes tokens by a selective state space; returns the update and the cache."""
    z = contract("btd,dgrp->btgrp", x, params["z"])
    u = contract("btd,dgrp->btgrp", x, params["x"])
    B = contract("btd,dgn->btgn", x, params["B"])
    C = contract("btd,dgn->btgn", x, params["C"])
    dt = contract("btd,dgr->btgr", x, params["dt"])

    # Tails and state may be read under another mask than they were written under.
    lasting = cache is not None or varies_along_time(masks)
    store = (lambda a, axes: _written(a, masks, axes)) if lasting else (lambda a, _: a)
    u, B, C = store(u, "rp"), store(B, "n"), store(C, "n")
    tails = cache or {}
    u, tail_x = _conv(params, "conv_x", u, tails, segment_ids, lengths)
    B, tail_B = _conv(params, "conv_B", B, tails, segment_ids, lengths)
    C, tail_C = _conv(params, "conv_C", C, tails, segment_ids, lengths)
    u, B = store(u, "rp"), store(B, "n")
    if tap is not None:
        tap("ssm_B", B)
    C = elastic(C, masks, "ssm_state", dim=-1, tap=tap)

    # Step sizes, decays and the scan state in at least float32.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dt = jax.nn.softplus(dt.astype(wide) + params["dt_bias"].astype(wide))
    if lengths is not None:
        valid = jnp.arange(x.shape[1]) < lengths[:, None]
        dt = jnp.where(valid[..., None, None], dt, 0)
    y, state = ssd(
        u,
        dt,
        -jnp.exp(params["A_log"].astype(wide)),
        B,
        C,
        params["D"].astype(wide),
        initial_state=tails.get("state"),
        resets=_resets(segment_ids),
    )
    if cache is not None:
        state = state.astype(cache["state"].dtype)
        cache = {"conv_x": tail_x, "conv_B": tail_B, "conv_C": tail_C, "state": state}

    y = (y.astype(wide) * jax.nn.silu(z.astype(wide))).astype(x.dtype)
    y = elastic(y, masks, "heads_per_group", dim=-2, tap=tap)
    y = elastic(y, masks, "ssm_head_dim", dim=-1)
    y = _group_norm(params["gate_norm"], y, masks, norm_eps)
    return contract("btgrp,grpd->btd", y, params["out"]), cache


def _written(value: Array, masks: LayerMasks, axes: str) -> Array:
    """What a submodel would have stored of `value`, whose last dims are `axes`."""
    names = {"r": "heads_per_group", "p": "ssm_head_dim", "n": "ssm_state"}
    for i, axis in enumerate(axes):
        value = written(value, masks, names[axis], dim=i - len(axes))
    return value


def _group_norm(
    scale: Float[Array, "g r p"], y: Float[Array, "b t g r p"], masks, eps: float
) -> Float[Array, "b t g r p"]:
    """RMSNorm inside each group, over its live heads and channels."""
    _, r, p = scale.shape
    count = live(masks, "heads_per_group", r) * live(masks, "ssm_head_dim", p)
    return rms_norm(y, scale, live=count, eps=eps, dims=2)


def _resets(segment_ids):
    """True where a token starts another segment than its predecessor's; [b, t]."""
    if segment_ids is None:
        return None
    return jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0


def _conv(params, name: str, x: Float[Array, "b t *c"], tails, segment_ids, lengths):
    """Causal depthwise convolution and silu; returns it with the new tail, if cached.

    The tail is the last `w` inputs of each row, up to its length.
    """
    kernel, bias = params[name].astype(x.dtype), params[f"{name}_bias"]
    width, time = kernel.shape[0], x.shape[1]
    tail = tails.get(name)
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
    y = jax.nn.silu(y)
    if tail is None:
        return y, None

    held = jnp.concatenate([tail[:, :1].astype(x.dtype), inputs], axis=1)
    if lengths is None:
        return y, held[:, time:].astype(tail.dtype)
    at = lengths[:, None] + jnp.arange(width)
    at = at.reshape(*at.shape, *[1] * (x.ndim - 2))
    return y, jnp.take_along_axis(held, at, axis=1).astype(tail.dtype)


def _same_segment(segment_ids, back: int):
    """Whether the token `back` steps earlier exists and is of the same segment."""
    same = segment_ids[:, back:] == segment_ids[:, :-back]
    return jnp.pad(same, ((0, 0), (back, 0)))[:, : segment_ids.shape[1]]
