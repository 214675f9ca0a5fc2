"""Calibration: how large the activations are that each weight meets.

    b batch   t time   m tokens, b and t together   c choices (top_k)   e experts

A pass over calibration batches in which every weight that enters a product tells what
it met (`elastic_kernels.Observed`). Whatever recipe quantizes afterwards, its input
scales come out of the same pass: the largest magnitude fits the largest number of the
format (max calibration, as in the published recipes).

A submodel inherits the scales of its parent, and meets activations of its own: a norm
over fewer channels passes on larger ones. So budgets join the pass, under their masks.
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from elastic_jax import axes, fold
from elastic_jax.axes import Counts, ParamSpec, ParamSpecs, Path
from elastic_jax.config import ModelConfig
from elastic_jax.masks import BudgetMasks, stacked_masks
from elastic_jax.model import hidden_states, logits, param_specs
from elastic_jax.quantize import meets_activations
from elastic_kernels import Observed

State = dict[str, Any]


@dataclass(frozen=True)
class InputStatistics:
    """What weights met in a pass over data.

    Attributes:
      largest: path of a parameter -> the largest magnitude of its inputs, float32; for
        each expert of a stack. `quantize(..., input_largest=)` takes it.
      met: path -> how many tokens a weight met, under any budget, alike.
      provenance: config, data and counts, in plain values.
    """

    largest: Mapping[Path, np.ndarray]
    met: Mapping[Path, np.ndarray]
    provenance: Mapping[str, Any]

    @property
    def never_met(self) -> dict[Path, tuple[int, ...]]:
        """Path -> the experts that no token reached: their scales are borrowed."""
        return {
            path: tuple(np.flatnonzero(counts == 0).tolist())
            for path, counts in self.met.items()
            if np.ndim(counts) and not counts.all()
        }


def input_statistics(
    params,
    batches: Iterable[fold.Batch],
    cfg: ModelConfig,
    *,
    path: str | os.PathLike,
    budgets: Sequence[Counts] = (),
    save_every: int = 16,
    provenance: Mapping[str, Any] | None = None,
    on_batch: Callable[[State], None] | None = None,
) -> InputStatistics:
    """Runs `batches` through the parent, and through every one of `budgets`.

    The pass keeps its state in a file and continues where it was stopped. Give the same
    batches from the start: those seen are checked, not computed.

    Args:
      params: the parent, in importance order, not quantized.
      batches: as of `fold.checked`; tokens that are not valid count for nothing.
      path: one `.npz` file, replaced atomically every `save_every` batches.
      provenance: plain values about the data; others than the file's are refused.
      on_batch: called with the state after every computed batch.

    Raises:
      ValueError: as of `fold.checked` and `fold.resume`: batches that do not fit, a
        file of another pass, or activations that are not finite; no token at all.
    """
    specs = param_specs(cfg)
    # The parent is a budget too: one executable serves them all.
    kept = (Counts({}), *budgets)
    stacked = stacked_masks(cfg, kept)
    masks = [jax.tree.map(lambda mask, i=i: mask[i], stacked) for i in range(len(kept))]

    def step(state: State, batch: Mapping[str, np.ndarray]) -> State:
        for mask in masks:
            state = _add(state, params, batch, mask, cfg)
        return state

    given = dict(provenance or {})
    about = {
        "config": fold.config_digest(cfg),
        "params": fold.params_digest(params),
        "budgets": [dict(counts) for counts in budgets],
    }
    state, seen = fold.resume(
        step,
        _empty(specs, cfg),
        (fold.checked(batch, cfg) for batch in batches),
        path,
        belongs_to=about | {"provenance": given},
        save_every=save_every,
        on_batch=on_batch,
    )
    if not seen["batches"] or not int(state["tokens"]):
        raise ValueError("input_statistics: no valid token; give at least one batch")
    state = jax.device_get(state)
    paths = _paths(specs)
    return InputStatistics(
        largest={path: axes.leaf(state["largest"], path) for path in paths},
        met={path: axes.leaf(state["met"], path) for path in paths},
        provenance=given | about | seen | {"tokens": int(state["tokens"])},
    )


@functools.cache
def _paths(specs: ParamSpecs) -> tuple[Path, ...]:
    return tuple(path for path, spec in specs if meets_activations(spec))


def _empty(specs: ParamSpecs, cfg: ModelConfig) -> State:
    """Nothing met: magnitudes in float32, tokens in int32, good for 2**31."""

    def zeros(dtype):
        return axes.nest(
            {
                path: jnp.zeros(_stack_shape(path, spec, specs, cfg), dtype)
                for path, spec in specs
                if meets_activations(spec)
            }
        )

    return {
        "largest": zeros(jnp.float32),
        "met": zeros(jnp.int32),
        "tokens": jnp.zeros((), jnp.int32),
    }


def _stack_shape(
    path: Path, spec: ParamSpec, specs: ParamSpecs, cfg: ModelConfig
) -> tuple[int, ...]:
    """One entry per member of a stack: (experts,), or () for a weight that is alone."""
    sizes = (axes.entry(specs, path, dim, getattr(cfg, dim)) for dim in spec.batch)
    return tuple(sizes)


@functools.partial(jax.jit, static_argnames="cfg")
def _add(
    state: State, params, batch: Mapping[str, Array], masks: BudgetMasks, cfg
) -> State:
    """The state after a batch under the masks of one budget."""
    specs = param_specs(cfg)
    valid = fold.valid_tokens(batch)
    seen: dict[Path, tuple[Array, Array]] = {}

    def watched(path, spec, weight):
        if not meets_activations(spec):
            return weight
        size = _stack_shape(path, spec, specs, cfg)
        see = functools.partial(_met, seen, path, size, valid)
        return Observed(weight, see)

    context = fold.context(batch)
    observed = axes.map_specs(watched, specs, params)
    # A tap makes the experts' hidden activations visible.
    hidden = hidden_states(
        observed, batch["tokens"], cfg, masks=masks, tap=lambda *_: None, **context
    )
    logits(observed, hidden)

    kept = masks.get("layers")
    largest, met = {}, {}
    for path in _paths(specs):
        most, tokens = seen[path]
        if kept is not None and path[0] == "layers":  # the budget has no such block
            most, tokens = (jnp.where(kept[path[1]] > 0, x, 0) for x in (most, tokens))
        largest[path] = jnp.maximum(axes.leaf(state["largest"], path), most)
        met[path] = axes.leaf(state["met"], path) + tokens
    return {
        "largest": axes.nest(largest),
        "met": axes.nest(met),
        "tokens": state["tokens"] + jnp.sum(valid, dtype=jnp.int32),
    }


def _met(seen, path: Path, size: tuple[int, ...], valid, x: Array, experts=None):
    """Notes the largest magnitude of what counts in `x`, and how many tokens that is.

    Args:
      size: () or (e,), the shape of what is noted.
      x: [b, t, ...], or [m, c, d] with the `experts` [m, c] that the rows chose.
    """
    size_of = jnp.abs(x.astype(jnp.float32))
    # A maximum on a CPU passes over NaN; infinity is seen, and refused by the fold.
    size_of = jnp.where(jnp.isfinite(size_of), size_of, jnp.inf)
    if experts is None:
        rows = jnp.max(size_of, axis=tuple(range(2, x.ndim)))
        most, tokens = jnp.max(jnp.where(valid, rows, 0)), jnp.sum(valid)
    else:
        counts = jnp.broadcast_to(valid.reshape(-1, 1), experts.shape)
        rows = jnp.where(counts, jnp.max(size_of, axis=-1), 0)
        most = jnp.zeros(size, jnp.float32).at[experts].max(rows)
        tokens = jnp.zeros(size, jnp.int32).at[experts].add(counts)
    seen[path] = most, tokens.astype(jnp.int32)
