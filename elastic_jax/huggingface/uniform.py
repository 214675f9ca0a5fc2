"""Widths that differ between blocks, filled up with zeros until they do not.

Formats that give every block of a kind one width can hold a heterogeneous submodel only
so. Zeros are exact where a unit's output is multiplied by weights that are zero too:
neurons of MLPs and experts, query heads, and experts that no token may choose. The norm
inside a Mamba block counts its channels, so there zeros would change the result.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from elastic_jax import axes
from elastic_jax.axes import AXES
from elastic_jax.config import ModelConfig
from elastic_jax.lazy import LazyArray, lazy
from elastic_jax.model import param_specs
from elastic_jax.parts import SCALES, Part, parts
from elastic_kernels import QuantArray

EXACT = ("expert_ffn", "experts", "shared_ffn", "ffn", "q_per_kv")
MASKED_BIAS = -1e9  # on a sigmoid plus this, no expert is ever among the top


def uniform(
    params: Any, cfg: ModelConfig, *, pad: bool = False
) -> tuple[Any, ModelConfig]:
    """A model whose blocks of one kind have one width, equal to the given one.

    Args:
      params: a tree of arrays or of `LazyArray`; padded as it is read. Zeros of
        quantized weights have scales of 1.
      pad: fill narrower blocks with zeros; off, widths that differ are refused.

    Returns:
      the tree, lazy where it was padded, and its configuration.

    Raises:
      ValueError: widths that differ, if `pad` is off or zeros would not be exact.
    """
    sizes = {axis: getattr(cfg, axis) for axis in AXES if axis != "layers"}
    differ = {
        axis: n for axis, n in sizes.items() if isinstance(n, tuple) and len({*n}) > 1
    }
    stuck = [axis for axis in differ if axis not in EXACT]
    problems = [
        f"{axis} differs between blocks, {list(n)}: "
        + (
            "the norm inside a Mamba block counts channels, so zeros would change the "
            "result; cut all blocks alike"
            if axis in stuck
            else "this format has one width for all; cut all blocks alike, or fill up "
            "with zeros (`pad_to_uniform`, --uniform)"
        )
        for axis, n in differ.items()
        if axis in stuck or not pad
    ]
    if problems:
        raise ValueError("this model cannot be written:\n  " + "\n  ".join(problems))
    largest = {axis: max(n) for axis, n in sizes.items() if isinstance(n, tuple) and n}
    if "experts" in differ:
        # Groups do not matter where all are kept, and the new number may not divide.
        largest |= {"n_group": 1, "topk_group": 1}
    wide = dataclasses.replace(cfg, **largest)
    if not differ:
        return params, wide
    specs, wide_specs = param_specs(cfg), param_specs(wide)

    def padded(path, spec, leaf):
        shape = axes.shape(wide, wide_specs, path, spec)
        if tuple(leaf.shape) == shape:
            return leaf
        if isinstance(leaf, QuantArray):
            return _packed(leaf, parts(spec, shape, leaf.format))
        fill = MASKED_BIAS if path[-1] == "router_bias" else 0
        return _filled(lazy(leaf), shape, fill)

    return axes.map_specs(padded, specs, params), wide


def _packed(leaf: QuantArray, wanted: Mapping[str, Part]) -> QuantArray:
    """A quantized weight, its parts filled up to the wanted shapes."""
    held = {name: getattr(leaf, name) for name in wanted}
    return dataclasses.replace(
        leaf,
        **{
            name: _filled(lazy(part), wanted[name].shape, 1 if name in SCALES else 0)
            for name, part in held.items()
            if part is not None
        },
    )


def _filled(leaf: LazyArray, shape: tuple[int, ...], fill: float) -> LazyArray:
    def grown(value: np.ndarray) -> np.ndarray:
        whole = np.full(shape, fill, value.dtype)
        whole[tuple(map(slice, value.shape))] = value
        return whole

    return leaf.derived(shape, grown)
