"""Mixture of experts, elastic in experts, their width and the shared expert's width.

    b batch   t time   d embed   e experts   c choices (top_k)   f expert_ffn
    s shared_ffn   m tokens, b and t together

Experts are ranked, so the kept ones are a prefix: a masked expert gets -inf before
the choice, never a weight of zero after it. The choice itself is not differentiable;
a soft expert mask learns through the gates.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from elastic_jax.axes import ParamSpec
from elastic_jax.masks import LayerMasks, elastic, extent
from elastic_kernels import contract, expert_mlp, grouped_matmul

SPECS = {
    "router": ParamSpec("embed -> experts"),
    "router_bias": ParamSpec("-> experts", init="zeros"),
    "up": ParamSpec("experts : embed -> expert_ffn"),
    "down": ParamSpec("experts : expert_ffn -> embed"),
    "shared_up": ParamSpec("embed -> shared_ffn"),
    "shared_down": ParamSpec("shared_ffn -> embed"),
}

CACHE = {}


def moe(
    params,
    x: Float[Array, "b t d"],
    masks: LayerMasks,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    routed_scaling_factor: float,
    segment_ids=None,
    lengths=None,
    cache=None,
    tap=None,
):
    """Sends every token to `top_k` experts and the shared one; returns the update.

    Under an embed mask that does not learn, what it switches off of `x` is not read.
    """
    experts, gates = route(params, x, masks.get("experts"), top_k, n_group, topk_group)
    y = _routed(params, x, masks, experts, gates, tap) * routed_scaling_factor

    h = jax.nn.relu(contract("btd,ds->bts", x, params["shared_up"])) ** 2
    h = elastic(h, masks, "shared_ffn", dim=-1, tap=tap)
    return y + contract("bts,sd->btd", h, params["shared_down"]), cache


def route(
    params,
    x: Float[Array, "b t d"],
    mask: Float[Array, "*bt e"] | None,
    top_k: int,
    n_group: int,
    topk_group: int,
) -> tuple[Int[Array, "b t c"], Float[Array, "b t c"]]:
    """Chooses experts by score + bias; gates are the chosen scores, summing to one.

    Scores are sigmoids in at least float32. With a mask m the choice is by
    m * (score + bias - floor) over m > 0, where floor is the smallest live bias: the
    shift makes every term positive, so that a half-masked expert is less likely, not
    more; at m = 1 it changes no choice.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    score = jax.nn.sigmoid(contract("btd,de->bte", x.astype(wide), params["router"]))
    bias = jax.lax.stop_gradient(params["router_bias"].astype(wide))

    choice = score + bias
    if mask is not None:
        mask = mask.astype(wide)
        alive = mask > 0
        floor = jnp.min(jnp.where(alive, bias, jnp.inf), axis=-1, keepdims=True)
        choice = jnp.where(alive, mask * (choice - floor), -jnp.inf)
        score = mask * score
    if topk_group < n_group:
        choice = _best_groups(choice, n_group, topk_group)
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(choice), top_k)
    chosen = jnp.take_along_axis(score, experts, axis=-1)
    return experts, chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + 1e-20)


def _best_groups(
    choice: Float[Array, "b t e"], n_group: int, topk_group: int
) -> Float[Array, "b t e"]:
    """-inf outside the `topk_group` groups whose two best experts sum highest."""
    groups = choice.reshape(*choice.shape[:-1], n_group, -1)
    best = jnp.sum(jax.lax.top_k(groups, 2)[0], axis=-1)
    _, kept = jax.lax.top_k(best, topk_group)
    keep = jnp.any(kept[..., None] == jnp.arange(n_group), axis=-2)
    return jnp.where(keep[..., None], groups, -jnp.inf).reshape(choice.shape)


def _routed(params, x, masks, experts, gates, tap) -> Float[Array, "b t d"]:
    """The gated sum of the chosen experts."""
    b, t, d = x.shape
    rows = x.reshape(b * t, d)
    chosen = experts.reshape(b * t, -1)
    weights = gates.reshape(b * t, -1).astype(x.dtype)
    mask = masks.get("expert_ffn")
    if mask is not None:
        mask = mask.reshape(-1, mask.shape[-1]) if mask.ndim > 1 else mask
        mask = mask.astype(x.dtype)

    if tap is None:
        y = expert_mlp(
            *(rows, params["up"], params["down"], chosen, weights),
            hidden_mask=mask,
            active=(extent(masks, "expert_ffn"), extent(masks, "embed")),
        )
        return y.reshape(b, t, d)

    # The fused form keeps its intermediates to itself, so a tap takes two products.
    each = jnp.broadcast_to(rows[:, None], (*chosen.shape, d))
    hidden = jax.nn.relu(grouped_matmul(each, params["up"], chosen)) ** 2
    live = hidden if mask is None else hidden * jnp.expand_dims(mask, -2)
    output = grouped_matmul(live, params["down"], chosen)
    tap("expert_ffn", hidden.reshape(b, t, *hidden.shape[1:]))
    tap("experts", (experts, gates, output.reshape(b, t, *output.shape[1:])))
    return jnp.sum(weights[..., None] * output, axis=1).reshape(b, t, d)
