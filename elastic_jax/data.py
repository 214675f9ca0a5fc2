"""Batches of examples in a reproducible order, resumable to the bit (Grain).

A source knows its examples by index and what it is by a digest; no task lives here.
Order is a function of (seed, position), so the whole state of an iterator is one
position; its state also records what the position belongs to, because the same
number on other data would resume silently in the wrong place.
"""

import bisect
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np

Example = Mapping[str, np.ndarray]


class Source(Protocol):
    """Examples by index, and a digest of what they are."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Example `index`: the same arrays whenever it is asked."""

    def digest(self) -> str:
        """Hex digest of the data's bytes, or of a generator and its parameters."""


class Arrays:
    """Examples that are the rows of arrays, in memory or memory-mapped.

    Args:
      arrays: name -> [examples, ...]; all of one length, of numbers.

    Raises:
      ValueError: with every array that does not fit.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        lengths = {name: len(a) if a.ndim else None for name, a in arrays.items()}
        problems = [
            f"{name}: expected rows of numbers, got {a.dtype} of shape {a.shape}"
            for name, a in arrays.items()
            if a.dtype.hasobject or a.ndim == 0
        ]
        if len(set(lengths.values())) != 1:
            problems.append(f"expected one number of rows, got {lengths}")
        if problems:
            raise ValueError("invalid Arrays:\n  " + "\n  ".join(problems))
        self._arrays = dict(arrays)
        self._length = lengths.popitem()[1]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        return {name: np.asarray(a[index]) for name, a in self._arrays.items()}

    def __repr__(self) -> str:
        shapes = (f"{n} {a.dtype}{list(a.shape)}" for n, a in self._arrays.items())
        return f"Arrays({', '.join(shapes)})"

    def digest(self) -> str:
        """SHA-256 of names, types, shapes and bytes; reads all data, row by row."""
        seen = hashlib.sha256()
        for name, array in sorted(self._arrays.items()):
            seen.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            for row in array:
                seen.update(np.ascontiguousarray(row))
        return seen.hexdigest()


class Mixture:
    """Several sources in one, drawn in proportion to their weights.

    Indices run through the sources, one behind the other; `batches` shuffles and
    repeats each by itself, so that a small source may come round more often.

    Args:
      weights: one positive number per source, kept to a hundredth of the smallest.

    Raises:
      ValueError: with everything that does not fit.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        problems = [
            f"sources[{i}]: no examples"
            for i, source in enumerate(sources)
            if not len(source)
        ]
        if len(weights) != len(sources) or not sources:
            problems.append(f"{len(weights)} weights for {len(sources)} sources")
        if odd := [w for w in weights if not 0 < w < math.inf]:
            problems.append(f"weights: expected positive numbers, got {odd}")
        if problems:
            raise ValueError("invalid Mixture:\n  " + "\n  ".join(problems))
        self._sources, self.weights = tuple(sources), tuple(map(float, weights))
        self._ends = list(itertools.accumulate(map(len, sources)))

    @property
    def ranges(self) -> list[range]:
        """The indices of each source."""
        return list(itertools.starmap(range, itertools.pairwise([0, *self._ends])))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        return self._sources[number][index - self.ranges[number].start]

    def digest(self) -> str:
        """SHA-256 of the sources' digests and weights, in order."""
        parts = zip(self._sources, self.weights, strict=True)
        each = [[source.digest(), weight] for source, weight in parts]
        return hashlib.sha256(json.dumps(each).encode()).hexdigest()


def batches(
    source: Source,
    *,
    batch: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
    threads: int = 1,
) -> "Batches":
    """Iterates over `source` in stacked batches.

    Args:
      batch: examples per step. No example is left out: with `repeat` batches run
        across the end of an epoch, without it the last one may be smaller. A
        mixture has no epoch of its own, so it must repeat.
      seed: of the order, 0 .. 2**32 - 1; every epoch is shuffled anew.
      threads: that read ahead; 0 reads when asked.

    Raises:
      ValueError: with everything that is wrong with the arguments.
    """
    problems = []
    if not _is_int(batch) or batch < 1:
        problems.append(f"batch: expected a positive int, got {batch!r}")
    if not _is_int(seed) or not 0 <= seed < 2**32:
        problems.append(f"seed: expected an int in 0..2**32 - 1, got {seed!r}")
    if not _is_int(threads) or threads < 0:
        problems.append(f"threads: expected an int from 0, got {threads!r}")
    if not 0 < len(source) <= 2**32:
        problems.append(f"source: {len(source)} examples, expected 1..2**32")
    if isinstance(source, Mixture) and not repeat:
        problems.append("repeat: expected True, a mixture has no end")
    if problems:
        raise ValueError("invalid batches:\n  " + "\n  ".join(problems))

    if isinstance(source, Mixture):
        orders = [
            _order(indices, (seed + number) % 2**32, shuffle, repeat)
            for number, indices in enumerate(source.ranges)
        ]
        order = grain.MapDataset.mix(orders, weights=source.weights)
    else:
        order = _order(range(len(source)), seed, shuffle, repeat)
    rows = order.map(lambda index: (index, source[int(index)]))
    stacked = rows.batch(batch, drop_remainder=False, batch_fn=_stack)
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    belongs_to = {
        "source": source.digest(),
        "batch": batch,
        "seed": seed,
        "shuffle": shuffle,
        "repeat": repeat,
    }
    return Batches(iter(stacked.to_iter_dataset(reading)), belongs_to)


def _order(indices: range, seed: int, shuffle: bool, repeat: bool):
    """`indices` in the order in which they are drawn, any of them at random access."""
    order = grain.MapDataset.range(indices.start, indices.stop).seed(seed)
    order = order.shuffle() if shuffle else order
    return order.repeat() if repeat else order


class Batches(Iterator[dict[str, np.ndarray]]):
    """The iterator that `batches` makes.

    Every batch holds the examples' arrays, stacked, and `index` int64 [batch], their
    indices in the source, so that an error can name them.
    """

    def __init__(self, steps: grain.DatasetIterator, belongs_to: Mapping[str, Any]):
        self._steps = steps
        self._belongs_to = dict(belongs_to)

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._steps)

    def get_state(self) -> dict[str, Any]:
        """The position and what it is a position in: plain values, for JSON."""
        return {"position": self._steps.get_state()["next_index"]} | self._belongs_to

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `get_state` was taken.

        Raises:
          ValueError: the state belongs to other data, or to another order of it;
            names everything that differs.
        """
        here = self.get_state()
        missing = sorted(set(here) - set(state)) + sorted(set(state) - set(here))
        if missing:
            raise ValueError(f"not a state of batches: {missing} missing or unknown")
        changed = [
            f"{name}: was {state[name]!r}, is {value!r}"
            for name, value in self._belongs_to.items()
            if state[name] != value
        ]
        position = state["position"]
        if not _is_int(position) or position < 0:
            changed.append(f"position: expected an int from 0, got {position!r}")
        if changed:
            raise ValueError(
                "the state belongs to other batches:\n  "
                + "\n  ".join(changed)
                + "\nrestore what changed, or start a new run"
            )
        self._steps.set_state({"next_index": position})

    def close(self) -> None:
        """Stops reading ahead."""
        self._steps.close()


def verify(source: Source, recorded_digest: str) -> None:
    """Refuses data that is not what a run recorded when it began.

    Raises:
      ValueError: names the source.
    """
    found = source.digest()
    if found != recorded_digest:
        raise ValueError(
            f"{source!r} has changed: its digest is {found}, recorded was "
            f"{recorded_digest}; restore the data, or start a new run"
        )


def _stack(rows: Sequence[tuple[int, Example]]) -> dict[str, np.ndarray]:
    """Stacks examples that agree in names, shapes and types; casts and pads nothing."""
    first, like = rows[0]
    for index, example in rows:
        if _form(example) != _form(like):
            raise ValueError(
                f"examples of one source differ: index {first} has {_form(like)}, "
                f"index {index} has {_form(example)}"
            )
    stacked = {name: np.stack([row[name] for _, row in rows]) for name in like}
    return stacked | {"index": np.array([index for index, _ in rows], np.int64)}


def _form(example: Example) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {name: (array.dtype, array.shape) for name, array in example.items()}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
