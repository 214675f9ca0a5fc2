"""Nemotron-H: blocks of one mixer each, as pure functions over a parameter tree.

    b batch   t time   d embed   v vocab   s cache length

Every block is `x + layer(norm(x))`, and both the embedding output and every block
output are written through the embed mask, so the residual always lies in the slice.
Layers are an unstacked tuple, because their widths may differ.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from elastic_jax import axes
from elastic_jax.axes import CacheSpec, CacheSpecs, ParamSpec, ParamSpecs
from elastic_jax.config import ModelConfig
from elastic_jax.layers import attention, mamba2, mlp, moe
from elastic_jax.layers.norm import rms_norm
from elastic_jax.masks import BudgetMasks, elastic, layer_masks, live
from elastic_kernels import contract

LAYERS = {"M": mamba2, "*": attention, "E": moe, "-": mlp}


@functools.lru_cache(maxsize=64)
def param_specs(cfg: ModelConfig) -> ParamSpecs:
    """(path, spec) of every parameter: a hashable tuple, static under `jit`."""
    specs = [(("embedding",), ParamSpec("vocab -> embed", init="embedding"))]
    for i, kind in enumerate(cfg.pattern):
        specs.append((("layers", i, "norm"), ParamSpec("-> embed", init="ones")))
        for name, spec in LAYERS[kind].SPECS.items():
            specs.append((("layers", i, name), spec))
    specs.append((("final_norm",), ParamSpec("-> embed", init="ones")))
    specs.append((("lm_head",), ParamSpec("embed -> vocab")))
    return tuple(specs)


@functools.lru_cache(maxsize=64)
def cache_specs(cfg: ModelConfig) -> CacheSpecs:
    """(path, spec) of every cache array: what decoding keeps between calls."""
    specs = [(("filled",), CacheSpec("batch", dtype="int32"))]
    for i, kind in enumerate(cfg.pattern):
        for name, spec in LAYERS[kind].CACHE.items():
            specs.append((("layers", i, name), spec))
    return tuple(specs)


def init_params(key: Array, cfg: ModelConfig, *, dtype=jnp.float32) -> dict[str, Any]:
    """A random parent: normal over the fan-in, exceptions named by the specs."""
    specs = param_specs(cfg)
    split = jax.random.split(key, len(specs))
    keys = {path: key for (path, _), key in zip(specs, split, strict=True)}

    def draw(path, spec):
        shape = axes.shape(cfg, specs, path, spec)
        return INITIALISERS[spec.init](keys[path], spec, shape).astype(dtype)

    return axes.map_specs(draw, specs)


def init_cache(
    cfg: ModelConfig, batch: int, length: int, *, dtype=jnp.float32
) -> dict[str, Any]:
    """An empty cache for `batch` rows of at most `length` tokens.

    `cache["filled"]` [b] counts the tokens each row holds. Scan states are float32
    (float64 when `dtype` is).
    """
    specs = cache_specs(cfg)

    def zeros(path, spec):
        shape = axes.shape(cfg, specs, path, spec, batch=batch, length=length)
        kind = dtype if spec.dtype is None else jnp.dtype(spec.dtype)
        if spec.dtype == "float32":
            kind = jnp.promote_types(kind, dtype)
        return jnp.zeros(shape, kind)

    return {"layers": ()} | axes.map_specs(zeros, specs)


def hidden_states(
    params,
    tokens: Int[Array, "b t"],
    cfg: ModelConfig,
    *,
    masks: BudgetMasks | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    lengths: Int[Array, " b"] | None = None,
    tap=None,
    remat: bool = False,
) -> Float[Array, "b t d"]:
    """The model up to and including the final norm. Arguments as in `apply`.

    `remat` keeps only each block's input for the backward pass. It excludes `tap`,
    whose values would be those of a computation that runs twice.
    """
    if remat and tap is not None:
        raise ValueError("remat and tap: tap a forward pass without remat")
    context = {"segment_ids": segment_ids, "lengths": lengths}
    x, _ = _stack(params, tokens, cfg, masks, context, tap=tap, remat=remat)
    return x


def apply(
    params,
    tokens: Int[Array, "b t"],
    cfg: ModelConfig,
    *,
    masks: BudgetMasks | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    lengths: Int[Array, " b"] | None = None,
    tap=None,
) -> Float[Array, "b t v"]:
    """Logits in float32 (float64 for float64 parameters).

    Args:
      tokens: a token outside the vocabulary gives NaN logits for its row.
      masks: budget masks of `cfg`; None means the full model.
      segment_ids: packed documents; nothing crosses from one id to the next. A row
        gives every document an id of its own.
      lengths: valid tokens per row, at the left; what follows is padding whose
        logits mean nothing.
      tap: `tap(layer, name, value)` sees activations while tracing; `layer` is the
        block's index, or `len(cfg.pattern)` for the final norm.
    """
    x = hidden_states(
        params,
        tokens,
        cfg,
        masks=masks,
        segment_ids=segment_ids,
        lengths=lengths,
        tap=tap,
    )
    return logits(params, x)


def logits(params, hidden: Float[Array, "*bt d"]) -> Float[Array, "*bt v"]:
    """Projects final hidden states onto the vocabulary, in at least float32."""
    y = contract("...d,dv->...v", hidden, params["lm_head"])
    return y.astype(jnp.promote_types(y.dtype, jnp.float32))


def extend(
    params,
    tokens: Int[Array, "b t"],
    cache,
    cfg: ModelConfig,
    *,
    lengths: Int[Array, " b"] | None = None,
    masks: BudgetMasks | None = None,
    tentative: bool = False,
    scan: str | None = None,
) -> tuple[Float[Array, "b t v"], Any]:
    """Reads `tokens` behind what the cache holds: prefill, chunk and single step.

    Args:
      lengths: how many of `tokens` are valid per row; the cache advances by them.
      tentative: it advances later, by `settle`, which may keep fewer tokens.
      scan: the implementation of `elastic_kernels.ssd`.

    Returns:
      logits as of `apply`, and the new cache. A row that would overflow the cache
      gets NaN logits: its keys could not be stored.

    Raises:
      ValueError: more tokens in one call than the cache can ever hold.
    """
    capacity = cache_length(cache, cfg)
    if capacity is not None and tokens.shape[1] > capacity:
        raise ValueError(
            f"extend: {tokens.shape[1]} tokens for a cache of length {capacity}; "
            "make it longer with init_cache(cfg, batch, length)"
        )
    context = {"segment_ids": None, "lengths": lengths}
    options = {"cache": cache, "tentative": tentative, "scan": scan}
    x, layers = _stack(params, tokens, cfg, masks, context, **options)
    new = tokens.shape[1] if lengths is None else lengths.astype(jnp.int32)
    filled = cache["filled"] + new
    y = logits(params, x)
    if capacity is not None:
        y = jnp.where((filled <= capacity)[:, None, None], y, jnp.nan)
    filled = cache["filled"] if tentative else filled
    return y, {"filled": filled, "layers": layers[: len(cache["layers"])]}


def settle(
    params, cache, cfg: ModelConfig, *, lengths: Int[Array, " b"], scan=None
) -> Any:
    """The cache behind the first `lengths` of the tokens that were read tentatively.

    What the others left in it is out of sight, and overwritten by what follows: this
    is how a model takes back tokens without a copy of its state for each.

    Args:
      lengths: at most what was valid when the tokens were read.
      scan: as it was for `extend`.
    """
    layers = [
        mamba2.settle(params["layers"][i], entry, lengths, scan=scan)
        if cfg.pattern[i] == "M"
        else entry
        for i, entry in enumerate(cache["layers"])
    ]
    filled = cache["filled"] + lengths.astype(jnp.int32)
    return {"filled": filled, "layers": tuple(layers)}


def cache_length(cache, cfg: ModelConfig) -> int | None:
    """How many tokens a cache can hold; None without attention: any number."""
    if "*" not in cfg.pattern:
        return None
    return cache["layers"][cfg.pattern.index("*")]["k"].shape[1]


def _stack(
    params,
    tokens,
    cfg,
    masks,
    context,
    *,
    cache=None,
    tap=None,
    remat=False,
    tentative=False,
    scan=None,
):
    """All blocks and the final norm; returns hidden states and the layer caches."""
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    if context["lengths"] is not None:
        # Padding may hold any value; it must be a token before it meets a zero weight.
        valid = jnp.arange(tokens.shape[1]) < context["lengths"][:, None]
        tokens = jnp.where(valid, tokens, 0)
    whole = {} if masks is None else masks
    model_masks = {"embed": whole["embed"]} if whole.get("embed") is not None else {}
    depth = whole.get("layers")

    # Negative tokens are outside the vocabulary too: they must not count from its end.
    x = (
        params["embedding"]
        .at[tokens]
        .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    )
    x = elastic(x, model_masks, "embed", dim=-1)
    caches = []
    for i, kind in enumerate(cfg.pattern):
        run = _FUNCTIONS[kind](cfg)
        if kind == "M":
            run = functools.partial(run, tentative=tentative, scan=scan)
        step = functools.partial(_block, run=run, kind=kind, cfg=cfg, tap=_bind(tap, i))
        step = jax.checkpoint(step) if remat else step
        entry = None
        if cache is not None:
            held = cache["layers"][i] if i < len(cache["layers"]) else {}
            entry = held | {"filled": cache["filled"]}
        gamma = None if depth is None else depth[..., i]
        x, entry = step(
            params["layers"][i],
            x,
            layer_masks(masks, cfg.pattern, i),
            gamma,
            cache=entry,
            **context,
        )
        caches.append(entry)
    return (
        _norm(params["final_norm"], x, model_masks, cfg, _bind(tap, cfg.layers)),
        tuple(caches),
    )


def _block(layer_params, x, masks, gamma, *, run, kind, cfg, cache, tap, **context):
    """One residual block: x + gamma * layer(norm(x))."""
    h = _norm(layer_params["norm"], x, masks, cfg, tap)
    if cache is not None and not LAYERS[kind].CACHE:
        cache = {}
    update, cache = run(layer_params, h, masks, cache=cache, tap=tap, **context)
    update = elastic(update, masks, "embed", dim=-1)
    if gamma is not None:
        gamma = gamma.astype(update.dtype)
        update = update * (gamma if gamma.ndim == 0 else gamma[..., None])
    return x + update, cache


def _norm(scale, x, masks, cfg, tap):
    """The RMSNorm before a block or the head, over the live channels."""
    count = live(masks, "embed", scale.shape[0])
    h = rms_norm(x, scale, live=count, eps=cfg.norm_eps)
    if tap is not None:
        tap("embed", h)
    return h


def _bind(tap, layer: int):
    return None if tap is None else functools.partial(tap, layer)


# The values of the configuration that each layer takes.
_FUNCTIONS = {
    "M": lambda cfg: functools.partial(mamba2.mamba2, norm_eps=cfg.norm_eps),
    "*": lambda cfg: attention.attention,
    "E": lambda cfg: functools.partial(
        moe.moe,
        top_k=cfg.top_k,
        n_group=cfg.n_group,
        topk_group=cfg.topk_group,
        routed_scaling_factor=cfg.routed_scaling_factor,
    ),
    "-": lambda cfg: mlp.mlp,
}


def _fan_in(key, spec, shape):
    start = len(spec.batch)
    fan = 1
    for size in shape[start : start + len(spec.contracted)]:
        fan *= size
    return jax.random.normal(key, shape) * fan**-0.5


def _dt_bias(key, spec, shape):
    """Inverse softplus of steps log-uniform in 0.001 .. 0.1 (arXiv 2405.21060)."""
    low, high = jnp.log(1e-3), jnp.log(1e-1)
    dt = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
    return dt + jnp.log(-jnp.expm1(-dt))


INITIALISERS = {
    "fan_in": _fan_in,
    "embedding": lambda key, spec, shape: jax.random.normal(key, shape),
    "ones": lambda key, spec, shape: jnp.ones(shape),
    "zeros": lambda key, spec, shape: jnp.zeros(shape),
    "A_log": lambda key, spec, shape: jnp.log(
        jax.random.uniform(key, shape, minval=1.0, maxval=16.0)
    ),
    "dt_bias": _dt_bias,
}
