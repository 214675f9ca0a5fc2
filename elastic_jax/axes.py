"""The table of elastic axes, and parameters that name their dimensions once.

Shapes, initialisation, slicing, permuting, cost, sharding and the checkpoint all
derive from the arrows written here and in `layers/`; none of them knows what a
Mamba block is.

A *path* locates a leaf: `("layers", 3, "q")`. *Specs* are a flat, hashable tuple of
(path, spec), so they can be static under `jit`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Path = tuple[str | int, ...]
Size = int | tuple[int, ...]


@dataclass(frozen=True)
class Axis:
    """One elastic axis: the unit that is kept or dropped.

    Attributes:
      name: the dimension's name, also the `ModelConfig` field of its size.
      unit: what one unit is, for people.
      blocks: letters of the blocks that have the axis; empty for the whole model.
      owners: dimensions inside each of which units are ranked on their own.
      step: counts are multiples of it (16 is the NVFP4 block).
    """

    name: str
    unit: str
    blocks: str = ""
    owners: tuple[str, ...] = ()
    step: int = 1


# Inner axes stand before the axes that own them: an expert's neurons are permuted
# by the expert's original index, so they move before the experts do.
AXES: Mapping[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("expert_ffn", "hidden channel of a routed expert", "E", ("experts",), 16),
        Axis("experts", "routed expert", "E"),
        Axis("shared_ffn", "hidden channel of the shared expert", "E", step=16),
        Axis("ffn", "hidden channel of a dense MLP", "-", step=16),
        Axis("q_per_kv", "query head within its group", "*", ("kv_heads",)),
        Axis("ssm_head_dim", "channel within every Mamba head", "M", step=16),
        Axis("ssm_state", "state channel of B and C", "M", step=16),
        Axis("heads_per_group", "Mamba head within its group", "M", ("ssm_groups",)),
        Axis("embed", "residual channel", step=16),
        Axis("layers", "a whole block"),
    )
}

BLOCK_KINDS = {"M": "Mamba-2", "*": "attention", "E": "MoE", "-": "dense MLP"}


@dataclass(frozen=True)
class ParamSpec:
    """A parameter as an arrow, `"batch : contracted -> produced"`.

    Attributes:
      arrow: dimension names, batch dimensions before a colon.
      init: name of an initialiser, where it is not a normal over the fan-in.
      fused: name of the exported tensor that concatenates several parameters;
        they share one quantization scale.
    """

    arrow: str
    init: str = "fan_in"
    fused: str | None = None

    @functools.cached_property
    def batch(self) -> tuple[str, ...]:
        """Dimensions over which whole weights are stacked."""
        return tuple(self.arrow.split(":")[0].split()) if ":" in self.arrow else ()

    @functools.cached_property
    def contracted(self) -> tuple[str, ...]:
        """Dimensions summed over when the weight meets activations."""
        return tuple(self.arrow.split(":")[-1].split("->")[0].split())

    @functools.cached_property
    def produced(self) -> tuple[str, ...]:
        """Dimensions of the result."""
        return tuple(self.arrow.split("->")[1].split())

    @functools.cached_property
    def dims(self) -> tuple[str, ...]:
        """All dimensions, in storage order."""
        return self.batch + self.contracted + self.produced

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: something is contracted, and no lookup."""
        return bool(self.contracted) and self.init != "embedding"


@dataclass(frozen=True)
class CacheSpec:
    """A cache array by its dimensions, `batch` and `length` given at creation.

    Attributes:
      arrow: dimension names in storage order.
      dtype: name of a dtype where it does not follow the activations.
    """

    arrow: str
    dtype: str | None = None

    @functools.cached_property
    def dims(self) -> tuple[str, ...]:
        return tuple(self.arrow.split())


Spec = ParamSpec | CacheSpec
ParamSpecs = tuple[tuple[Path, ParamSpec], ...]
CacheSpecs = tuple[tuple[Path, CacheSpec], ...]


class Counts(Mapping[str, Size]):
    """Kept units per axis: immutable, hashable, so it can be static under `jit`.

    Made by `elastic_jax.counts`, which validates. An axis that is absent is full.
    """

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Size]):
        if unknown := [axis for axis in items if axis not in AXES]:
            raise ValueError(f"unknown axes {unknown}; expected some of {list(AXES)}")
        self._items = tuple((axis, items[axis]) for axis in AXES if axis in items)

    def __getitem__(self, axis: str) -> Size:
        return dict(self._items)[axis]

    def __iter__(self) -> Iterator[str]:
        return (axis for axis, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counts) and self._items == other._items

    def __repr__(self) -> str:
        return f"Counts({', '.join(f'{a}={n}' for a, n in self._items)})"


def blocks_with(pattern: str, axis: str) -> tuple[int, ...]:
    """Indices of the blocks of `pattern` that have `axis`, in depth order."""
    return tuple(i for i, kind in enumerate(pattern) if kind in AXES[axis].blocks)


def is_per_layer(axis: str) -> bool:
    """Whether each block that has the axis may choose its own count."""
    return axis in AXES and bool(AXES[axis].blocks)


@functools.lru_cache(maxsize=256)
def layers_with(specs: tuple[tuple[Path, Spec], ...], dim: str) -> tuple[int, ...]:
    """Indices of the blocks whose specs name `dim`, in depth order."""
    return tuple(
        sorted({p[1] for p, spec in specs if p[0] == "layers" and dim in spec.dims})
    )


def entry(specs, path: Path, dim: str, sizes: Size) -> int:
    """The size of `dim` at `path`: an int for all, or one entry per block with it."""
    if isinstance(sizes, tuple):
        return sizes[layers_with(specs, dim).index(path[1])]
    return sizes


def shape(cfg: Any, specs, path: Path, spec: Spec, **given: int) -> tuple[int, ...]:
    """The array shape of one leaf under `cfg`; `given` sizes need no field."""
    return tuple(
        given[dim] if dim in given else entry(specs, path, dim, getattr(cfg, dim))
        for dim in spec.dims
    )


def leaf(tree: Any, path: Path) -> Any:
    """The leaf of a nested tree at `path`."""
    for step in path:
        tree = tree[step]
    return tree


def nest(items: Mapping[Path, Any]) -> Any:
    """Nested dicts, and tuples where path steps are integers, from path -> leaf.

    A block without leaves is an empty dict, so that indices stay those of the paths.
    """
    if () in items:
        return items[()]
    groups: dict[str | int, dict[Path, Any]] = {}
    for (step, *rest), value in items.items():
        groups.setdefault(step, {})[tuple(rest)] = value
    if groups and all(isinstance(step, int) for step in groups):
        return tuple(nest(groups.get(i, {})) for i in range(max(groups) + 1))
    return {step: nest(group) for step, group in groups.items()}


def map_specs(function: Callable, specs, *trees: Any) -> Any:
    """The one tree walk: `function(path, spec, *leaves)` at every spec, nested."""
    return nest(
        {path: function(path, spec, *(leaf(t, path) for t in trees))
         for path, spec in specs}
    )
