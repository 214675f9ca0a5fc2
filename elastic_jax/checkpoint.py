"""The nested checkpoint: one directory, every submodel a prefix, every chunk checked.

    DIRECTORY/
      manifest.json       all but array contents; written last, by rename
      arrays-1a2b3c4d/    an Orbax PyTree checkpoint (zarr3 in OCDBT)
      .lock               held by the process that writes

There are two kinds: `nested` (parameters in importance order, configuration, budgets,
router, scores, a tokenizer's files, provenance) and `train` (the state of a run, see
`saves.py`). The members of `manifest.json`:

    sha256    of the other members, as compact JSON with sorted keys
    format    "elastic_jax"; version 1 or 2; kind "nested" or "train"
    folder    where the arrays are; a folder that no manifest names is a stray
    files     path in the folder -> bytes, for every file
    arrays    name -> {"shape", "dtype", "chunks"}, and "per" in version 2
    record    what the kind adds: see `save_nested` and `saves.py`

An array's name is its path: `params.layers.3.up`. It is stored in chunks of one
shape, each compressed and followed by its CRC-32C. The B-tree that finds chunks
carries checksums of its own, and the manifest stands in for all other metadata: so
nothing is read that is not verified. Stock Orbax reads the folder too. Chunks are
small, because a prefix reads up to one chunk past its end on every dimension.

Quantized parameters make version 2. Each is several arrays, one step deeper
(`params.layers.3.up.values`, `.scale`, `.block_scale`, `.input_scale`; see `parts.py`),
in E4M3, or as the bytes that pack two E2M1 values. Entries of packed arrays say `"per":
{dim: weights that one element spans}`, so a prefix of n units is one of n / per
elements; `quantized` in the record says the format of each and the dtype that it is
used in. Both are only believed where they agree with the arrows. A reader refuses a
version, or a member, that it does not know.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax import nesting
from elastic_jax.axes import Counts
from elastic_jax.config import ModelConfig, did_you_mean
from elastic_jax.contents import (
    Formats,
    array_problems,
    budget_problems,
    formats_of,
    layout,
    tree_problems,
)
from elastic_jax.directories import appearing, locked
from elastic_jax.lazy import LazyArray
from elastic_jax.manifest import (
    MANIFEST,
    QUANTIZED,
    blaming,
    flat,
    foreign_entries,
    only,
    read_manifest,
    unflat,
)
from elastic_jax.model import param_specs
from elastic_jax.parts import invalid_scales
from elastic_jax.prefixes import Prefix, placed, prefixes
from elastic_jax.stored import StoredArrays, parallel, write_arrays


def save_nested(
    path: str | os.PathLike,
    params: Any,
    cfg: ModelConfig,
    *,
    budgets: Mapping[str, Counts],
    router: Any = None,
    scores: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes one checkpoint that holds a parent and all its submodels.

    It appears as a whole or not at all: `path` holds what it held until the end.

    Args:
      params: the parent in importance order, in any dtypes. Leaves may be `LazyArray`,
        those of a `QuantArray` too: they are read one at a time.
      budgets: name -> counts that were trained for, or that deserve a name.
      router: nested dicts and tuples of arrays.
      scores: axis -> array, or a tuple with one per block.
      provenance: plain values (JSON); tuples come back as lists.
      files: name -> content, of a tokenizer and alike; kept as they are.
      overwrite: replace the checkpoint that is there.
      on_bytes: called with the bytes of arrays that are written, and of all.

    Raises:
      ValueError: with everything that does not fit; `path` is taken or in use.
      OSError: the disk is full or failed; `path` is as before.
    """
    path = Path(path).absolute()
    scores = None if scores is None else {axis: scores[axis] for axis in scores}
    contents = {name: np.frombuffer(data, np.uint8) for name, data in _given(files)}
    trees = {"params": params, "router": router, "scores": scores, "files": contents}
    arrays = {}
    for root, tree in trees.items():
        arrays |= flat(tree, root)
    formats = formats_of(params)
    record = {
        "config": cfg.to_dict(),
        "budgets": {name: dict(counts) for name, counts in budgets.items()},
        "provenance": dict(provenance or {}),
    }
    if formats:
        record[QUANTIZED] = formats
    problems = [*tree_problems(params, cfg)]
    problems = problems or [*_problems(cfg, record["budgets"], arrays, formats)]
    problems += [
        f"{root}: expected nested dicts and tuples, none of them empty"
        for root in ("router", "scores")
        if jax.tree.structure(trees[root]) != jax.tree.structure(unflat(arrays, root))
    ]
    if problems:
        raise ValueError(f"cannot save {path}:\n  " + "\n  ".join(problems))

    if path.is_dir() and (others := foreign_entries(path)):
        raise ValueError(f"{path} holds other files: {others[:5]}")
    expected = layout(cfg, formats)
    if not path.exists():
        with appearing(path) as partial:
            write_arrays(partial, "nested", arrays, record, expected, on_bytes)
        return
    with locked(path):
        if (path / MANIFEST).exists() and not overwrite:
            raise ValueError(f"{path} is a checkpoint; use another path, or overwrite")
        write_arrays(path, "nested", arrays, record, expected, on_bytes)


def _given(files: Mapping[str, bytes] | None) -> Iterator[tuple[str, bytes]]:
    for name, data in (files or {}).items():
        if not isinstance(data, bytes):
            raise ValueError(f"files: {name!r} is {type(data).__name__}, not bytes")
        yield name, data


@dataclass(frozen=True)
class Nested:
    """A nested checkpoint whose metadata is read and checked; `open_nested` makes it.

    Attributes:
      path: the directory.
      cfg: the parent's configuration.
      budgets: name -> counts.
      provenance: as it was saved.
      size_bytes: of the stored arrays, on disk.
      dtypes: name of each stored array, such as `params.layers.3.up` -> its dtype.
      formats: name of each quantized parameter -> its format, such as `nvfp4`.
    """

    path: Path
    cfg: ModelConfig
    budgets: Mapping[str, Counts]
    provenance: Mapping[str, Any]
    size_bytes: int
    dtypes: Mapping[str, str] = field(repr=False)
    formats: Mapping[str, str] = field(repr=False)
    _quantized: Formats = field(repr=False)
    _arrays: "StoredArrays" = field(repr=False)

    def storage(self) -> list[dict[str, Any]]:
        """What is stored how, in rows: no array is read.

        Returns:
          for each part (`params`, `router`, ...) and each format or dtype in it: how
          many arrays, a quantized weight counting as one; their elements; `bytes`
          before compression, scales included; and whether they are `packed`.
        """
        rows: dict[tuple, dict[str, Any]] = {}
        for name, entry in self._arrays.entries.items():
            whole, _, part = name.rpartition(".")
            format = self.formats.get(whole)
            key = (name.split(".")[0], format or entry["dtype"])
            new = {"part": key[0], "format": key[1], "arrays": 0, "elements": 0}
            row = rows.setdefault(key, {**new, "bytes": 0, "packed": bool(format)})
            elements = math.prod(entry["shape"])
            row["bytes"] += elements * jnp.dtype(entry["dtype"]).itemsize
            if not format or part == "values":
                row["arrays"] += 1
                row["elements"] += elements * math.prod(entry.get("per", {}).values())
        return [rows[key] for key in sorted(rows)]

    def router(self) -> Any:
        """The router's tree in numpy arrays, read now; None if there is none."""
        return self._arrays.tree("router")

    def scores(self) -> dict[str, Any] | None:
        """Scores by axis in numpy arrays, read now; None if there are none."""
        return self._arrays.tree("scores")

    def files(self) -> dict[str, bytes]:
        """The files that were saved, by name."""
        found = self._arrays.tree("files") or {}
        return {name: content.tobytes() for name, content in found.items()}

    def lazy(
        self,
        budget: str | Mapping | None = None,
        *,
        dtype: Any = None,
        allow_nonfinite: bool = False,
    ) -> tuple[Any, ModelConfig]:
        """As `restore`, in leaves that are read, and verified, when they are needed."""
        stored, cfg = self._stored(budget, dtype)

        def lazily(part: Prefix) -> LazyArray:
            def read() -> np.ndarray:
                value = self._arrays.prefix(part.name, part.shape, part.dtype)
                if part.is_scale and not allow_nonfinite:
                    self._refuse({part.name: invalid_scales(value)})
                return value

            return LazyArray(part.shape, part.dtype, read)

        return jax.tree.map(lazily, stored), cfg

    def restore(
        self,
        budget: str | Mapping | None = None,
        *,
        dtype: Any = None,
        shardings: Any = None,
        allow_nonfinite: bool = False,
    ) -> tuple[Any, ModelConfig]:
        """Reads a submodel, no other bytes, and verifies every chunk on the way.

        Args:
          budget: the name of a budget, any counts, or None for the parent.
          dtype: a floating dtype to cast to; None keeps what is stored. Quantized
            weights stay as they are, and are used in this dtype.
          shardings: one sharding, or a tree of them shaped like the submodel, as
            `param_shardings` gives for its configuration.
          allow_nonfinite: take scales of quantized weights that are NaN, infinite,
            zero or negative.

        Returns:
          the submodel's parameters and its configuration; quantized weights are
          `QuantArray`s.

        Raises:
          ValueError: unknown or impossible counts, a damaged file, or invalid scales,
            all of them.
        """
        stored, cfg = self._stored(budget, dtype)
        leaves, structure = jax.tree.flatten(
            placed(shardings, stored, param_specs(cfg))
        )
        invalid: dict[str, int] = {}

        def read(part: Prefix) -> jax.Array:
            def look(value: np.ndarray) -> None:
                if part.is_scale and not allow_nonfinite:
                    n = invalid_scales(value)
                    invalid[part.name] = invalid.get(part.name, 0) + n

            return self._arrays.jax(
                part.name, part.shape, part.dtype, part.sharding, look
            )

        values = parallel(read, leaves)
        self._refuse(invalid)
        return jax.tree.unflatten(structure, values), cfg

    def _refuse(self, invalid: Mapping[str, int]) -> None:
        """Raises if there are invalid scales in any array."""
        found = [
            f"{name}: {n} scales are NaN, infinite, zero or negative"
            for name, n in sorted(invalid.items())
            if n
        ]
        if found:
            what = "holds what no quantized weight has; to restore it, allow_nonfinite"
            raise ValueError("\n  ".join([f"{self.path} {what}:", *found]))

    def _stored(self, budget, dtype) -> tuple[Any, ModelConfig]:
        """A submodel's tree of what to read of which arrays, and its configuration."""
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"restore: expected a floating dtype, got {dtype}")
        counts = self.counts(budget)
        return prefixes(self.cfg, counts, self.dtypes, self._quantized, dtype)

    def counts(self, budget: str | Mapping | None) -> Counts:
        """The counts of a budget by name, or any counts, once they are checked."""
        if budget is None or isinstance(budget, Mapping):
            return nesting.counts(self.cfg, **(budget or {}))
        if budget not in self.budgets:
            hint = did_you_mean(budget, self.budgets)
            raise ValueError(f"{self.path} has no budget {budget!r}{hint}")
        return self.budgets[budget]


def open_nested(path: str | os.PathLike) -> Nested:
    """Opens a nested checkpoint: reads and checks its metadata, no array.

    Raises:
      ValueError: no such checkpoint, files that are missing or cut short, or metadata
        that cannot be true; with everything that is wrong.
    """
    path = Path(path).absolute()
    manifest = read_manifest(path, "nested")
    with blaming(path / MANIFEST):
        record = manifest.record
        formats = record.get(QUANTIZED, {})
        more = {QUANTIZED} & record.keys()
        only(record, {"config", "budgets", "provenance"} | more)
        cfg = ModelConfig.from_dict(record["config"])
        given = {
            name: {a: tuple(n) if isinstance(n, list) else n for a, n in counts.items()}
            for name, counts in record["budgets"].items()
        }
        problems = [*_problems(cfg, given, manifest.arrays, formats)]
        if not isinstance(record["provenance"], dict):
            problems.append(f"provenance is a {type(record['provenance']).__name__}")
        if problems:
            raise ValueError("\n  ".join(["describes no model:", *problems]))
        return Nested(
            path=path,
            cfg=cfg,
            budgets={name: nesting.counts(cfg, **kept) for name, kept in given.items()},
            provenance=record["provenance"],
            size_bytes=manifest.size_bytes,
            dtypes={name: entry["dtype"] for name, entry in manifest.arrays.items()},
            formats={name: said["format"] for name, said in formats.items()},
            _quantized=formats,
            _arrays=StoredArrays(manifest.folder, manifest.arrays),
        )


def _problems(
    cfg: ModelConfig, budgets: Mapping, arrays: Mapping, formats: Formats
) -> Iterator[str]:
    """Arrays (or their entries) that `cfg` does not have; budgets that do not fit."""
    try:
        expected = layout(cfg, formats)
    except ValueError as error:
        yield str(error)
        return
    yield from array_problems(expected, arrays)
    yield from budget_problems(cfg, budgets, formats)
