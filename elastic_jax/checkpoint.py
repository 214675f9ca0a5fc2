"""The nested checkpoint: one directory, every submodel a prefix, every chunk checked.

    DIRECTORY/
      manifest.json       all but array contents; written last, by rename
      arrays-1a2b3c4d/    an Orbax PyTree checkpoint (zarr3 in OCDBT)
      .lock               held by the process that writes

There are two kinds: `nested` (parameters in importance order, configuration, budgets,
router, scores, a tokenizer's files, provenance) and `train` (the state of a run, see
`saves.py`). The members of `manifest.json`:

    sha256    of the other members, as compact JSON with sorted keys
    format    "elastic_jax"; version 1; kind "nested" or "train"
    folder    where the arrays are; a folder that no manifest names is a stray
    files     path in the folder -> bytes, for every file
    arrays    name -> {"shape", "dtype", "chunks"}
    record    what the kind adds: see `save_nested` and `saves.py`

An array's name is its path: `params.layers.3.up`. It is stored in chunks of one
shape, each compressed and followed by its CRC-32C. The B-tree that finds chunks
carries checksums of its own, and the manifest stands in for all other metadata: so
nothing is read that is not verified. Stock Orbax reads the folder too. Chunks are
small, because a prefix reads up to one chunk past its end on every dimension.

Room for quantized values: a parameter may become several arrays, one step deeper
(`params.layers.3.up.values`, `.block_scales`, `.scale`), each of whose entries says
`"per": {dim: units that one stored element spans}`, 2 for packed 4-bit values and 16
for block scales, so that a prefix of n units is one of n / per elements. That will be
version 2: a reader refuses a version, or a member, that it does not know.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax import axes, nesting
from elastic_jax.axes import Counts
from elastic_jax.config import ModelConfig, did_you_mean
from elastic_jax.directories import appearing, locked
from elastic_jax.lazy import LazyArray
from elastic_jax.manifest import (
    MANIFEST,
    array_name,
    blaming,
    flat,
    foreign_entries,
    only,
    read_manifest,
    unflat,
)
from elastic_jax.model import param_specs
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
      params: the parent in importance order, in any dtypes. Leaves may be `LazyArray`:
        they are read one at a time.
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
    record = {
        "config": cfg.to_dict(),
        "budgets": {name: dict(counts) for name, counts in budgets.items()},
        "provenance": dict(provenance or {}),
    }
    problems = [*_problems(cfg, record["budgets"], arrays)]
    problems += [
        f"{root}: expected nested dicts and tuples, none of them empty"
        for root in ("router", "scores")
        if jax.tree.structure(trees[root]) != jax.tree.structure(unflat(arrays, root))
    ]
    if problems:
        raise ValueError(f"cannot save {path}:\n  " + "\n  ".join(problems))

    if path.is_dir() and (others := foreign_entries(path)):
        raise ValueError(f"{path} holds other files: {others[:5]}")
    dims = {array_name("params", *p): spec.dims for p, spec in param_specs(cfg)}
    if not path.exists():
        with appearing(path) as partial:
            write_arrays(partial, "nested", arrays, record, dims, on_bytes)
        return
    with locked(path):
        if (path / MANIFEST).exists() and not overwrite:
            raise ValueError(f"{path} is a checkpoint; use another path, or overwrite")
        write_arrays(path, "nested", arrays, record, dims, on_bytes)


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
    """

    path: Path
    cfg: ModelConfig
    budgets: Mapping[str, Counts]
    provenance: Mapping[str, Any]
    size_bytes: int
    dtypes: Mapping[str, str] = field(repr=False)
    _arrays: "StoredArrays" = field(repr=False)

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
        self, budget: str | Mapping | None = None, *, dtype: Any = None
    ) -> tuple[Any, ModelConfig]:
        """As `restore`, in leaves that are read, and verified, when they are needed."""
        leaves, cfg = self._leaves(budget, dtype)
        read = lambda name, shape, kind: LazyArray(
            shape, kind, lambda: self._arrays.prefix(name, shape, kind)
        )
        return axes.nest({path: read(*leaf) for path, leaf in leaves.items()}), cfg

    def restore(
        self,
        budget: str | Mapping | None = None,
        *,
        dtype: Any = None,
        shardings: Any = None,
    ) -> tuple[Any, ModelConfig]:
        """Reads a submodel, no other bytes, and verifies every chunk on the way.

        Args:
          budget: the name of a budget, any counts, or None for the parent.
          dtype: a floating dtype to cast to; None keeps what is stored.
          shardings: one sharding, or a tree of them shaped like the submodel, as
            `param_shardings` gives for its configuration.

        Returns:
          the submodel's parameters and its configuration.

        Raises:
          ValueError: unknown or impossible counts, or a damaged file.
        """
        leaves, cfg = self._leaves(budget, dtype)
        placed = _placements(shardings, param_specs(cfg))
        read = lambda path: self._arrays.jax(*leaves[path], placed[path])
        values = parallel(read, leaves)
        return axes.nest(dict(zip(leaves, values, strict=True))), cfg

    def _leaves(self, budget, dtype) -> tuple[dict[axes.Path, tuple], ModelConfig]:
        """Path in the submodel -> stored array's name, shape of its prefix, dtype."""
        counts = self.counts(budget)
        cfg = nesting.slice_config(self.cfg, counts)
        specs = param_specs(cfg)
        on = nesting.resolved(self.cfg, counts)["layers"]
        kept = [i for i, keep in enumerate(on) if keep]
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"restore: expected a floating dtype, got {dtype}")
        leaves = {}
        for path, spec in specs:
            stored = path
            if path[0] == "layers":
                stored = ("layers", kept[path[1]], *path[2:])
            name = array_name("params", *stored)
            kind = jnp.dtype(self.dtypes[name] if dtype is None else dtype)
            leaves[path] = name, axes.shape(cfg, specs, path, spec), kind
        return leaves, cfg

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
        only(record, {"config", "budgets", "provenance"})
        cfg = ModelConfig.from_dict(record["config"])
        given = {
            name: {a: tuple(n) if isinstance(n, list) else n for a, n in counts.items()}
            for name, counts in record["budgets"].items()
        }
        problems = [*_problems(cfg, given, manifest.arrays)]
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
            _arrays=StoredArrays(manifest.folder, manifest.arrays),
        )


def _problems(cfg: ModelConfig, budgets: Mapping, arrays: Mapping) -> Iterator[str]:
    """Arrays (or their entries) that `cfg` does not have; budgets that do not fit."""
    specs = param_specs(cfg)
    expected = {
        array_name("params", *path): axes.shape(cfg, specs, path, spec)
        for path, spec in specs
    }
    found = {
        name: tuple(leaf["shape"] if isinstance(leaf, dict) else np.shape(leaf))
        for name, leaf in arrays.items()
        if name.startswith("params.")
    }
    for name in sorted({*expected, *found}):
        have, want = (d.get(name, "nothing") for d in (found, expected))
        if have != want:
            yield f"{name}: found {have}, expected {want}"

    depths = {}
    for name, given in budgets.items():
        try:
            counts = nesting.counts(cfg, **given)
            depths[name] = {i for i, on in enumerate(counts.get("layers", ())) if on}
        except (ValueError, TypeError) as error:
            yield f"budget {name!r}: {error}"
    # Prefixes always nest; blocks are chosen one by one, so they need not.
    shallow = sorted((n for n in depths if depths[n]), key=lambda n: len(depths[n]))
    for small, large in zip(shallow, shallow[1:], strict=False):
        if odd := depths[small] - depths[large]:
            yield f"budget {small!r} keeps blocks {sorted(odd)}, not in {large!r}"


def _placements(shardings: Any, specs) -> dict[axes.Path, Any]:
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys((path for path, _ in specs), shardings)
    try:
        return {path: axes.leaf(shardings, path) for path, _ in specs}
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"shardings: {error!r} is missing; expected one sharding, or a tree shaped "
            "like the submodel, as param_shardings gives for its configuration"
        ) from None
