"""Where every parameter lives on a mesh: a table from dimension names to mesh axes.

Inside a block the table splits what owns elastic units and is never cut itself (the
groups of Mamba heads, the key-value heads), so that a submodel divides among devices
just as its parent does and each device keeps whole groups. What has no such owner is
split directly: experts, hidden channels, the vocabulary. The residual stays whole.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from elastic_jax import axes
from elastic_jax.config import ModelConfig, did_you_mean
from elastic_kernels import QuantArray

BATCH_AXIS = "data"

# Dimension -> mesh axis. A dimension that is absent, or None, is not split.
DEFAULT_RULES: Mapping[str, str | None] = {
    "vocab": "tensor",
    "ssm_groups": "tensor",
    "kv_heads": "tensor",
    "expert_ffn": "tensor",
    "shared_ffn": "tensor",
    "ffn": "tensor",
    "experts": "expert",
}


def param_shardings(
    cfg: ModelConfig,
    specs,
    mesh: Mesh | AbstractMesh,
    rules: Mapping[str, str | None] = DEFAULT_RULES,
    *,
    like: Any = None,
) -> Any:
    """The NamedSharding of every parameter, in the structure of the parameters.

    Args:
      cfg: a parent or a submodel.
      specs: its parameter specs.
      mesh: its axes must be of type `Auto`: the compiler places the activations.
      rules: dimension -> mesh axis. A rule for an axis that the mesh does not have is
        left out, so one table serves meshes with and without expert parallelism.
        `{**DEFAULT_RULES, "embed": "data"}` also splits weights over the data axis.
      like: a tree of the parameters, of which some are quantized. Those get a
        `QuantArray` of shardings: packed values and block scales are split as the
        weight is, scales of a stack as the stack is.

    Raises:
      ValueError: every rule for an unknown dimension, every dimension (or number of
        its blocks of quantized values) that its mesh axis does not divide, and every
        parameter split twice along one mesh axis.
    """
    known = {field.name for field in fields(cfg)}
    problems = [
        f"rule for unknown dimension {dim!r}{did_you_mean(dim, known)}"
        for dim in rules
        if dim not in known
    ]
    used = {dim: axis for dim, axis in rules.items() if axis in mesh.axis_names}

    quantized = {}
    if like is not None:
        leaves = {path: axes.leaf(like, path) for path, _ in specs}
        quantized = {p: w for p, w in leaves.items() if isinstance(w, QuantArray)}

    def place(path, spec):
        steps = quantized[path].steps if path in quantized else (1,) * len(spec.dims)
        where = tuple(used.get(dim) for dim in spec.dims)
        name = f"{'/'.join(map(str, path))} [{' '.join(spec.dims)}]"
        for dim, axis, step in zip(spec.dims, where, steps, strict=True):
            size = axis and axes.entry(specs, path, dim, getattr(cfg, dim))
            if axis and size % (step * mesh.shape[axis]):
                blocks = f" in blocks of {step} quantized values" if step > 1 else ""
                problems.append(
                    f"{name}: {dim} {size}{blocks} does not divide over the "
                    f"{mesh.shape[axis]} devices of mesh axis {axis!r}"
                )
        for axis, times in Counter(filter(None, where)).items():
            if times > 1:
                problems.append(f"{name}: split {times} times along {axis!r}")
        return PartitionSpec(*where)

    placed = {path: place(path, spec) for path, spec in specs}
    if problems:
        raise ValueError(
            "the model does not fit the mesh; change the mesh or the rules:\n  "
            + "\n  ".join(problems)
        )
    shardings = {path: NamedSharding(mesh, p) for path, p in placed.items()}
    parts = {path: of_parts(shardings[path], w) for path, w in quantized.items()}
    return axes.nest(shardings | parts)


def of_parts(sharding: Sharding, array: QuantArray) -> QuantArray:
    """The shardings of what a quantized weight is stored as, from the weight's own.

    Args:
      array: its parts may be anything that has a `shape`.
    """
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda _: sharding, array)

    def cut(part):
        spec = PartitionSpec(*sharding.spec[: len(part.shape)])
        return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)

    return jax.tree.map(cut, array)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows split over the data axis; replicated on a mesh without one."""
    return NamedSharding(
        mesh, PartitionSpec(BATCH_AXIS if BATCH_AXIS in mesh.axis_names else None)
    )
