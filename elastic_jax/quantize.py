"""Which weights are stored in FP8 or NVFP4, and under which scales.

A recipe is a table of rules by name; everything else derives from the arrows. One scale
belongs to one exported tensor: parameters that a checkpoint concatenates
(`ParamSpec.fused`) share it, and each expert of a stack has its own. Scales are found
once, on the parent. A submodel's values and block scales are prefixes and its tensor
scales are inherited, so slicing and quantizing commute bit for bit.

A parameter's name in a rule is `kind/name`, with the kinds of `KINDS`: `moe/up`, or
`mamba_before_attention/out`. Patterns are those of a shell, and speak of parameters
that enter products: `("*", "nvfp4")` is all of them, but no norm and no embedding.
"""

import fnmatch
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from elastic_jax import axes
from elastic_jax.axes import Counts, ParamSpec, ParamSpecs, Path
from elastic_jax.config import ModelConfig, did_you_mean
from elastic_jax.cost import block_bytes_of
from elastic_kernels import FakeQuant, QuantArray, quant_array
from elastic_kernels.quant_array import BLOCK, BLOCK_SCALES, FORMATS

KEEP = "keep"  # as a rule: stored as it is
KINDS = ("model", "mamba", "mamba_before_attention", "attention", "moe", "mlp")
_KIND = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}

# What the released FP8 and NVFP4 checkpoints of Nemotron 3 Nano quantize: routed and
# shared experts, and Mamba projections but for the block before each attention.
# Attention, convolutions, the router, embeddings, head, norms and scalars stay.
NANO_V3 = (
    "moe/up",
    "moe/down",
    "moe/shared_up",
    "moe/shared_down",
    "mlp/up",
    "mlp/down",
    *(f"mamba/{name}" for name in ("z", "x", "B", "C", "dt", "out")),
)


@dataclass(frozen=True)
class Recipe:
    """Which format each parameter is stored in.

    Attributes:
      format: `"fp8"` or `"nvfp4"`, of what the Nano v3 recipe quantizes.
      rules: (pattern, format or `"keep"`) pairs on top of it; of several that match a
        name the last one holds. `("*", "keep")` as the first starts from nothing.
      block_scale: how NVFP4 scales blocks, see `elastic_kernels.quant_array.quantize`.

    Raises:
      ValueError: with everything that is unknown.
    """

    format: str = "nvfp4"
    rules: tuple[tuple[str, str], ...] = ()
    block_scale: str = "max"

    def __post_init__(self):
        problems = []
        if self.format not in FORMATS:
            problems.append(
                f"format {self.format!r}{did_you_mean(self.format, FORMATS)}"
            )
        if self.block_scale not in BLOCK_SCALES:
            near = did_you_mean(self.block_scale, BLOCK_SCALES)
            problems.append(f"block_scale {self.block_scale!r}{near}")
        for pattern, format in self.rules:
            if format not in (*FORMATS, KEEP):
                near = did_you_mean(format, (*FORMATS, KEEP))
                problems.append(f"rule {pattern!r}: format {format!r}{near}")
            if not any(_may_match(kind, pattern) for kind in KINDS):
                near = did_you_mean(pattern.split("/")[0], KINDS)
                problems.append(f"rule {pattern!r}: no such kind of block{near}")
        _refuse("invalid Recipe", problems)


def names(specs: ParamSpecs, cfg: ModelConfig) -> dict[Path, str]:
    """Path -> the parameter's name as rules have it, `kind/name`."""

    def kind(path: Path) -> str:
        if path[0] != "layers":
            return "model"
        before = cfg.pattern[path[1] : path[1] + 2] == "M*"
        return "mamba_before_attention" if before else _KIND[cfg.pattern[path[1]]]

    return {path: f"{kind(path)}/{path[-1]}" for path, _ in specs}


def formats(specs: ParamSpecs, cfg: ModelConfig, recipe: Recipe) -> dict[Path, str]:
    """Path -> format of every parameter that `recipe` quantizes.

    Raises:
      ValueError: rules that match nothing, or ask for what cannot be: nothing
        contracted, blocks that do not fit, or several formats in one tensor.
    """
    called = names(specs, cfg)
    defaults = [(pattern, recipe.format) for pattern in NANO_V3]
    chosen, problems = {}, []
    for path, spec in specs:
        matching = [
            format
            for pattern, format in (*defaults, *recipe.rules)
            if fnmatch.fnmatchcase(called[path], pattern)
        ]
        format = matching[-1] if matching else KEEP
        if format == KEEP:
            continue
        if not meets_activations(spec):
            continue
        chosen[path] = format
        where = f"{_text(path)} ({called[path]})"
        if format == "nvfp4":
            dim = spec.contracted[-1]
            size = axes.entry(specs, path, dim, getattr(cfg, dim))
            if size % BLOCK:
                problems.append(
                    f"{where}: its last contracted dimension {dim} is {size}, no "
                    f"multiple of {BLOCK}; keep it or use fp8"
                )
    present = {name.split("/")[0] for name in called.values()}
    products = {called[path] for path, spec in specs if meets_activations(spec)}
    for pattern, format in recipe.rules:
        matched = set(fnmatch.filter(called.values(), pattern))
        if not matched and any(_may_match(kind, pattern) for kind in present):
            near = did_you_mean(pattern, set(called.values()))
            problems.append(f"rule {pattern!r} matches no parameter{near}")
        elif matched and format != KEEP and not matched & products:
            problems.append(
                f"rule {pattern!r}: {', '.join(sorted(matched))} enter no product; "
                "leave the rule out"
            )
    for group in _groups(specs):
        used = {chosen.get(path, KEEP) for path in group}
        if len(used) > 1:
            problems.append(
                f"{', '.join(map(_text, group))}: one tensor of a checkpoint, but "
                f"formats {sorted(used)}; give them one"
            )
    _refuse(f"the recipe does not fit {cfg.pattern!r}", problems)
    return chosen


def meets_activations(spec: ParamSpec) -> bool:
    """Whether a parameter enters a product: no lookup, no convolution, no norm."""
    return spec.decays and spec.contracted != ("conv_width",)


def quantize(
    params: Any,
    specs: ParamSpecs,
    cfg: ModelConfig,
    recipe: Recipe,
    *,
    like: Any = None,
    frozen: bool = False,
    input_largest: Mapping[Path, Array] | None = None,
) -> Any:
    """`params` with what `recipe` names as `QuantArray`s in packed storage.

    Args:
      params: arrays of the parent; quantize before slicing, and after permuting.
      like: a quantized tree whose formats, tensor scales and input scales are
        inherited; of the recipe only its `block_scale` is read then.
      frozen: inherit the scales of blocks, too.
      input_largest: largest magnitude of the activations that a parameter meets, for
        each expert where there are several: `InputStatistics.largest`. What is left out
        gets no input scale; what is given of a parameter that stays as it is has no
        use. An expert that met none takes the largest of its layer.

    Raises:
      ValueError: a recipe that does not fit, parameters that are quantized already,
        activations of no parameter, or (outside `jit`) weights that are NaN or
        infinite, each by name.
    """
    if frozen and like is None:
        raise ValueError("frozen scales are those of `like`: give a quantized tree")
    chosen = formats(specs, cfg, recipe) if like is None else _inherited(specs, like)
    weights = {path: axes.leaf(params, path) for path in chosen}
    _refuse(
        "cannot quantize",
        [
            f"{_text(path)} is quantized already; dequantize it first"
            for path, weight in weights.items()
            if _is_stored(weight)
        ],
    )
    stacked = {path: len(spec.batch) for path, spec in specs}
    largest = {
        path: quant_array.largest_magnitude(weight, stacked[path])
        for path, weight in weights.items()
    }
    given = input_largest or {}
    unknown = given.keys() - {path for path, spec in specs if meets_activations(spec)}
    _refuse(
        "cannot quantize",
        [f"input_largest: no product has {_text(path)}" for path in sorted(unknown)],
    )
    inputs = {path: given[path] for path in chosen if path in given}
    _refuse("cannot quantize", list(_unfit(largest, inputs)))
    if like is None:
        scales = _tensor_scales(specs, chosen, largest)
        input_scales = _tensor_scales(specs, chosen, _met(inputs))
    else:
        scales = {path: axes.leaf(like, path).scale for path in chosen}
        input_scales = {path: axes.leaf(like, path).input_scale for path in chosen}

    def stored(path, spec, weight):
        if path not in chosen:
            return weight
        rule = recipe.block_scale
        if frozen and chosen[path] == "nvfp4":
            rule = axes.leaf(like, path).block_scale
        return quant_array.quantize(
            weight,
            chosen[path],
            axis=-len(spec.produced) - 1,  # the last contracted dimension
            scale=scales[path],
            input_scale=input_scales.get(path),
            block_scale=rule,
        )

    return axes.map_specs(stored, specs, params)


def dequantize(params: Any) -> Any:
    """The tree with arrays in the place of quantized weights, in their dtypes."""
    return jax.tree.map(
        lambda leaf: leaf.astype(leaf.dtype) if _is_stored(leaf) else leaf,
        params,
        is_leaf=_is_stored,
    )


def fake(params: Any, quantized: Any, specs: ParamSpecs) -> Any:
    """`params` that compute as `quantized` does, and learn as if they were exact.

    Gradients reach `params` as though rounding were the identity (straight-through).
    Cut the result, not `params`, so that a submodel trains under its parent's scales.

    Args:
      quantized: of these very params.
    """

    def both(path, spec, weight, rounded):
        return FakeQuant(weight, rounded) if _is_stored(rounded) else weight

    return axes.map_specs(both, specs, params, quantized)


def table(
    specs: ParamSpecs,
    cfg: ModelConfig,
    recipe: Recipe,
    *,
    counts: Counts | None = None,
    precision: str | Mapping[Path, str] = "bf16",
) -> list[dict[str, Any]]:
    """What each choice costs: a row for each kind of block, parameter and format.

    Exact without allocating an array: `bytes` are of values and of their scales, input
    scales left out, and of the rest in `precision`.

    Args:
      counts: the submodel to count, cut from the quantized parent.
      precision: of what is kept, by path where it differs.
    """
    chosen = formats(specs, cfg, recipe)
    one = isinstance(precision, str)
    stored = {path: precision if one else precision[path] for path, _ in specs} | chosen
    called = names(specs, cfg)
    named = [(called[path].split("/"), path, spec) for path, spec in specs]
    kept = (counts or {}).get("layers", (1,) * cfg.layers)
    rows: dict[tuple, dict[str, Any]] = {}
    for (kind, name), path, spec in sorted(named, key=lambda n: KINDS.index(n[0][0])):
        if path[0] == "layers" and not kept[path[1]]:
            continue
        format = stored[path]
        sizes = {
            dim: axes.entry(specs, path, dim, (counts or {}).get(dim, full))
            for dim, full in ((dim, getattr(cfg, dim)) for dim in spec.dims)
        }
        size = math.prod(sizes.values())
        scales = math.prod(sizes[dim] for dim in spec.batch) if path in chosen else 0
        row = rows.setdefault(
            (kind, name, format),
            {
                "kind": kind,
                "parameter": name,
                "format": format,
                "parameters": 0,
                "bytes": 0,
            },
        )
        row["parameters"] += size
        row["bytes"] += -(-size * block_bytes_of(format) // BLOCK) + 4 * scales
    return list(rows.values())


def size_bytes(params: Any) -> int:
    """Bytes of all arrays of a tree, or of what `jax.eval_shape` says of them."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def _may_match(kind: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(kind, pattern.split("/")[0])


@functools.lru_cache(maxsize=64)
def _groups(specs: ParamSpecs) -> tuple[tuple[Path, ...], ...]:
    """Paths whose parameters are one tensor of a checkpoint, together."""
    groups: dict[tuple, list[Path]] = {}
    for path, spec in specs:
        groups.setdefault((path[:-1], spec.fused or path), []).append(path)
    return tuple(map(tuple, groups.values()))


def _inherited(specs: ParamSpecs, like: Any) -> dict[Path, str]:
    leaves = {path: axes.leaf(like, path) for path, _ in specs}
    return {
        p: leaf.format for p, leaf in leaves.items() if isinstance(leaf, QuantArray)
    }


def _tensor_scales(specs: ParamSpecs, chosen, largest: Mapping[Path, Array]):
    """Path -> float32 scale, one for all that are one tensor."""
    scales = {}
    for group in _groups(specs):
        given = [largest[path] for path in group if path in chosen and path in largest]
        if given:
            joint = functools.reduce(jnp.maximum, given)
            scale = quant_array.tensor_scale(joint, chosen[group[0]])
            scales |= dict.fromkeys(group, scale)
    return scales


def _met(inputs: Mapping[Path, Array]) -> dict[Path, Array]:
    """Experts that met no token, with what the loudest other of their layer met."""
    arrays = {path: jnp.asarray(a, jnp.float32) for path, a in inputs.items()}
    return {path: jnp.where(a == 0, jnp.max(a), a) for path, a in arrays.items()}


def _unfit(largest: Mapping[Path, Array], inputs: Mapping[Path, Array]):
    """Why these magnitudes cannot be those of weights and of what they meet."""
    for path, given in inputs.items():
        if jnp.shape(given) != largest[path].shape:
            yield (
                f"input_largest of {_text(path)} has shape {jnp.shape(given)}, not "
                f"{largest[path].shape}"
            )
    for what, magnitudes in (("weights", largest), ("activations", inputs)):
        for path, magnitude in magnitudes.items():
            if isinstance(magnitude, jax.core.Tracer):
                continue
            if not np.isfinite(magnitude).all():
                yield f"{_text(path)}: NaN or infinity among its {what}"


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, QuantArray | FakeQuant)


def _text(path: Path) -> str:
    return "/".join(map(str, path))


def _refuse(what: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{what}:\n  " + "\n  ".join(problems))
