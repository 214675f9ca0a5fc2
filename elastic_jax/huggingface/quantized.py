"""The tensors that a quantized weight is over there, and what they must agree on.

A weight `X.weight` is several tensors: its values, its block scales, and scalars. Each
of them is one part of a `QuantArray` and moves as any parameter does, so `names.Table`
needs no more than their names; only scales are said differently by different schemes.
One tensor over there may be several parameters here, which then hold copies of its
scales: when they are written, the copies must be equal.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from elastic_jax import axes
from elastic_jax.huggingface.quantization_config import (
    COMPRESSED,
    MODELOPT,
    Declared,
    Stored,
)
from elastic_jax.lazy import LazyArray, lazy
from elastic_jax.parts import E4M3
from elastic_kernels import FakeQuant, QuantArray

# Scheme -> format -> part of a `QuantArray` -> what stands for `weight` in the name.
FP8 = {"values": "weight", "scale": "weight_scale", "input_scale": "input_scale"}
SUFFIXES: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    MODELOPT: {
        "fp8": FP8,
        "nvfp4": {
            "values": "weight",
            "block_scale": "weight_scale",
            "scale": "weight_scale_2",
            "input_scale": "input_scale",
        },
    },
    COMPRESSED: {
        "fp8": FP8,
        "nvfp4": {
            "values": "weight_packed",
            "block_scale": "weight_scale",
            "scale": "weight_global_scale",
            "input_scale": "input_global_scale",
        },
    },
}
RECIPROCAL = ("weight_global_scale", "input_global_scale")
SCALARS = ("scale", "input_scale")
# What engines hold as one module: the routed experts, queries with keys and values.
TOGETHER = (
    ("experts.{expert}", ("up_proj", "down_proj")),
    ("mixer", ("q_proj", "k_proj", "v_proj")),
)
SCALAR_SHAPE = {MODELOPT: (), COMPRESSED: (1,)}


def suffixes(scheme: str, stored: Stored) -> dict[str, str]:
    """Part -> what stands for `weight` in the name of its tensor."""
    found = dict(SUFFIXES[scheme][stored.format])
    if not stored.inputs:
        del found["input_scale"]
    return found


def told(scalar: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A scale as tensor `name` has it, or the other way: some are reciprocals."""
    scalar = np.asarray(scalar, np.float32)
    if name.endswith(RECIPROCAL):
        with np.errstate(divide="ignore"):
            scalar = np.float32(1) / scalar
    return np.asarray(scalar, np.float32).reshape(shape)


# ------------------------------------------------------------------------- reading


def stored_in(
    names: Iterable[str], tensors: Mapping[str, LazyArray], scheme: str
) -> dict[str, Stored]:
    """How each of the weights `names` is stored, of those that are quantized.

    Of experts the first one speaks: `misfits` compares the others with it.
    """
    found = {}
    for name in names:
        base = name.format(expert=0).removesuffix("weight")
        for format, kind in (("nvfp4", np.dtype(np.uint8)), ("fp8", E4M3)):
            parts = SUFFIXES[scheme][format]
            values = tensors.get(base + parts["values"])
            if values is not None and values.dtype == kind:
                inputs = base + parts["input_scale"] in tensors
                found[name] = Stored(format, inputs)
    return found


def contradictions(
    found: Mapping[str, Stored], declared: Declared | None
) -> Iterator[str]:
    """Where the tensors are not what the directory says of them."""
    if declared is None:
        if found:
            yield (
                f"{next(iter(found))} and {len(found) - 1} more are quantized; nothing "
                "says how: no quantization_config in config.json, and no "
                "hf_quant_config.json"
            )
        return
    if not found:
        yield "said to be quantized, but no weight is"
    for name, stored in found.items():
        module = name.removesuffix(".weight")
        whole = module.partition(".{expert}")[0]
        said = declared.modules.get(
            module.format(expert=0), declared.modules.get(whole)
        )
        if stored.format not in ((said,) if said else declared.formats):
            said = said or " or ".join(declared.formats)
            yield f"{name}: stored in {stored.format}, but said to be {said}"


# ------------------------------------------------------------------------- writing


def as_lazy(path: axes.Path, leaf: Any) -> LazyArray | QuantArray:
    """A parameter in lazy arrays.

    Raises:
      ValueError: it is a weight in training.
    """
    if isinstance(leaf, FakeQuant):
        raise ValueError(
            f"{_text(path)} is a weight in training: write its parameters, or quantize "
            "them"
        )
    if not isinstance(leaf, QuantArray):
        return lazy(leaf)
    # Each part gets a LazyArray of its own, so that a stack of experts is read once.
    return jax.tree.map(lazy, leaf)


def dequantized(leaf: LazyArray | QuantArray, dtype: Any) -> LazyArray:
    """A quantized weight as a plain one, made when it is read, expert by expert."""
    if not isinstance(leaf, QuantArray):
        return leaf
    kind = np.dtype(leaf.dtype if dtype is None else dtype)

    def read() -> np.ndarray:
        held = jax.tree.map(np.asarray, leaf)
        if not held.scale.ndim:
            return np.asarray(held.astype(kind))
        whole = np.empty(held.shape, kind)
        for i, place in enumerate(whole):
            place[...] = np.asarray(held[i].astype(kind))
        return whole

    return LazyArray(leaf.shape, kind, read)


def formats_of(
    parts: Mapping[str, tuple[axes.Path, ...]], params: Any
) -> dict[str, Stored]:
    """How each of the weights over there is to be stored, of those that are quantized.

    Args:
      parts: name of a tensor -> paths of the parameters that make it.

    Raises:
      ValueError: parameters of one tensor that differ in format or in their scales.
    """
    found, problems = {}, []
    for name, paths in parts.items():
        leaves = {_text(path): axes.leaf(params, path) for path in paths}
        kinds = {
            n: Stored(leaf.format, leaf.input_scale is not None)
            for n, leaf in leaves.items()
            if isinstance(leaf, QuantArray)
        }
        if not kinds:
            continue
        described = {n: kinds.get(n, "not quantized") for n in leaves}
        if len({*described.values()}) > 1:
            said = ", ".join(
                f"{n} {getattr(k, 'algorithm', k)}" for n, k in described.items()
            )
            problems.append(f"{name} is one tensor, but: {said}")
            continue
        stored = next(iter(kinds.values()))
        problems += _disagreements(name, leaves, stored)
        found[name] = stored
    if problems:
        raise ValueError("these weights cannot be written:\n  " + "\n  ".join(problems))
    return found


def _disagreements(name: str, leaves: Mapping, stored: Stored) -> Iterator[str]:
    """Scales of one tensor that are not the same in all its parameters."""
    if len(leaves) == 1:
        return
    for part in SCALARS if stored.inputs else SCALARS[:1]:
        scales = {n: np.asarray(getattr(leaf, part)) for n, leaf in leaves.items()}
        if len({scale.tobytes() for scale in scales.values()}) > 1:
            said = ", ".join(f"{n} {scale}" for n, scale in scales.items())
            yield f"{name} is one tensor with one {part}, but: {said}"


def notes(stored: Mapping[str, Stored], scheme: str) -> tuple[str, ...]:
    """What the user of an engine should know of weights that were written."""
    found = []
    if scheme == MODELOPT and Stored("fp8", inputs=False) in stored.values():
        found.append(
            "FP8 weights have no input scales, which vLLM needs in this layout: "
            "calibrate them, or export as compressed-tensors, where inputs stay BF16"
        )
    experts = {s.format for name, s in stored.items() if "{expert}" in name}
    if scheme == COMPRESSED and "nvfp4" in experts:
        found.append(
            "transformers 5.23 leaves out the global scale of routed experts in NVFP4, "
            "so they come out wrong: there, use --dequantize"
        )
    for within, together in TOGETHER:
        kinds: dict[str, list[Stored]] = {}
        for name, how in stored.items():
            module, _, last = name.removesuffix(".weight").rpartition(".")
            if last in together and module.endswith(f".{within}"):
                kinds.setdefault(module, []).append(how)
        odd = [m for m, k in kinds.items() if len(k) < len(together) or len({*k}) > 1]
        if odd:
            where = odd[0].removesuffix(".{expert}")
            found.append(
                f"vLLM takes {', '.join(together)} of a block in one format; they "
                f"differ in {where} and {len(odd) - 1} more"
            )
    return tuple(found)


@functools.cache
def _text(path: axes.Path) -> str:
    return "/".join(map(str, path))
