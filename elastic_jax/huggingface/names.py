"""How Hugging Face names the tensors of Nemotron-H: one table, and one loop each way.

A tensor there is one or several parameters here. Theirs have produced dimensions first,
both sides flattened, and several parameters are stacked along the rows; that is all
the loop does, and the arrows of the parameters say the rest. Everything is lazy: a
tensor is read when its parameter is, a parameter when its tensors are written.

A quantized weight is several tensors, each of which is one part of it: packed values
and block scales turn and stack as the weight does, scales are scalars.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from elastic_jax import axes
from elastic_jax.axes import ParamSpec, Path
from elastic_jax.config import ModelConfig
from elastic_jax.huggingface.quantization_config import MODELOPT, Stored
from elastic_jax.huggingface.quantized import SCALAR_SHAPE, SCALARS, suffixes, told
from elastic_jax.huggingface.shards import LARGEST_TENSOR_COUNT
from elastic_jax.huggingface.turning import inner, outer, outer_shape, widest
from elastic_jax.huggingface.untrusted import short
from elastic_jax.lazy import LastRead, LazyArray
from elastic_jax.model import param_specs
from elastic_jax.parts import packed_axis, parts
from elastic_kernels import QuantArray

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
FLOATING = ("bfloat16", "float16", "float32", "float64")
ROUTER_BIAS = "router_bias"  # float32 whatever the rest is: it decides near ties


@dataclass(frozen=True)
class Layout:
    """How a directory names its tensors.

    Attributes:
      prefix: `backbone.` on disk, `model.` in the memory of transformers 5.
      stacked: the experts of a block are one tensor.
      scheme: how quantized weights are laid out; of `quantized.SUFFIXES`.
    """

    prefix: str
    stacked: bool
    scheme: str = MODELOPT


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs: the parameters that make it, and how.

    Attributes:
      name: of the tensor; `{expert}` is still in it where each expert has one.
      parts: paths of the parameters, stacked along the rows in this order.
      specs: their specs.
      shapes: their shapes, or those of their parts.
      part: of quantized parameters, as `QuantArray` names it; else empty.
      dtype: of the tensor; None is any floating one.
    """

    name: str
    parts: tuple[Path, ...]
    specs: tuple[ParamSpec, ...]
    shapes: tuple[tuple[int, ...], ...]
    part: str = ""
    dtype: np.dtype | None = None

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.name

    @property
    def is_scalar(self) -> bool:
        """One number for the tensor, the same for all parameters."""
        return self.part in SCALARS

    def names(self) -> list[str]:
        """Of the tensor, or of the one of each expert."""
        if not self.per_expert:
            return [self.name]
        return [self.name.format(expert=e) for e in range(self.shapes[0][0])]

    def read(self, params: Any) -> list[LazyArray]:
        """What of a tree of lazy parameters makes the tensor."""
        leaves = [axes.leaf(params, path) for path in self.parts]
        return [getattr(leaf, self.part) for leaf in leaves] if self.part else leaves


class Table:
    """All tensors of a model in a layout: what is expected, and both ways across."""

    def __init__(
        self,
        cfg: ModelConfig,
        layout: Layout,
        stored: Mapping[str, Stored] = MappingProxyType({}),
    ):
        """The table of a model; `stored` says which of its `weights` are quantized.

        Raises:
          ValueError: a quantized weight whose width is not made of whole blocks.
        """
        self.cfg, self.specs, self.layout = cfg, param_specs(cfg), layout
        known = dict(self.specs)
        self.entries = [
            entry
            for name, paths in _named(cfg, layout).items()
            for entry in self._entries(name, paths, known, stored.get(name))
        ]

    def _entries(
        self, name: str, paths: tuple[Path, ...], known, stored: Stored | None
    ) -> Iterator[Entry]:
        specs = tuple(known[path] for path in paths)
        shapes = [axes.shape(self.cfg, self.specs, path, known[path]) for path in paths]
        if stored is None:
            yield Entry(name, paths, specs, tuple(shapes))
            return
        pairs = zip(specs, shapes, strict=True)
        try:
            made = [parts(spec, shape, stored.format) for spec, shape in pairs]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        for part, suffix in suffixes(self.layout.scheme, stored).items():
            yield Entry(
                name.removesuffix("weight") + suffix,
                paths,
                specs,
                tuple(each[part].shape for each in made),
                part,
                made[0][part].dtype,
            )

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> its shape."""
        return {name: shape for name, (shape, _) in self._expected().items()}

    def _expected(self) -> dict[str, tuple[tuple[int, ...], Entry]]:
        found = {}
        for entry in self.entries:
            if entry.is_scalar:
                shape = SCALAR_SHAPE[self.layout.scheme]
            else:
                pairs = zip(entry.specs, entry.shapes, strict=True)
                shapes = [outer_shape(spec, shape) for spec, shape in pairs]
                rows = sum(shape[0] for shape in shapes)
                shape = shapes[0] if len(shapes) == 1 else (rows, *shapes[0][1:])
                shape = shape[1:] if entry.per_expert else shape
            found |= dict.fromkeys(entry.names(), (shape, entry))
        return found

    def quantized(self) -> dict[str, str]:
        """Tensor -> which part of a quantized weight it is, of those that are one."""
        parts_of = {n: entry.part for n, (_, entry) in self._expected().items()}
        return {name: part for name, part in parts_of.items() if part}

    def misfits(self, tensors: Mapping[str, LazyArray]) -> Iterator[str]:
        """Tensors that are missing, not known, of another shape or dtype."""
        count = sum(e.shapes[0][0] if e.per_expert else 1 for e in self.entries)
        if count > LARGEST_TENSOR_COUNT:  # before they are named one by one
            yield f"the config asks for {count} tensors; there are {len(tensors)}"
            return
        expected = self._expected()
        for name, (shape, _) in expected.items():
            if name not in tensors:
                yield f"{name}: missing, expected shape {list(shape)}"
        for name, tensor in tensors.items():
            if name not in expected:
                yield f"{short(name)}: unexpected; the config has no place for it"
                continue
            shape, entry = expected[name]
            # A number is written with a dimension of its own, or without.
            fitting = ((), (1,)) if entry.is_scalar else (shape,)
            if tensor.shape not in fitting:
                yield f"{name}: shape {list(tensor.shape)}, expected {list(shape)}"
            elif entry.dtype is not None and tensor.dtype != entry.dtype:
                yield f"{name}: {tensor.dtype}, expected {entry.dtype}"
            elif entry.dtype is None and tensor.dtype.name not in FLOATING:
                yield (
                    f"{name}: {tensor.dtype}; quantized weights cannot be taken over "
                    "in this form, start from the BF16 checkpoint"
                )

    def params(self, tensors: Mapping[str, LazyArray], dtype: Any = "bfloat16") -> Any:
        """The parameter tree, from tensors that fit.

        Quantized weights are used in `dtype`.
        """
        found: dict[Path, Any] = {}
        for entry in self.entries:
            for path, value in self._taken(entry, tensors):
                if entry.part:
                    found.setdefault(path, {})[entry.part] = value
                else:
                    found[path] = value

        def whole(path, spec):
            if not isinstance(found[path], dict):
                return found[path]
            arrays = {"block_scale": None, "input_scale": None, **found[path]}
            return QuantArray(**arrays, axis=packed_axis(spec), dtype=np.dtype(dtype))

        return axes.map_specs(whole, self.specs)

    def _taken(
        self, entry: Entry, tensors: Mapping[str, LazyArray]
    ) -> Iterator[tuple[Path, LazyArray]]:
        """Path and array of everything that an entry's tensors hold."""
        if entry.per_expert:
            (path,), (spec,), (shape,) = entry.parts, entry.specs, entry.shapes
            parts_of = [tensors[name] for name in entry.names()]
            if entry.is_scalar:
                parts_of = [self._scalar(entry, tensor) for tensor in parts_of]
            yield path, _stacked(parts_of, shape)
            return
        tensor = tensors[entry.name]
        if entry.is_scalar:
            for path in entry.parts:
                yield path, self._scalar(entry, tensor)
            return
        start, several = 0, len(entry.parts) > 1
        for path, spec, shape in zip(
            entry.parts, entry.specs, entry.shapes, strict=True
        ):
            rows = outer_shape(spec, shape)[0]
            part = slice(start, start + rows) if several else slice(None)
            cut = lambda t, s=spec, n=shape, part=part: inner(t[part], s, n)
            yield path, tensor.derived(shape, cut)
            start += rows

    def _scalar(self, entry: Entry, tensor: LazyArray) -> LazyArray:
        return tensor.derived((), lambda value: told(value, entry.name, ()))

    def tensors(self, params: Any, dtype: Any) -> dict[str, LazyArray]:
        """Every tensor, from a tree of lazy parameters, in the order of the blocks."""
        found, last, expected = {}, LastRead(), self.expected()
        for entry in self.entries:
            leaves = entry.read(params)
            kind = widest(leaves) if dtype is None else np.dtype(dtype)
            kind = kind if entry.dtype is None else entry.dtype
            if entry.parts[0][-1] == ROUTER_BIAS:
                kind = np.dtype(np.float32)
            for i, name in enumerate(entry.names()):
                shape = expected[name]
                read = functools.partial(_made, entry, leaves, i, shape, kind, last)
                found[name] = LazyArray(shape, kind, read)
        return found


def weights(cfg: ModelConfig, layout: Layout) -> dict[str, tuple[Path, ...]]:
    """Names of what may be quantized -> the parameters that are one tensor there."""
    known = dict(param_specs(cfg))
    return {
        name: paths
        for name, paths in _named(cfg, layout).items()
        if name.endswith(".weight") and all(known[path].decays for path in paths)
    }


def _named(cfg: ModelConfig, layout: Layout) -> dict[str, tuple[Path, ...]]:
    """Tensor (`{expert}` is one for each) -> parameters, without regard to storage."""
    named = {
        f"{layout.prefix}embeddings.weight": (("embedding",),),
        f"{layout.prefix}norm_f.weight": (("final_norm",),),
        "lm_head.weight": (("lm_head",),),
    }
    for i, kind in enumerate(cfg.pattern):
        block = f"{layout.prefix}layers.{i}."
        named[f"{block}norm.weight"] = (("layers", i, "norm"),)
        for name, parts_of in BLOCKS[kind].items():
            if layout.stacked:
                name = name.replace("{expert}.", "")
                if name.startswith("mixer.experts."):
                    name = name.removesuffix(".weight")
            named[f"{block}{name}"] = tuple(("layers", i, part) for part in parts_of)
    return named


def _made(
    entry: Entry, leaves: list[LazyArray], i: int, shape, kind, last: LastRead
) -> np.ndarray:
    """A tensor over there, of expert `i` where each has one."""
    if entry.is_scalar:
        value = last(leaves[0])[i] if entry.per_expert else leaves[0].read()
        return told(value, entry.name, shape)
    if entry.per_expert:
        return _expert(last, leaves[0], i).astype(kind, copy=False)
    return _together(entry, [leaf.read().astype(kind, copy=False) for leaf in leaves])


def _expert(last: LastRead, stack: LazyArray, i: int) -> np.ndarray:
    """One expert's matrix over there; the stack is let go after the last one."""
    value = np.ascontiguousarray(last(stack)[i].T)
    if i == len(last(stack)) - 1:
        last.forget()
    return value


def _together(entry: Entry, values: list[np.ndarray]) -> np.ndarray:
    rows = [outer(v, spec) for v, spec in zip(values, entry.specs, strict=True)]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def _stacked(tensors: list[LazyArray], shape: tuple[int, ...]) -> LazyArray:
    """The experts of a block as one array, filled one by one."""
    kind = widest(tensors)

    def read() -> np.ndarray:
        stack = np.empty(shape, kind)
        for i, tensor in enumerate(tensors):
            stack[i] = tensor.read().T
        return stack

    return LazyArray(shape, kind, read)
