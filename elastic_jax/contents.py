"""What a nested checkpoint must hold for its configuration: arrays, formats, budgets.

Asked when it is saved, of arrays, and when it is opened, of what the manifest claims of
them: the arrows decide what is expected, never the claim.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from elastic_jax import axes, nesting
from elastic_jax.axes import Path
from elastic_jax.config import ModelConfig
from elastic_jax.manifest import array_name, flat
from elastic_jax.model import param_specs
from elastic_jax.parts import OPTIONAL, Part, packed_axis, parts
from elastic_kernels import FakeQuant, QuantArray

# Name of a parameter -> {"format", "dtype"}; the latter is what it is used in.
Formats = Mapping[str, Mapping[str, str]]


def formats_of(params: Any) -> dict[str, dict[str, str]]:
    """What a manifest says of the quantized weights of a tree."""
    whole = lambda leaf: isinstance(leaf, QuantArray)
    return {
        name: {"format": leaf.format, "dtype": jnp.dtype(leaf.dtype).name}
        for name, leaf in flat(params, "params", whole).items()
        if isinstance(leaf, QuantArray)
    }


def stored_name(path: Path) -> str:
    """The name under which a parameter, or each of its parts one step deeper, is."""
    return array_name("params", *path)


def layout(cfg: ModelConfig, formats: Formats) -> dict[str, Part]:
    """Name -> what every array of the parameters must be.

    Raises:
      ValueError: with all formats that cannot be.
    """
    specs, found, problems = param_specs(cfg), {}, []
    unknown = dict(formats)
    for path, spec in specs:
        name, shape = stored_name(path), axes.shape(cfg, specs, path, spec)
        if name not in formats:
            found[name] = Part(spec.dims, shape, None, {})
            continue
        said = unknown.pop(name)
        try:
            if set(said) != {"format", "dtype"}:
                raise ValueError(f"expected format and dtype, found {sorted(said)}")
            if not jnp.issubdtype(said["dtype"], jnp.floating):
                raise ValueError(f"used in {said['dtype']}, which is not floating")
            found |= {
                f"{name}.{part}": array
                for part, array in parts(spec, shape, said["format"]).items()
            }
        except (ValueError, TypeError) as error:
            problems.append(f"{name}: {error}")
    problems += [f"{name}: quantized, but no parameter" for name in unknown]
    if problems:
        raise ValueError("\n  ".join(["these formats cannot be:", *problems]))
    return found


def tree_problems(params: Any, cfg: ModelConfig) -> Iterator[str]:
    """Quantized leaves that are not what a checkpoint can keep."""
    whole = lambda leaf: isinstance(leaf, QuantArray | FakeQuant)
    specs = {stored_name(path): spec for path, spec in param_specs(cfg)}
    for name, leaf in flat(params, "params", whole).items():
        if isinstance(leaf, FakeQuant):
            yield f"{name}: a weight in training; save its parameters, or quantize them"
        elif isinstance(leaf, QuantArray) and name in specs:
            axis = packed_axis(specs[name])
            if leaf.axis != axis:
                yield f"{name}: packed along axis {leaf.axis}, expected {axis}"


def array_problems(expected: Mapping[str, Part], arrays: Mapping) -> Iterator[str]:
    """Arrays of parameters (or their entries) that are not as expected."""
    found = {n: _claim(leaf) for n, leaf in arrays.items() if n.startswith("params.")}
    optional = {name for name in expected if name.endswith(f".{OPTIONAL}")}
    for name in sorted({*(expected.keys() - optional), *found}):
        have, part = found.get(name), expected.get(name)
        if have is None or part is None:
            shapes = have and have[0], part and part.shape
            have, want = (shape if shape is not None else "nothing" for shape in shapes)
            yield f"{name}: found {have}, expected {want}"
            continue
        shape, dtype, per = have
        if shape != part.shape:
            yield f"{name}: found {shape}, expected {part.shape}"
        if part.dtype is not None and dtype != part.dtype.name:
            yield f"{name}: found {dtype}, expected {part.dtype.name}"
        if per is not None and per != dict(part.per):
            yield f"{name}: found {per} units per element, expected {dict(part.per)}"


def _claim(leaf: Any) -> tuple[tuple, str, Any]:
    """Shape, dtype and units per element of an array, or of its entry."""
    if isinstance(leaf, dict):
        return tuple(leaf["shape"]), leaf["dtype"], leaf.get("per", {})
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return tuple(np.shape(leaf)), jnp.dtype(dtype).name, None


def budget_problems(
    cfg: ModelConfig, budgets: Mapping[str, Any], formats: Formats
) -> Iterator[str]:
    """Budgets that do not fit the model, cut a block of it, or do not nest."""
    depths = {}
    for name, given in budgets.items():
        try:
            counts = nesting.counts(cfg, **given)
            layout(*submodel(cfg, counts, formats))
            depths[name] = {i for i, on in enumerate(counts.get("layers", ())) if on}
        except (ValueError, TypeError) as error:
            yield f"budget {name!r}: {error}"
    # Prefixes always nest; blocks are chosen one by one, so they need not.
    shallow = sorted((n for n in depths if depths[n]), key=lambda n: len(depths[n]))
    for small, large in zip(shallow, shallow[1:], strict=False):
        if odd := depths[small] - depths[large]:
            yield f"budget {small!r} keeps blocks {sorted(odd)}, not in {large!r}"


def submodel(
    cfg: ModelConfig, counts: axes.Counts, formats: Formats
) -> tuple[ModelConfig, Formats]:
    """A submodel's configuration, and the formats of its parameters by their names."""
    small = nesting.slice_config(cfg, counts)
    names = {
        stored_name(path): stored_name(origin)
        for path, origin in origins(cfg, counts).items()
    }
    kept = {name: formats[old] for name, old in names.items() if old in formats}
    return small, kept


def origins(cfg: ModelConfig, counts: axes.Counts) -> dict[Path, Path]:
    """Path of every parameter of a submodel -> its path in the parent."""
    on = nesting.resolved(cfg, counts)["layers"]
    kept = [i for i, keep in enumerate(on) if keep]
    specs = param_specs(nesting.slice_config(cfg, counts))
    return {
        path: ("layers", kept[path[1]], *path[2:]) if path[0] == "layers" else path
        for path, _ in specs
    }
