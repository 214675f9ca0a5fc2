"""Submodels as prefixes: rank the units, permute the parent once, then slice.

Scores become ranks, ranks permute the parent into importance order, and from then on
a submodel is `w[:n]` along every dimension that is an axis. Smaller submodels are
prefixes of larger ones, so one set of weights holds them all. The functions here
read dimension names and sizes; none knows what a block computes.

Blocks are chosen by rank and never permuted: depth is the order of computation.
Quantized weights are cut by the same prefixes; their blocks are never cut.
"""

import dataclasses
import numbers
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from elastic_jax import axes
from elastic_jax.axes import AXES, Counts, Path, Size, Spec, blocks_with, layers_with
from elastic_jax.config import ModelConfig, did_you_mean
from elastic_kernels import FakeQuant, QuantArray

# Axis -> array for the model, or a tuple with one array per block that has the axis.
Scores = Mapping[str, Array | tuple[Array, ...]]
Ranks = Mapping[str, Array | tuple[Array, ...]]


def rank(scores: Scores) -> dict[str, Any]:
    """Permutations that put the best unit first, in the structure of `scores`.

    Units are ranked along the last dimension, inside their owners, which are the
    leading ones: `[experts, expert_ffn]` ranks neurons within each expert. Equal
    scores keep their order.

    Raises:
      ValueError: an unknown axis, or a score that is NaN (seen outside `jit` only).
    """
    problems = _unknown(scores)
    for axis, score in scores.items():
        if any(np.isnan(leaf).any() for leaf in _concrete(score)):
            problems.append(f"{axis}: NaN among the scores")
    _refuse("scores", problems)
    return jax.tree.map(
        lambda s: jnp.argsort(-s, axis=-1, stable=True).astype(jnp.int32), dict(scores)
    )


def permute_params(params: Any, specs, ranks: Ranks) -> Any:
    """`params` with the units of every ranked axis in importance order.

    The permuted model computes what the given one does. `layers` is ignored.

    Raises:
      ValueError: an unknown axis, ranks of the wrong shape, quantized parameters, or
        (outside `jit`) ranks that are no permutation.
    """
    problems = _misfits(specs, ranks)
    for axis, orders in ranks.items():
        for order in _concrete(orders):
            if not (np.sort(order, -1) == np.arange(order.shape[-1])).all():
                problems.append(f"{axis}: no permutation: {np.asarray(order)}")
    _refuse("ranks", problems)

    def permuted(path, spec, value):
        for axis in AXES:  # an axis moves before the axes that own it
            if axis in ranks and axis in spec.dims:
                order = axes.entry(specs, path, axis, ranks[axis])
                value = _take(value, path, spec.dims, axis, order)
        return value

    return axes.map_specs(permuted, specs, params)


def slice_params(params: Any, specs, counts: Counts) -> Any:
    """The submodel's parameters: prefixes along every counted axis, kept blocks only.

    Any tree that `specs` describe can be cut, a cache by its cache specs too. Under
    `jit`, `specs` and `counts` are static.

    Raises:
      ValueError: counts that were made for another model, or that would cut a block
        of quantized values.
    """
    _refuse("counts", _misfits(specs, counts))
    cut = {}
    for path, spec in specs:
        where = _renumbered(path, counts)
        if where is not None:
            sizes = {
                dim: axes.entry(specs, path, dim, counts[dim])
                for dim in spec.dims
                if dim in counts
            }
            cut[where] = _prefix(axes.leaf(params, path), path, spec, sizes)
    return axes.nest(cut)


def slice_config(cfg: ModelConfig, counts: Counts) -> ModelConfig:
    """The submodel's configuration.

    Sizes that agree in all blocks become one int, and dropped blocks leave the
    pattern. An axis whose last block is dropped keeps its largest size. Experts that
    were cut are one group: no longer a multiple of `n_group`, and all groups were in
    use before.
    """
    kept, full = resolved(cfg, counts), resolved(cfg)
    on = kept["layers"]
    pattern = "".join(kind for kind, keep in zip(cfg.pattern, on, strict=True) if keep)
    changes: dict[str, Any] = {"pattern": pattern, "embed": kept["embed"][0]}
    for axis in filter(axes.is_per_layer, AXES):
        blocks = blocks_with(cfg.pattern, axis)
        sizes = tuple(n for i, n in zip(blocks, kept[axis], strict=True) if on[i])
        if blocks:
            changes[axis] = _collapsed(axis, sizes or (max(full[axis]),))
    if kept["experts"] != full["experts"]:
        changes |= {"n_group": 1, "topk_group": 1}
    return dataclasses.replace(cfg, **changes)


def counts(cfg: ModelConfig, **kept: Size) -> Counts:
    """Kept units per axis, validated against `cfg`; an axis left out stays full.

    Args:
      cfg: the model to cut; it may itself be a submodel.
      kept: an int, or one int per block that has the axis, in depth order. `layers`
        takes a 0 or 1 for every block (see `keep_layers`).

    Raises:
      ValueError: with every problem, naming axis, layer and what is allowed.
    """
    given = {a: tuple(n) if isinstance(n, list) else n for a, n in kept.items()}
    _refuse("counts", [p for a, n in given.items() for p in _problems(cfg, a, n)])
    entries = {a: n if isinstance(n, tuple) else (n,) for a, n in given.items()}
    return Counts({a: _collapsed(a, tuple(map(int, n))) for a, n in entries.items()})


def full_counts(cfg: ModelConfig) -> Counts:
    """The counts of the whole model, every axis that its pattern has written out."""
    return Counts({a: _collapsed(a, n) for a, n in resolved(cfg).items() if n})


def resolved(cfg: ModelConfig, counts: Counts | None = None) -> dict[str, tuple]:
    """Every axis as a tuple: one count per block that has it, one for `embed`.

    `layers` is a 0 or 1 per block. Entries of dropped blocks stay in their places.
    """
    given = counts or {}
    result = {}
    for axis in AXES:
        if axis == "layers":
            result[axis] = given.get(axis, (1,) * cfg.layers)
            continue
        blocks = len(blocks_with(cfg.pattern, axis)) if axes.is_per_layer(axis) else 1
        size = given.get(axis, getattr(cfg, axis))
        result[axis] = size if isinstance(size, tuple) else (size,) * blocks
    return result


def nested(cfg: ModelConfig, small: Counts, large: Counts) -> bool:
    """Whether `small` is a submodel of `large`: its blocks, and no axis is wider.

    Widths are compared on the blocks that `small` keeps.
    """
    inner, outer = resolved(cfg, small), resolved(cfg, large)
    on = inner["layers"]
    for axis in AXES:
        pairs = list(zip(inner[axis], outer[axis], strict=True))
        if axes.is_per_layer(axis):
            blocks = blocks_with(cfg.pattern, axis)
            pairs = [pair for i, pair in zip(blocks, pairs, strict=True) if on[i]]
        if any(n > m for n, m in pairs):
            return False
    return True


def resized(tree: Any, like: Any) -> Any:
    """Every array cut to a prefix, or extended by zeros, to the shape of its like.

    A cache that a slice wrote, extended, is the one that its masked parent writes.
    """

    def fit(array, target):
        cut = array[tuple(map(slice, target.shape))]
        more = [(0, n - m) for n, m in zip(target.shape, cut.shape, strict=True)]
        return cut.padded(more) if isinstance(cut, QuantArray) else jnp.pad(cut, more)

    is_leaf = lambda leaf: isinstance(leaf, QuantArray)
    return jax.tree.map(fit, tree, like, is_leaf=is_leaf)


def within(cfg: ModelConfig, small: Counts, large: Counts) -> Counts:
    """The counts that cut `small` out of `large`, a submodel that it is nested in."""
    inner, outer = resolved(cfg, small), resolved(cfg, large)
    cut, given = slice_config(cfg, large), {}
    for axis in small:
        on = [bool(n) for n in outer["layers"]]
        if axis == "layers":
            kept = tuple(n for n, keep in zip(inner[axis], on, strict=True) if keep)
        elif axes.is_per_layer(axis):
            blocks = blocks_with(cfg.pattern, axis)
            # A block that `small` drops keeps what it has: the count is not used.
            kept = tuple(
                n if inner["layers"][i] else m
                for i, n, m in zip(blocks, inner[axis], outer[axis], strict=True)
                if on[i]
            )
        else:
            (kept,) = inner[axis]
        if kept != ():
            same = isinstance(kept, tuple) and axis != "layers" and len({*kept}) == 1
            given[axis] = kept[0] if same else kept
    return counts(cut, **given)


def keep_layers(ranks: Ranks | Array, n: int) -> tuple[int, ...]:
    """The `layers` counts that keep the `n` best blocks, a 0 or 1 per block.

    Args:
      ranks: block indices, best first, or a mapping that holds them as `layers`.
    """
    order = np.asarray(ranks["layers"] if isinstance(ranks, Mapping) else ranks)
    if sorted(order.tolist()) != list(range(len(order))):
        raise ValueError(f"keep_layers: ranks are no permutation: {order.tolist()}")
    if not _is_count(n) or not 1 <= n <= len(order):
        raise ValueError(f"keep_layers: expected 1 to {len(order)} blocks, got {n!r}")
    best = set(order[:n].tolist())
    return tuple(int(i in best) for i in range(len(order)))


def _take(value, path: Path, dims: tuple[str, ...], axis: str, order: Array):
    """`value` reordered along `axis`, inside each of its owners."""
    if isinstance(value, QuantArray | FakeQuant):
        raise ValueError(
            f"{'/'.join(map(str, path))} is quantized: a block would be torn apart "
            "along what it was scaled by; permute first, then quantize"
        )
    over = [dims.index(dim) for dim in (*AXES[axis].owners, axis)]
    expected = tuple(value.shape[i] for i in over)
    if order.shape != expected:
        raise ValueError(
            f"ranks of {axis} have shape {order.shape}, expected {expected} for "
            f"{'/'.join(map(str, path))}"
        )
    others = tuple(i for i in range(len(dims)) if i not in over)
    return jnp.take_along_axis(value, jnp.expand_dims(order, others), over[-1])


def _prefix(value, path: Path, spec: Spec, sizes: Mapping[str, int]):
    """The first `sizes[dim]` entries of every counted dimension."""
    blocked = isinstance(value, QuantArray | FakeQuant)
    steps = value.steps if blocked else (1,) * len(value.shape)
    for dim, full, step in zip(spec.dims, value.shape, steps, strict=True):
        if sizes.get(dim, 0) > full:
            raise ValueError(
                f"{'/'.join(map(str, path))}: {sizes[dim]} of {dim} asked, {full} held"
            )
        if sizes.get(dim, 0) % step:
            raise ValueError(
                f"{'/'.join(map(str, path))}: {sizes[dim]} of {dim} would cut a block "
                f"of {step} quantized values; make counts with elastic_jax.counts"
            )
    return value[tuple(slice(sizes.get(dim)) for dim in spec.dims)] if sizes else value


def _renumbered(path: Path, counts: Counts) -> Path | None:
    """`path` in the submodel; None if its block is dropped."""
    if path[0] != "layers" or "layers" not in counts:
        return path
    on = counts["layers"]
    return ("layers", sum(on[: path[1]]), *path[2:]) if on[path[1]] else None


def _collapsed(axis: str, sizes: tuple[int, ...]) -> Size:
    """One int where all blocks agree."""
    return sizes[0] if axis != "layers" and len(set(sizes)) == 1 else sizes


def _is_count(n: Any) -> bool:
    return isinstance(n, numbers.Integral) and not isinstance(n, bool)


def _concrete(tree: Any) -> list[Array]:
    """The leaves whose values can be looked at."""
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf in leaves if not isinstance(leaf, jax.core.Tracer)]


def _refuse(what: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{what} do not fit:\n  " + "\n  ".join(problems))


def _unknown(given: Iterable[str]) -> list[str]:
    return [
        f"unknown axis {axis!r}{did_you_mean(axis, AXES)}"
        for axis in given
        if axis not in AXES
    ]


def _misfits(specs, given: Mapping[str, Any]) -> list[str]:
    """Unknown axes, and tuples with too many or too few blocks for `specs`."""
    problems = _unknown(given)
    for axis, entries in given.items():
        blocks = len(layers_with(specs, axis))
        deepest = max((p[1] for p, _ in specs if p[0] == "layers"), default=-1)
        if axis == "layers" and len(entries) <= deepest:
            problems.append(f"layers: {len(entries)} entries, no block {deepest}")
        if blocks and isinstance(entries, tuple) and len(entries) != blocks:
            problems.append(
                f"{axis}: {len(entries)} entries for {blocks} blocks that have it"
            )
    return problems


def _problems(cfg: ModelConfig, axis: str, given: Any) -> Iterator[str]:
    """Every reason why `given` cannot be the counts of `axis`."""
    if axis not in AXES:
        yield from _unknown([axis])
        return
    if axis == "layers":
        yield from _layer_problems(cfg, given)
        return

    blocks = blocks_with(cfg.pattern, axis)
    per_block = isinstance(given, tuple)
    if axes.is_per_layer(axis) and not blocks:
        yield f"{axis}: no block of {cfg.pattern!r} has this axis; leave it out"
        return
    if per_block and not axes.is_per_layer(axis):
        yield f"{axis}: one choice for the whole model, expected an int, got {given}"
        return
    if per_block and len(given) != len(blocks):
        yield (
            f"{axis}: {len(given)} counts for the {len(blocks)} blocks that have it, "
            f"layers {', '.join(map(str, blocks))}"
        )
        return

    sizes = resolved(cfg)[axis]
    each = given if per_block else (given,) * len(sizes)
    if axis == "experts" and cfg.topk_group < cfg.n_group and each != sizes:
        yield (
            f"experts: not elastic while topk_group {cfg.topk_group} < n_group "
            f"{cfg.n_group}, where a token uses only some groups; leave it out"
        )
        return
    names = [f"{axis} in layer {i}" for i in blocks] or [axis]
    if not per_block and len(set(sizes)) == 1:  # one complaint for all blocks
        names, each, sizes = [axis], each[:1], sizes[:1]
    for name, n, size in zip(names, each, sizes, strict=True):
        # The full size is always allowed, also where it is no multiple of the step.
        step = AXES[axis].step
        smaller = range(cfg.top_k if axis == "experts" else step, size, step)
        if not _is_count(n):
            yield f"{name}: expected an int, got {n!r}"
        elif n != size and n not in smaller:
            yield f"{name}: {n} is none of {_listed(smaller, size)}"


def _layer_problems(cfg: ModelConfig, given: Any) -> Iterator[str]:
    if not isinstance(given, tuple) or len(given) != cfg.layers:
        yield (
            f"layers: expected a 0 or 1 for each of the {cfg.layers} blocks, got "
            f"{given!r}; keep_layers(ranks, n) makes them"
        )
    elif not all(_is_count(n) and n in (0, 1) for n in given):
        yield f"layers: entries are 0 or 1, got {given}"
    elif not any(given):
        yield "layers: at least one block must stay"


def _listed(smaller: range, size: int) -> str:
    few = smaller if len(smaller) < 8 else [*smaller[:3], "...", smaller[-1]]
    return ", ".join(map(str, [*few, size]))
