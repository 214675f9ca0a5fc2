"""What a model takes on one device: seconds of its parts, measured, saved and added.

A model's latency is the sum over its blocks and its *ends*: embedding, final norm and
head. A table holds a grid of seconds for each of them, for one batch and length. It is
a frozen value that equals its like, so static under `jit`. `latency.py` measures one.
"""

import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from elastic_jax.axes import blocks_with
from elastic_jax.config import ElasticConfig, ModelConfig, did_you_mean
from elastic_jax.latency_grid import (
    ENDS,
    Grid,
    any_of_jax,
    axes_of,
    is_size,
    refuse,
    shown,
)

# Sizes that no budget changes and that seconds depend on.
FIXED = ("vocab", "ssm_groups", "kv_heads", "head_dim", "conv_width", "top_k")

LARGEST_FILE_BYTES = 2**23


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of a model's parts on one device, for one batch and length.

    Attributes:
      device, date, jax: where, when, and with which JAX it was measured.
      dtype: of parameters and cache.
      batch: rows.
      prompt: tokens that a prefill reads into an empty cache.
      context: length of the cache; decoding reads the token that fills it.
      scale: (phase, factor) by which the seconds of the grids are larger than those of
        parts that were measured alone, so that they add up to the whole parent.
      fixed: (size, value), for each of `FIXED`.
      grids: of every kind of block that was measured, and of the ends.

    Raises:
      ValueError: with every problem at once.
    """

    device: str
    date: str
    jax: str
    dtype: str
    batch: int
    prompt: int
    context: int
    scale: tuple[tuple[str, float], ...]
    fixed: tuple[tuple[str, int], ...] = field(repr=False)
    grids: tuple[Grid, ...] = field(repr=False)

    def __post_init__(self):
        refuse("latency table", _problems(self))

    @property
    def phases(self) -> tuple[str, ...]:
        """What was measured: `"prefill"`, `"decode"`, or both."""
        return tuple(phase for phase, _ in self.grids[0].seconds)

    @functools.cached_property
    def grid(self) -> Mapping[str, Grid]:
        """Kind -> its grid."""
        return {grid.kind: grid for grid in self.grids}

    def check(self, cfg: ModelConfig, elastic: ElasticConfig | None = None) -> None:
        """Raises one ValueError with all that keeps the table from serving `cfg`.

        Args:
          elastic: counts that must lie within the measured widths too.
        """
        problems = list(_differences(self, vars(cfg)))
        offered = dict(elastic.choices) if elastic is not None else {}
        for kind in (ENDS, *cfg.pattern):
            if kind in self.grid:
                asked = {
                    axis: np.hstack([getattr(cfg, axis), *offered.get(axis, ())])
                    for axis in axes_of(kind)
                }
                problems += self.grid[kind].outside(asked)
        if problems:
            problems.append("measure a table for this model and these counts")
        refuse("a latency table of another model", problems)

    def seconds(self, sizes: Mapping[str, Any], phase: str) -> Any:
        """Seconds of a whole model: of one prefill, or of decoding one token.

        Args:
          sizes: the fields of a ModelConfig. Those of axes may be sums of masks,
            arrays with an entry per submodel, or tuples with one of these per block
            that has the axis. `layers`, where given, has a factor for every block.

        Raises:
          ValueError: another model, a width outside the grids (seen outside `jit`
            only), or a phase that was not measured.
        """
        if phase not in self.phases:
            said = did_you_mean(phase, self.phases)
            raise ValueError(f"latency table: no seconds of {phase!r}{said}")
        refuse("a latency table of another model", _differences(self, sizes))
        pattern, factors = sizes["pattern"], sizes.get("layers")
        total = self.grid[ENDS].at({"embed": sizes["embed"]}, phase)
        for kind in dict.fromkeys(pattern):
            blocks = [i for i, letter in enumerate(pattern) if letter == kind]
            given = {axis: sizes[axis] for axis in axes_of(kind)}
            if any(type(size) is tuple for size in given.values()):
                for axis, size in given.items():
                    if type(size) is tuple:
                        own = blocks_with(pattern, axis)
                        given[axis] = tuple(size[own.index(i)] for i in blocks)
                if factors is not None:
                    given["layers"] = tuple(factors[i] for i in blocks)
                given = _stacked(given, len(blocks))
                each = self.grid[kind].at(given, phase) * given.get("layers", 1)
                total = total + each.sum(axis=0)
            else:
                kept = (
                    len(blocks) if factors is None else sum(factors[i] for i in blocks)
                )
                total = total + kept * self.grid[kind].at(given, phase)
        return total

    def save(self, path: str | os.PathLike) -> None:
        """Writes the table as JSON, as a whole or not at all."""
        path = Path(path)
        beside = path.with_name(f"{path.name}.tmp")
        with beside.open("w") as file:
            file.write(json.dumps(self.to_dict(), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)

    @classmethod
    def read(
        cls, path: str | os.PathLike, *, device: str | None = None
    ) -> "LatencyTable":
        """The table that `save` wrote.

        Args:
          device: the one it must be of, such as `latency.device_name()`; None takes
            any.

        Raises:
          ValueError: no file, no table, values that cannot be, or another device; it
            names the file and the field.
        """
        path = Path(path)
        try:
            if not path.is_file() or path.stat().st_size > LARGEST_FILE_BYTES:
                raise ValueError(
                    f"expected a file of at most {LARGEST_FILE_BYTES} bytes"
                )
            table = cls.from_dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, RecursionError) as error:
            # Text of strangers may hold halves of characters, which none can print.
            said = str(error).encode("utf-8", "backslashreplace").decode()
            raise ValueError(f"{path}: {said}") from error
        if device not in (None, table.device):
            raise ValueError(
                f"{path}: device: measured on {table.device!r}, which is not "
                f"{device!r}; measure a table here"
            )
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {name: getattr(self, name) for name in _names(LatencyTable)}
        values |= {"scale": dict(self.scale), "fixed": dict(self.fixed)}
        values["grids"] = [
            {
                "kind": grid.kind,
                "widths": {axis: list(n) for axis, n in grid.widths},
                "seconds": {phase: list(n) for phase, n in grid.seconds},
            }
            for grid in self.grids
        ]
        return values

    @classmethod
    def from_dict(cls, values: Any) -> "LatencyTable":
        """The inverse of `to_dict`, also for what a stranger wrote.

        Raises:
          ValueError: with the member that is missing, unknown or cannot be.
        """
        given = dict(_members(values, _names(cls), "table"))
        for name in ("scale", "fixed"):
            given[name] = tuple(_typed(dict, given[name], name).items())
        grids = []
        for i, grid in enumerate(_typed(list, given["grids"], "grids")):
            at = f"grids[{i}]"
            grid = _members(grid, _names(Grid), at)
            try:
                grids.append(
                    Grid(
                        grid["kind"],
                        _tuples(grid["widths"], f"{at}.widths"),
                        _tuples(grid["seconds"], f"{at}.seconds"),
                    )
                )
            except ValueError as error:
                raise ValueError(f"{at}: {error}") from None
        return cls(**given | {"grids": tuple(grids)})


def _stacked(sizes: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    """`sizes` as arrays whose first dimension is the block."""
    xp = jnp if any_of_jax(sizes) else np
    each = {
        name: size if type(size) is tuple else (size,) * blocks
        for name, size in sizes.items()
    }
    shape = np.broadcast_shapes(*(np.shape(n) for size in each.values() for n in size))
    return {
        name: xp.stack([xp.broadcast_to(xp.asarray(n), shape) for n in size])
        for name, size in each.items()
    }


def _differences(table: LatencyTable, sizes: Mapping[str, Any]) -> Iterator[str]:
    """What of a model, other than widths, the table was not measured for."""
    for name, value in table.fixed:
        if sizes[name] != value:
            yield f"{name}: {sizes[name]}, measured at {value}"
    if missing := sorted(set(sizes["pattern"]) - set(table.grid)):
        yield f"pattern: no seconds of {missing}, measured {sorted(table.grid)}"


def _problems(table: LatencyTable) -> Iterator[str]:
    for name in ("device", "date", "jax", "dtype"):
        value = getattr(table, name)
        if not isinstance(value, str) or not value:
            yield f"{name}: expected text, got {shown(value)}"
    numbers = {name: getattr(table, name) for name in ("batch", "prompt", "context")}
    numbers |= {f"fixed.{name}": value for name, value in table.fixed}
    for name, value in numbers.items():
        if not is_size(value):
            yield f"{name}: expected a positive int, got {shown(value)}"
    if tuple(found := [name for name, _ in table.fixed]) != FIXED:
        yield f"fixed: expected {list(FIXED)}, got {shown(found)}"
    for phase, factor in table.scale:
        if type(factor) is not float or not 0 < factor < math.inf:
            yield f"scale.{phase}: expected a positive factor, got {shown(factor)}"
    kinds = [grid.kind for grid in table.grids]
    if ENDS not in kinds or len(set(kinds)) < len(kinds):
        yield f"grids: expected {ENDS!r} and others, each once, got {shown(kinds)}"
    phases = {tuple(phase for phase, _ in grid.seconds) for grid in table.grids}
    if {tuple(phase for phase, _ in table.scale), *phases} != phases or len(phases) > 1:
        yield "grids and scale: measured in different phases"


def _names(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind))


def _typed(kind: type, value: Any, where: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{where}: expected a {kind.__name__}, got {shown(value)}")
    return value


def _members(value: Any, names: tuple[str, ...], where: str) -> Mapping[str, Any]:
    given = _typed(dict, value, where)
    problems = [f"missing {name!r}" for name in names if name not in given]
    unknown = (name for name in given if name not in names)
    problems += [f"unknown {shown(n)}{did_you_mean(n, names)}" for n in unknown]
    refuse(where, problems)
    return given


def _tuples(value: Any, where: str) -> tuple[tuple[str, tuple], ...]:
    given = _typed(dict, value, where).items()
    return tuple((name, tuple(_typed(list, n, f"{where}.{name}"))) for name, n in given)
