"""What of a nested checkpoint a submodel is: the prefix of every array, and its place.

A tree of prefixes has the structure of the submodel's parameters, quantized weights
included: each of their parts is a prefix too. Reading it leaf by leaf restores them.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from elastic_jax import axes, nesting
from elastic_jax.axes import Counts
from elastic_jax.config import ModelConfig
from elastic_jax.contents import Formats, origins, stored_name
from elastic_jax.model import param_specs
from elastic_jax.parts import SCALES, packed_axis, parts
from elastic_jax.sharding import of_parts
from elastic_kernels import QuantArray


@dataclass(frozen=True)
class Prefix:
    """What to read.

    Attributes:
      name: of the stored array.
      shape: of its prefix.
      dtype: to read it as.
      is_scale: whether it holds scales of a quantized weight.
      sharding: where to put it; None is the default device.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    is_scale: bool = False
    sharding: Sharding | None = None


def prefixes(
    cfg: ModelConfig,
    counts: Counts,
    dtypes: Mapping[str, str],
    formats: Formats,
    dtype: Any = None,
) -> tuple[Any, ModelConfig]:
    """A submodel's tree of prefixes, and its configuration.

    Args:
      cfg: the parent's.
      dtypes: name of each stored array -> its dtype.
      formats: of quantized parameters, by their names.
      dtype: to cast to; quantized weights are used in it.

    Raises:
      ValueError: counts that cut a block of quantized values.
    """
    small = nesting.slice_config(cfg, counts)
    specs, leaves, origin = param_specs(small), {}, origins(cfg, counts)
    for path, spec in specs:
        name = stored_name(origin[path])
        shape = axes.shape(small, specs, path, spec)
        if name not in formats:
            kind = dtypes[name] if dtype is None else dtype
            leaves[path] = Prefix(name, shape, jnp.dtype(kind))
            continue
        said = formats[name]
        found = {
            part: Prefix(f"{name}.{part}", array.shape, array.dtype, part in SCALES)
            for part, array in parts(spec, shape, said["format"]).items()
            if f"{name}.{part}" in dtypes
        }
        leaves[path] = QuantArray(
            **{"block_scale": None, "input_scale": None, **found},
            axis=packed_axis(spec),
            dtype=jnp.dtype(said["dtype"] if dtype is None else dtype),
        )
    return axes.nest(leaves), small


def placed(shardings: Any, tree: Any, specs) -> Any:
    """A tree of prefixes, each with its sharding.

    Args:
      shardings: None, one for all, or a tree of them; quantized weights may have one,
        or a `QuantArray` of them.

    Raises:
      ValueError: a tree of another structure.
    """
    if shardings is None:
        return tree

    def place(path, _, leaf):
        whole = isinstance(shardings, Sharding)
        where = shardings if whole else axes.leaf(shardings, path)
        at = lambda prefix, where: dataclasses.replace(prefix, sharding=where)
        if not isinstance(leaf, QuantArray):
            return at(leaf, where)
        if isinstance(where, Sharding):
            where = of_parts(where, leaf)
        held = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)}
        moved = {
            name: at(prefix, getattr(where, name))
            for name, prefix in held.items()
            if isinstance(prefix, Prefix)
        }
        return dataclasses.replace(leaf, **moved)

    try:
        return axes.map_specs(place, specs, tree)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"shardings: {error!r} is missing; expected one sharding, or a tree shaped "
            "like the submodel, as param_shardings gives for its configuration"
        ) from None
