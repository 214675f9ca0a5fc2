"""Seconds of one kind of block at a grid of widths, and linear between them.

The work of a block is a sum of products of widths, none of them twice in a product. To
be linear in each width is therefore exact for whatever is proportional to work, and
the widths inside a grid catch what is not.

Sizes may be integers, float32 sums of masks, which a router differentiates, or arrays
of many submodels at once.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax.axes import AXES, BLOCK_KINDS
from elastic_jax.config import LARGEST_SIZE, did_you_mean

ENDS = "ends"  # of a model: embedding, final norm and head
PHASES = ("prefill", "decode")

LARGEST_GRID = 2**16  # combinations of widths
ROUNDING = 1e-5  # the share by which a sum of masks may leave a grid


def axes_of(kind: str) -> tuple[str, ...]:
    """The axes on which a kind of block has widths: `embed`, and its own."""
    own = (axis for axis in AXES if kind != ENDS and kind in AXES[axis].blocks)
    return ("embed", *own)


@dataclass(frozen=True)
class Grid:
    """Seconds of one kind of block at every combination of some widths.

    Attributes:
      kind: a block's letter, or `"ends"`.
      widths: (axis, ascending widths), for each of `axes_of(kind)`.
      seconds: (phase, seconds at every combination, the last axis fastest).

    Raises:
      ValueError: with every problem at once.
    """

    kind: str
    widths: tuple[tuple[str, tuple[int, ...]], ...]
    seconds: tuple[tuple[str, tuple[float, ...]], ...]

    def __post_init__(self):
        refuse(f"grid of {shown(self.kind)}", _problems(self))

    def at(self, sizes: Mapping[str, Any], phase: str) -> Any:
        """Seconds at `sizes`, which broadcast; float32 where one of them is JAX's.

        Raises:
          ValueError: a width outside the grid, where it can be looked at.
        """
        refuse("widths outside the latency table", self.outside(sizes))
        xp = jnp if any_of_jax(sizes) else np
        dtype = np.float32 if xp is jnp else np.float64
        shape = [len(widths) for _, widths in self.widths]
        table = xp.asarray(np.reshape(dict(self.seconds)[phase], shape), dtype)
        neighbours = []  # per axis, (index, weight) of the two
        for axis, widths in self.widths:
            if len(widths) == 1:
                neighbours.append([(0, 1)])
                continue
            # A width of the grid looks upwards, the last one back: there is a slope
            # to learn from everywhere.
            nodes, x = xp.asarray(widths, dtype), xp.asarray(sizes[axis], dtype)
            i = xp.clip(xp.searchsorted(nodes, x, "right") - 1, 0, len(widths) - 2)
            share = (x - nodes[i]) / (nodes[i + 1] - nodes[i])
            neighbours.append([(i, 1 - share), (i + 1, share)])
        total = 0.0
        for corner in itertools.product(*neighbours):
            index, weights = zip(*corner, strict=True)
            total = total + math.prod(weights) * table[index]
        return total

    def outside(self, sizes: Mapping[str, Any]) -> Iterator[str]:
        """Which of `sizes` the grid does not reach; traced ones are not looked at."""
        for axis, widths in self.widths:
            if isinstance(sizes[axis], jax.core.Tracer):
                continue
            asked = np.ravel(np.asarray(sizes[axis], float))
            low, high = widths[0] * (1 - ROUNDING), widths[-1] * (1 + ROUNDING)
            for width in dict.fromkeys(asked[~((low <= asked) & (asked <= high))]):
                ends = " to ".join(map(str, dict.fromkeys((widths[0], widths[-1]))))
                yield f"{axis}: {width:g} in {self.kind!r}, measured at {ends}"


def any_of_jax(sizes: Mapping[str, Any]) -> bool:
    """Whether any of `sizes`, or any entry of one, is an array of JAX."""
    return any(isinstance(x, jax.Array) for x in jax.tree.leaves(dict(sizes)))


def refuse(what: str, problems: Iterable[str]) -> None:
    """Raises one ValueError with all problems, if there are any."""
    if found := list(dict.fromkeys(problems)):
        raise ValueError(f"{what}:\n  " + "\n  ".join(found))


def is_size(value: Any) -> bool:
    """Whether a value is a positive int that can be a size."""
    return type(value) is int and 0 < value <= LARGEST_SIZE


def shown(value: Any) -> str:
    """A stranger's value, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _problems(grid: Grid) -> Iterator[str]:
    known = (*BLOCK_KINDS, ENDS)
    if grid.kind not in known:
        yield f"kind: {shown(grid.kind)}{did_you_mean(shown(grid.kind), known)}"
        return
    found, expected = tuple(axis for axis, _ in grid.widths), axes_of(grid.kind)
    if found != expected:
        yield f"widths: expected {list(expected)}, got {shown(list(found))}"
        return
    for axis, widths in grid.widths:
        sound = bool(widths) and all(map(is_size, widths))
        if not sound or list(widths) != sorted(set(widths)):
            yield f"widths.{axis}: expected ascending sizes, got {shown(widths)}"
            return
    points = math.prod(len(widths) for _, widths in grid.widths)
    if points > LARGEST_GRID:
        yield f"widths: {points} combinations, at most {LARGEST_GRID}"
    phases = [phase for phase, _ in grid.seconds]
    if not phases or phases != [phase for phase in PHASES if phase in phases]:
        yield f"seconds: expected some of {list(PHASES)}, got {shown(phases)}"
    for phase, seconds in grid.seconds:
        if len(seconds) != points:
            yield f"seconds.{phase}: {len(seconds)} numbers, expected {points}"
        for i, value in enumerate(seconds):
            if type(value) is not float or not 0 < value < math.inf:
                yield (
                    f"seconds.{phase}[{i}]: expected a positive finite number, got "
                    f"{shown(value)}"
                )
                break
