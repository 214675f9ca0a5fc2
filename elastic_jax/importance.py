"""Importance: one forward pass over calibration data scores every unit of every axis.

    b batch   t time   c choices (top_k)   d embed   l blocks
    g ssm_groups   r heads_per_group   p ssm_head_dim   n ssm_state
    k kv_heads   q q_per_kv   h head_dim   e experts   f expert_ffn

No gradients: a unit matters as much as it is active (Minitron, arXiv 2407.14679;
Nemotron Elastic, arXiv 2511.16664), an expert as much as it adds to the tokens that
reach it (REAP, arXiv 2510.13999). The pass is a fold, `init`, `add`, `finish`, over a
small pytree of sums: batches may be split, and an interrupted pass continues. The sums
do not depend on how they will be read, so every aggregation and every expert metric
comes out of the same pass.
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from elastic_jax import fold
from elastic_jax.axes import AXES, blocks_with
from elastic_jax.config import ModelConfig, did_you_mean
from elastic_jax.model import hidden_states, logits
from elastic_jax.scores import EXPERT_METRICS, Scores, to_json

# What the layers tap -> the dimensions of one token's activation. "ssm_state" is C.
# A Mamba head is judged by its gated output, what it hands on, where published work
# takes its input x: on two of three toy parents x ranked heads no better than chance.
TAPS = {
    "embed": ("embed",),
    "heads_per_group": ("ssm_groups", "heads_per_group", "ssm_head_dim"),
    "ssm_B": ("ssm_groups", "ssm_state"),
    "ssm_state": ("ssm_groups", "ssm_state"),
    "q_per_kv": ("kv_heads", "q_per_kv", "head_dim"),
    "expert_ffn": ("experts", "expert_ffn"),
    "shared_ffn": ("shared_ffn",),
    "ffn": ("ffn",),
}
AGGREGATES = ("mean_l2", "sum")

State = dict[str, Any]

# Scores are float32 also where matrix units would round their inputs.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def importance(
    params,
    batches: Iterable[fold.Batch],
    cfg: ModelConfig,
    *,
    aggregate: str = "mean_l2",
    experts: str = "reap",
    state: State | None = None,
    provenance: Mapping[str, Any] | None = None,
    on_batch: Callable[[State], None] | None = None,
) -> Scores:
    """Scores every width axis in one pass over `batches`.

    Args:
      batches: as of `add`; read to their end.
      aggregate, experts, provenance: as of `finish`.
      state: sums of earlier batches, to be continued.
      on_batch: called with the state after every batch.
    """
    _check_options(aggregate, experts)
    state = init(cfg) if state is None else state
    for batch in batches:
        # Without waiting, the host would queue batches and states without bound.
        state = jax.block_until_ready(add(state, params, batch, cfg))
        if on_batch is not None:
            on_batch(state)
    return finish(
        state, cfg, aggregate=aggregate, experts=experts, provenance=provenance
    )


def calibrate(
    params,
    batches: Iterable[fold.Batch],
    cfg: ModelConfig,
    *,
    path: str | os.PathLike,
    save_every: int = 16,
    aggregate: str = "mean_l2",
    experts: str = "reap",
    provenance: Mapping[str, Any] | None = None,
    on_batch: Callable[[State], None] | None = None,
) -> Scores:
    """`importance` that keeps its state in a file and continues where it was stopped.

    Give the same batches from the start: those seen are checked, not computed. A
    finished file gives its scores at once, and goes on if there is more. Number and
    digest of the batches join the provenance.

    Args:
      path: one `.npz` file, replaced atomically every `save_every` batches.
      provenance: as of `finish`; another one than the file's is refused.

    Raises:
      ValueError: as of `finish` and `fold.resume`, which also refuses a file of other
        parameters, another config or other batches.
    """
    _check_options(aggregate, experts)
    given = dict(provenance or {})
    state, seen = fold.resume(
        lambda state, batch: _add(state, params, batch, cfg),
        init(cfg),
        (fold.checked(batch, cfg) for batch in batches),
        path,
        belongs_to={
            "config": fold.config_digest(cfg),
            "params": fold.params_digest(params),
            "provenance": given,
        },
        save_every=save_every,
        on_batch=on_batch,
    )
    return finish(
        state, cfg, aggregate=aggregate, experts=experts, provenance=given | seen
    )


def init(cfg: ModelConfig) -> State:
    """The empty state: float32 sums, and int32 counts, good for 2**31 tokens.

    Per tap and place, `sum` adds |a| over tokens, and `square` adds over rows the
    square of its mean over the row's tokens. `embed` has one place more than there
    are blocks: the final norm.
    """

    def zeros(dims, i, dtype=jnp.float32):
        return jnp.zeros([_entry(getattr(cfg, dim), i) for dim in dims], dtype)

    sums = {
        tap: tuple(zeros(dims, i) for i in range(len(_places(cfg, tap))))
        for tap, dims in TAPS.items()
    }
    blocks = range(len(blocks_with(cfg.pattern, "experts")))
    return {
        "sum": sums,
        "square": sums,
        "mass": tuple(zeros(["experts"], i) for i in blocks),
        "routed": tuple(zeros(["experts"], i, jnp.int32) for i in blocks),
        "sequences": jnp.zeros((), jnp.int32),
        "tokens": jnp.zeros((), jnp.int32),
    }


def add(state: State, params, batch: fold.Batch, cfg: ModelConfig) -> State:
    """The state after one more batch; compiled once per shape of batch.

    Args:
      batch: as of `fold.checked`; tokens that are not `valid` enter no score.

    Raises:
      ValueError: with everything that is wrong with the batch.
    """
    return _add(state, params, fold.checked(batch, cfg), cfg)


def finish(
    state: State,
    cfg: ModelConfig,
    *,
    aggregate: str = "mean_l2",
    experts: str = "reap",
    provenance: Mapping[str, Any] | None = None,
) -> Scores:
    """Reads the sums as scores.

    Args:
      aggregate: "mean_l2" takes the mean of |a| over each sequence, then the L2 norm
        over sequences; "sum" adds |a| over all tokens.
      experts: the metric of the `experts` axis.
      provenance: description or digest of the data, in plain values; the config's
        digest, counts and choices are added to it.

    Raises:
      ValueError: unknown options, no token seen, or activations that are not finite.
    """
    _check_options(aggregate, experts)
    state = jax.device_get(state)
    _check_sums(state, cfg)
    activity = state["sum"]
    if aggregate == "mean_l2":
        activity = jax.tree.map(np.sqrt, state["square"])
    by_axis = _read_widths(activity)
    metrics = _expert_metrics(state["mass"], state["routed"])
    if cfg.topk_group == cfg.n_group:
        by_axis["experts"] = metrics[experts]
    by_axis, metrics = jax.tree.map(
        lambda score: jnp.asarray(score, jnp.float32), (by_axis, metrics)
    )

    given = dict(provenance or {})
    record = {
        "config": fold.config_digest(cfg),
        "sequences": int(state["sequences"]),
        "tokens": int(state["tokens"]),
        "aggregate": aggregate,
        "experts": experts,
        "gates": "renormalised to sum to 1 over the chosen experts",
    }
    if taken := sorted(record.keys() & given.keys()):
        raise ValueError(f"provenance: {taken} are filled in here; use other names")
    return Scores(
        by_axis={axis: by_axis[axis] for axis in AXES if len(by_axis.get(axis, ()))},
        expert_metrics=metrics,
        record=to_json(given | record),
    )


def depth_importance(
    params,
    batches: Iterable[fold.Batch],
    cfg: ModelConfig,
    *,
    on_step: Callable[[int, float], None] | None = None,
) -> Float[Array, " l"]:
    """Scores of whole blocks: the order in which greedy removal takes them out.

    Each step removes the block without which, and without those already gone, the
    logits change least: sum (M_full - M)^2 / sum M_full^2 (arXiv 2511.16664). About
    l^2 / 2 forward passes over all batches: a handful of batches will do.

    Args:
      batches: as of `add`; all are held, and read in every step.
      on_step: called with the block removed and the normalised error without it.

    Returns:
      0 for the block removed first, up to l - 1 for the last; `keep_layers(
      rank({"layers": scores}), n)` keeps the n best.
    """
    batches = [fold.checked(batch, cfg) for batch in batches]
    gram = _gram(params, cfg)
    everything = np.ones(cfg.layers, np.float32)
    keep, order = everything.copy(), []
    while len(order) < cfg.layers:
        left = np.flatnonzero(keep)
        error, power = np.zeros(len(left)), 0.0
        for batch in batches:
            full = _hidden(params, batch, everything, cfg)
            power += float(_squares(full, batch, gram))
            for at, block in enumerate(left):
                without = np.where(np.arange(cfg.layers) == block, 0, keep)
                change = full - _hidden(params, batch, without, cfg)
                error[at] += float(_squares(change, batch, gram))
        if not (np.isfinite(error).all() and 0 < power < np.inf):
            raise ValueError(
                "depth_importance: no batch, or logits that are all zero or not finite"
            )
        order.append(int(left[np.argmin(error)]))
        keep[order[-1]] = 0
        if on_step is not None:
            on_step(order[-1], float(error.min() / power))
    return jnp.argsort(jnp.asarray(order)).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="cfg")
def _add(state: State, params, batch: Mapping[str, Array], cfg: ModelConfig) -> State:
    seen = {}

    def tap(layer, name, value):
        seen[layer, name] = value

    _forward(params, batch, cfg, tap=tap)
    valid = fold.valid_tokens(batch)
    tokens = jnp.sum(valid, axis=1)

    def row_sums(tap, place):
        value = jnp.abs(seen[place, tap].astype(jnp.float32))
        if tap == "expert_ffn":
            # A product, not a scatter: its order, and so its rounding, is fixed.
            chosen = _chosen(seen[place, "experts"][0], valid, cfg, place)
            return _einsum("btce,btcf->bef", chosen, value)
        return jnp.sum(value, axis=1, where=_over(valid, value), initial=0.0)

    def squared_means(total):
        return jnp.sum((total / _over(jnp.maximum(tokens, 1), total)) ** 2, axis=0)

    rows = {tap: tuple(row_sums(tap, i) for i in _places(cfg, tap)) for tap in TAPS}
    routed, mass = [], []
    for block in blocks_with(cfg.pattern, "experts"):
        experts, gates, output = seen[block, "experts"]
        chosen = _chosen(experts, valid, cfg, block)
        loudness = gates.astype(jnp.float32) * _l2(output.astype(jnp.float32), -1)
        routed.append(jnp.sum(chosen, axis=(0, 1, 2), dtype=jnp.int32))
        mass.append(_einsum("btce,btc->e", chosen, loudness))
    new = {
        "sum": jax.tree.map(lambda total: jnp.sum(total, axis=0), rows),
        "square": jax.tree.map(squared_means, rows),
        "mass": tuple(mass),
        "routed": tuple(routed),
        "sequences": jnp.sum(tokens > 0, dtype=jnp.int32),
        "tokens": jnp.sum(tokens, dtype=jnp.int32),
    }
    return jax.tree.map(jnp.add, state, new)


def _read_widths(activity: Mapping[str, tuple[np.ndarray, ...]]) -> dict[str, Any]:
    """Every axis but `experts`, from the aggregated activations of every tap."""
    states = zip(activity["ssm_B"], activity["ssm_state"], strict=True)
    heads = activity["heads_per_group"]
    return {
        "expert_ffn": activity["expert_ffn"],
        "shared_ffn": activity["shared_ffn"],
        "ffn": activity["ffn"],
        "q_per_kv": tuple(_l2(y, -1) for y in activity["q_per_kv"]),
        "ssm_head_dim": tuple(_l2(y, (0, 1)) for y in heads),
        "ssm_state": tuple(_l2(B, 0) * _l2(C, 0) for B, C in states),
        "heads_per_group": tuple(_head_scores(y) for y in heads),
        "embed": sum(activity["embed"]),
    }


def _head_scores(x: Float[np.ndarray, "g r p"]) -> Float[np.ndarray, "g r"]:
    """L2 over the better half of the channels: those that submodels keep longest."""
    best = np.argsort(-_l2(x, (0, 1)), stable=True)
    return _l2(x[..., best[: -(-x.shape[-1] // 2)]], -1)


def _expert_metrics(mass, routed) -> dict[str, tuple[np.ndarray, ...]]:
    pairs = list(zip(mass, routed, strict=True))
    return {
        "reap": tuple(m / np.maximum(n, 1) for m, n in pairs),
        "mass": mass,
        "frequency": tuple(n / max(n.sum(), 1) for _, n in pairs),
    }


def _forward(params, batch, cfg: ModelConfig, **options) -> Float[Array, "b t d"]:
    context = fold.context(batch)
    return hidden_states(params, batch["tokens"], cfg, **context, **options)


@functools.partial(jax.jit, static_argnames="cfg")
def _hidden(params, batch, layers: Float[Array, " l"], cfg) -> Float[Array, "b t d"]:
    return _forward(params, batch, cfg, masks={"layers": layers}).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="cfg")
def _gram(params, cfg: ModelConfig) -> Float[Array, "d d"]:
    """W W^T of the head: |x W|^2 = x W W^T x^T, so that no logits are ever whole."""
    identity = jnp.eye(cfg.embed, dtype=params["embedding"].dtype)
    head = logits(params, identity).astype(jnp.float32)
    return _einsum("dv,ev->de", head, head)


@jax.jit
def _squares(x: Float[Array, "b t d"], batch, gram: Float[Array, "d d"]):
    """Squares of the logits of `x`, summed over valid tokens in float32."""
    squares = jnp.sum(x * _einsum("btd,de->bte", x, gram), axis=-1)
    return jnp.sum(squares, where=fold.valid_tokens(batch), initial=0.0)


def _chosen(experts, valid, cfg: ModelConfig, block: int) -> Float[Array, "b t c e"]:
    """1 where the choice of a valid token is an expert."""
    size = _entry(cfg.experts, blocks_with(cfg.pattern, "experts").index(block))
    return jax.nn.one_hot(experts, size, dtype=jnp.float32) * valid[..., None, None]


def _places(cfg: ModelConfig, tap: str) -> tuple[int, ...]:
    """The layers that call a tap; the final norm stands behind the last block."""
    if tap == "embed":
        return tuple(range(cfg.layers + 1))
    return blocks_with(cfg.pattern, next(dim for dim in TAPS[tap] if dim in AXES))


def _entry(size: int | tuple[int, ...], i: int) -> int:
    return size[i] if isinstance(size, tuple) else size


def _over(a: Array, like: Array) -> Array:
    """`a` with trailing dimensions of size 1, as many dimensions as `like`."""
    return a.reshape(a.shape + (1,) * (like.ndim - a.ndim))


def _l2(x, axis):
    """The L2 norm over `axis`, of NumPy and JAX arrays alike."""
    return (x * x).sum(axis=axis) ** 0.5


def _check_options(aggregate: str, experts: str) -> None:
    problems = [
        f"{name}: unknown {value!r}{did_you_mean(value, known)}"
        for name, value, known in (
            ("aggregate", aggregate, AGGREGATES),
            ("experts", experts, EXPERT_METRICS),
        )
        if value not in known
    ]
    if problems:
        raise ValueError("importance: " + "; ".join(problems))


def _check_sums(state: State, cfg: ModelConfig) -> None:
    if not int(state["tokens"]):
        raise ValueError("importance: no valid token seen; give at least one batch")
    bad = [
        f"{tap} in layer {place}"
        for tap in TAPS
        for place, a in zip(_places(cfg, tap), state["square"][tap], strict=True)
        if not np.isfinite(a).all()
    ]
    if bad:
        raise ValueError(
            f"importance: activations are not finite: {', '.join(bad)}; look at the "
            "parameters before the first of them"
        )
