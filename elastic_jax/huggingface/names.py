"""How Hugging Face names the tensors of Nemotron-H: one table, and one loop each way.

A tensor there is one or several parameters here. Theirs have produced dimensions first,
both sides flattened, and several parameters are stacked along the rows; that is all
the loop does, and the arrows of the parameters say the rest. Everything is lazy: a
tensor is read when its parameter is, a parameter when its tensors are written.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic_jax import axes
from elastic_jax.axes import ParamSpec, Path
from elastic_jax.config import ModelConfig
from elastic_jax.huggingface.shards import LARGEST_TENSOR_COUNT, short
from elastic_jax.lazy import LastRead, LazyArray
from elastic_jax.model import param_specs

# Kind of block -> their tensor -> our parameters, stacked along its rows.
BLOCKS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "M": {
        "mixer.in_proj.weight": ("z", "x", "B", "C", "dt"),
        "mixer.conv1d.weight": ("conv_x", "conv_B", "conv_C"),
        "mixer.conv1d.bias": ("conv_x_bias", "conv_B_bias", "conv_C_bias"),
        "mixer.dt_bias": ("dt_bias",),
        "mixer.A_log": ("A_log",),
        "mixer.D": ("D",),
        "mixer.norm.weight": ("gate_norm",),
        "mixer.out_proj.weight": ("out",),
    },
    "*": {
        "mixer.q_proj.weight": ("q",),
        "mixer.k_proj.weight": ("k",),
        "mixer.v_proj.weight": ("v",),
        "mixer.o_proj.weight": ("o",),
    },
    "E": {
        "mixer.gate.weight": ("router",),
        "mixer.gate.e_score_correction_bias": ("router_bias",),
        "mixer.experts.{expert}.up_proj.weight": ("up",),
        "mixer.experts.{expert}.down_proj.weight": ("down",),
        "mixer.shared_experts.up_proj.weight": ("shared_up",),
        "mixer.shared_experts.down_proj.weight": ("shared_down",),
    },
    "-": {"mixer.up_proj.weight": ("up",), "mixer.down_proj.weight": ("down",)},
}
ROUTER_BIAS = "router_bias"  # float32 whatever the rest is: it decides near ties


@dataclass(frozen=True)
class Layout:
    """How a directory names its tensors.

    Attributes:
      prefix: `backbone.` on disk, `model.` in the memory of transformers 5.
      stacked: the experts of a block are one tensor.
    """

    prefix: str
    stacked: bool


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs: the parameters that make it, and how.

    Attributes:
      name: of the tensor; `{expert}` is still in it where each expert has one.
      parts: paths of the parameters, stacked along the rows in this order.
      specs: their specs.
      shapes: their shapes.
    """

    name: str
    parts: tuple[Path, ...]
    specs: tuple[ParamSpec, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.name


class Table:
    """All tensors of a model in a layout: what is expected, and both ways across."""

    def __init__(self, cfg: ModelConfig, layout: Layout):
        self.cfg, self.specs = cfg, param_specs(cfg)
        known = dict(self.specs)
        named = {
            f"{layout.prefix}embeddings.weight": (("embedding",),),
            f"{layout.prefix}norm_f.weight": (("final_norm",),),
            "lm_head.weight": (("lm_head",),),
        }
        for i, kind in enumerate(cfg.pattern):
            block = f"{layout.prefix}layers.{i}."
            named[f"{block}norm.weight"] = (("layers", i, "norm"),)
            for name, parts in BLOCKS[kind].items():
                if layout.stacked:
                    name = name.replace("{expert}.", "")
                    if name.startswith("mixer.experts."):
                        name = name.removesuffix(".weight")
                paths = tuple(("layers", i, part) for part in parts)
                named[f"{block}{name}"] = paths
        self.entries = [
            Entry(
                name,
                paths,
                tuple(known[path] for path in paths),
                tuple(axes.shape(cfg, self.specs, p, known[p]) for p in paths),
            )
            for name, paths in named.items()
        ]

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> its shape."""
        found = {}
        for entry in self.entries:
            pairs = zip(entry.specs, entry.shapes, strict=True)
            shapes = [_outer_shape(spec, shape) for spec, shape in pairs]
            if entry.per_expert:
                for expert in range(shapes[0][0]):
                    found[entry.name.format(expert=expert)] = shapes[0][1:]
            else:
                rows = sum(shape[0] for shape in shapes)
                whole = len(shapes) == 1
                found[entry.name] = shapes[0] if whole else (rows, *shapes[0][1:])
        return found

    def misfits(self, tensors: Mapping[str, LazyArray]) -> Iterator[str]:
        """Tensors that are missing, not known, of another shape or no numbers."""
        count = sum(e.shapes[0][0] if e.per_expert else 1 for e in self.entries)
        if count > LARGEST_TENSOR_COUNT:  # before they are named one by one
            yield f"the config asks for {count} tensors; there are {len(tensors)}"
            return
        expected = self.expected()
        for name, shape in expected.items():
            if name not in tensors:
                yield f"{name}: missing, expected shape {list(shape)}"
        for name, tensor in tensors.items():
            if name not in expected:
                yield f"{short(name)}: unexpected; the config has no place for it"
            elif tensor.shape != expected[name]:
                yield (
                    f"{name}: shape {list(tensor.shape)}, expected "
                    f"{list(expected[name])}"
                )
            elif tensor.dtype.name not in ("bfloat16", "float16", "float32", "float64"):
                yield (
                    f"{name}: {tensor.dtype}; quantized weights cannot be taken over, "
                    "start from the BF16 checkpoint"
                )

    def params(self, tensors: Mapping[str, LazyArray]) -> Any:
        """The parameter tree, from tensors that fit."""
        found = {}
        for entry in self.entries:
            if entry.per_expert:
                (path,), (spec,), (shape,) = entry.parts, entry.specs, entry.shapes
                names = (entry.name.format(expert=e) for e in range(shape[0]))
                found[path] = _stacked([tensors[n] for n in names], spec, shape)
                continue
            start, several = 0, len(entry.parts) > 1
            for path, spec, shape in zip(
                entry.parts, entry.specs, entry.shapes, strict=True
            ):
                rows = _outer_shape(spec, shape)[0]
                part = slice(start, start + rows) if several else slice(None)
                found[path] = tensors[entry.name].derived(
                    shape, lambda t, s=spec, n=shape, part=part: _inner(t[part], s, n)
                )
                start += rows
        return axes.map_specs(lambda path, _: found[path], self.specs)

    def tensors(self, params: Any, dtype: Any) -> dict[str, LazyArray]:
        """Every tensor, from a tree of lazy parameters, in the order of the blocks."""
        found, last, expected = {}, LastRead(), self.expected()
        for entry in self.entries:
            leaves = [axes.leaf(params, path) for path in entry.parts]
            kind = _widest(leaves) if dtype is None else np.dtype(dtype)
            if entry.parts[0][-1] == ROUTER_BIAS:
                kind = np.dtype(np.float32)
            if not entry.per_expert:
                found[entry.name] = LazyArray(
                    expected[entry.name],
                    kind,
                    lambda e=entry, v=leaves, k=kind: _together(
                        e, [leaf.read().astype(k, copy=False) for leaf in v]
                    ),
                )
                continue
            for i in range(entry.shapes[0][0]):
                name = entry.name.format(expert=i)
                found[name] = LazyArray(
                    expected[name],
                    kind,
                    lambda i=i, v=leaves[0], k=kind: _expert(last, v, i).astype(
                        k, copy=False
                    ),
                )
        return found


def _expert(last: LastRead, stack: LazyArray, i: int) -> np.ndarray:
    """One expert's matrix over there; the stack is let go after the last one."""
    value = np.ascontiguousarray(last(stack)[i].T)
    if i == len(last(stack)) - 1:
        last.forget()
    return value


def _outer_shape(spec: ParamSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter over there: batch, rows, columns."""
    batch, columns, rows = _sides(spec, shape)
    if spec.init == "embedding":  # a lookup: its rows are what it is indexed by
        return columns, rows
    if spec.contracted == ("conv_width",):  # depthwise: one input channel each
        return rows, 1, columns
    return (*batch, rows, columns) if spec.contracted else (*batch, rows)


def _inner(value: np.ndarray, spec: ParamSpec, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter from its rows over there."""
    if spec.init == "embedding" or not spec.contracted:
        return value.reshape(shape)
    batch, columns, rows = _sides(spec, shape)
    turned = np.swapaxes(value.reshape(*batch, rows, columns), -1, -2)
    return np.ascontiguousarray(turned).reshape(shape)


def _outer(value: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """A parameter as rows over there: the inverse of `_inner`."""
    shape = _outer_shape(spec, value.shape)
    if spec.contracted and spec.init != "embedding":
        batch, columns, rows = _sides(spec, value.shape)
        value = np.swapaxes(value.reshape(*batch, columns, rows), -1, -2)
    return value.reshape(shape)


def _sides(spec: ParamSpec, shape: tuple[int, ...]) -> tuple[tuple, int, int]:
    """Batch dimensions, and both sides of the arrow flattened: contracted, produced."""
    size = dict(zip(spec.dims, shape, strict=True))
    batch = tuple(size[dim] for dim in spec.batch)
    sides = (spec.contracted, spec.produced)
    columns, rows = (math.prod(size[dim] for dim in side) for side in sides)
    return batch, columns, rows


def _together(entry: Entry, values: list[np.ndarray]) -> np.ndarray:
    rows = [_outer(v, spec) for v, spec in zip(values, entry.specs, strict=True)]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def _stacked(
    tensors: list[LazyArray], spec: ParamSpec, shape: tuple[int, ...]
) -> LazyArray:
    """The experts of a block as one array, filled one by one."""
    kind = _widest(tensors)

    def read() -> np.ndarray:
        stack = np.empty(shape, kind)
        for place, tensor in zip(stack, tensors, strict=True):
            place[...] = tensor.read().T
        return stack

    return LazyArray(shape, kind, read)


def _widest(tensors: Iterable[LazyArray]) -> np.dtype:
    """A dtype that holds every value of all; NumPy has none for the two of 16 bits."""

    def wider(one: np.dtype, other: np.dtype) -> np.dtype:
        halves = {one.name, other.name} == {"bfloat16", "float16"}
        return np.dtype(np.float32) if halves else np.promote_types(one, other)

    return functools.reduce(wider, (tensor.dtype for tensor in tensors))
