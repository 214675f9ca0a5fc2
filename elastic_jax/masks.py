"""Budget masks: one float per unit of an axis, and the one place that applies them.

*Mask on write, count on norm*: each axis has one point in the network where its
activations are multiplied; a norm divides by the number of live channels, not by
the width. Masks act on activations, never on weights.

A mask leaf has shape [size], or [b, t, size] to vary along time. An axis that is
absent, or None, is full.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from elastic_jax.axes import AXES, Counts, Size, blocks_with

# Axis -> leaf for the whole model, or a tuple with a leaf per block with the axis.
BudgetMasks = Mapping[str, Array | tuple[Array, ...]]
LayerMasks = Mapping[str, Array]


def masks_from_counts(cfg: Any, counts: Counts | None = None) -> BudgetMasks:
    """Hard prefix masks, float32, 1 for the first `n` units of each counted axis.

    Args:
      cfg: the ModelConfig that `counts` were made for.
      counts: kept units; axes that are absent stay full and get no mask.

    Returns:
      axis -> [size], or a tuple of these where counts or sizes differ per block;
      `layers` -> [number of blocks].
    """
    masks = {}
    for axis, kept in (counts or {}).items():
        size = getattr(cfg, axis)
        if axis == "layers":
            masks[axis] = jnp.asarray(kept, jnp.float32)
        elif isinstance(kept, tuple) or isinstance(size, tuple):
            blocks = len(blocks_with(cfg.pattern, axis))
            pairs = zip(_each(kept, blocks), _each(size, blocks), strict=True)
            masks[axis] = tuple(prefix_mask(n, full) for n, full in pairs)
        else:
            masks[axis] = prefix_mask(kept, size)
    return masks


def prefix_mask(kept: int, size: int) -> Float[Array, " size"]:
    """1 for the first `kept` of `size` units, 0 for the rest."""
    return (jnp.arange(size) < kept).astype(jnp.float32)


def stacked_masks(cfg: Any, budgets: Sequence[Counts]) -> BudgetMasks:
    """Hard masks of several submodels in one tree, for `switched` to choose from.

    Args:
      cfg: the ModelConfig that all counts were made for.

    Returns:
      masks as of `masks_from_counts` with a leading dimension, one entry per
      submodel. An axis that none of them counts gets no mask.
    """
    spelled = [{} for _ in budgets]
    for axis in dict.fromkeys(axis for counts in budgets for axis in counts):
        size = (1,) * cfg.layers if axis == "layers" else getattr(cfg, axis)
        kept = [counts.get(axis, size) for counts in budgets]
        if any(isinstance(n, tuple) for n in kept):  # per block in one is so in all
            blocks = len(blocks_with(cfg.pattern, axis))
            kept = [_each(n, blocks) for n in kept]
        for counts, n in zip(spelled, kept, strict=True):
            counts[axis] = n
    each = [masks_from_counts(cfg, counts) for counts in spelled]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def switched(
    stacked: BudgetMasks, first: Any, second: Any, later: Bool[Array, "b t"]
) -> BudgetMasks:
    """Masks that change along time, of two submodels chosen from `stacked_masks`.

    Args:
      first, second: their places, traced or not.
      later: where the second submodel reads; the first reads all else.

    Returns:
      leaves [b, t, size].
    """
    later = later[..., None]
    return jax.tree.map(lambda m: jnp.where(later, m[second], m[first]), stacked)


def layer_masks(masks: BudgetMasks | None, pattern: str, layer: int) -> LayerMasks:
    """The masks that block `layer` sees: `embed` and the axes it has."""
    seen = {}
    for axis, mask in (masks or {}).items():
        if axis == "layers" or mask is None:
            continue
        if isinstance(mask, tuple):
            blocks = blocks_with(pattern, axis)
            if layer in blocks:
                seen[axis] = mask[blocks.index(layer)]
        elif not AXES[axis].blocks or pattern[layer] in AXES[axis].blocks:
            seen[axis] = mask
    return seen


def elastic(
    value: Array,
    masks: LayerMasks,
    axis: str,
    *,
    dim: int,
    tap: Callable[[str, Array], None] | None = None,
) -> Array:
    """Multiplies `value` by the mask of `axis` along `dim`: the axis's mask point.

    `tap(axis, value)` sees the value before the mask.
    """
    if tap is not None:
        tap(axis, value)
    mask = masks.get(axis)
    if mask is None:
        return value
    return value * _spread(mask, value, axis, dim).astype(value.dtype)


def written(value: Array, masks: LayerMasks, axis: str, *, dim: int) -> Array:
    """`value` where the mask is not zero: what the submodel itself would have stored.

    State outlives the mask under which it was written, so what goes into it is
    selected, and the soft factor is left to the mask point at the read.
    """
    mask = masks.get(axis)
    if mask is None:
        return value
    return jnp.where(_spread(mask, value, axis, dim) > 0, value, 0)


def live(masks: LayerMasks, axis: str, size: int) -> Float[Array, "..."] | int:
    """How many units of `axis` are live: an int, or sum(mask) of shape [] or [b, t]."""
    mask = masks.get(axis)
    return size if mask is None else jnp.sum(mask, -1)


def extent(masks: LayerMasks, axis: str) -> Int[Array, ""] | None:
    """How many leading units of `axis` may matter; None is all, known while tracing.

    For kernels, which skip what lies behind. A mask that is being differentiated gets
    its whole width: it learns from units that it switches off as well.
    """
    mask = masks.get(axis)
    return None if mask is None else _last_live(mask)


@jax.custom_vjp
def _last_live(mask: Float[Array, "*bt size"]) -> Int[Array, ""]:
    places = jnp.arange(1, mask.shape[-1] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(mask != 0, places, 1))


def _last_live_forward(mask):
    whole = jnp.int32(mask.value.shape[-1])
    return (whole if mask.perturbed else _last_live(mask.value)), ()


_last_live.defvjp(_last_live_forward, lambda _, count: (None,), symbolic_zeros=True)


def varies_along_time(masks: LayerMasks) -> bool:
    """Whether any mask has shape [b, t, size]."""
    return any(mask.ndim > 1 for mask in masks.values())


def _each(value: Size, blocks: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * blocks


def _spread(mask: Array, value: Array, axis: str, dim: int) -> Array:
    """`mask` shaped to broadcast against `value`, its last dimension at `dim`."""
    if mask.shape[-1] != value.shape[dim]:
        raise ValueError(
            f"the mask of {axis} has {mask.shape[-1]} entries for {value.shape[dim]} "
            "units; make masks with masks_from_counts(cfg, counts) of the same cfg"
        )
    shape = [1] * value.ndim
    shape[dim] = mask.shape[-1]
    if mask.ndim > 1:
        shape[:2] = mask.shape[:2]
    return mask.reshape(shape)
