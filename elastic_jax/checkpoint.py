"""The nested checkpoint: one directory, every submodel a prefix, every chunk checked.

    DIRECTORY/
      manifest.json       all but array contents; written last, by rename
      arrays-1a2b3c4d/    an Orbax PyTree checkpoint (zarr3 in OCDBT)
      .lock               held by the process that writes

There are two kinds: `nested` (parameters in importance order, configuration, budgets,
router, scores, provenance) and `train` (the state of a run, `step_00000100/` in its
working directory, whose `.lock` the run holds). The members of `manifest.json`:

    sha256    of the other members, as compact JSON with sorted keys
    format    "elastic_jax"; version 1; kind "nested" or "train"
    folder    where the arrays are; a folder that no manifest names is a stray
    files     path in the folder -> bytes, for every file
    arrays    name -> {"shape", "dtype", "chunks"}
    record    what the kind adds: see `save_nested` and `TrainCheckpoints.save`

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

import contextlib
import functools
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from elastic_jax import axes, nesting
from elastic_jax.axes import Counts
from elastic_jax.config import ModelConfig, did_you_mean
from elastic_jax.manifest import (
    MANIFEST,
    array_name,
    blaming,
    chunk_shape,
    flat,
    foreign_entries,
    is_scalar,
    locked,
    only,
    plain,
    read_manifest,
    remove_strays,
    storable,
    unflat,
    write_manifest,
)
from elastic_jax.model import param_specs

STEP = re.compile(r"step_([0-9]{8,})")

# The checksum covers compressed bytes: fewer of them, and cheaper to verify.
CODECS = (
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 1}},
    {"name": "crc32c"},
)


# ------------------------------------------------------------ the nested checkpoint


def save_nested(
    path: str | os.PathLike,
    params: Any,
    cfg: ModelConfig,
    *,
    budgets: Mapping[str, Counts],
    router: Any = None,
    scores: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes one checkpoint that holds a parent and all its submodels.

    It appears as a whole or not at all: `path` holds what it held until the end.

    Args:
      params: the parent in importance order, in any dtypes.
      budgets: name -> counts that were trained for, or that deserve a name.
      router: nested dicts and tuples of arrays.
      scores: axis -> array, or a tuple with one per block.
      provenance: plain values (JSON); tuples come back as lists.
      overwrite: replace the checkpoint that is there.

    Raises:
      ValueError: with everything that does not fit; `path` is taken or in use.
      OSError: the disk is full or failed; `path` is as before.
    """
    path = Path(path).absolute()
    scores = None if scores is None else {axis: scores[axis] for axis in scores}
    trees = {"params": params, "router": router, "scores": scores}
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
    with locked(path):
        if (path / MANIFEST).exists() and not overwrite:
            raise ValueError(f"{path} is a checkpoint; use another path, or overwrite")
        _write(path, "nested", arrays, record, dims)


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
    _arrays: "_Arrays" = field(repr=False)

    def router(self) -> Any:
        """The router's tree in numpy arrays, read now; None if there is none."""
        return self._arrays.tree("router")

    def scores(self) -> dict[str, Any] | None:
        """Scores by axis in numpy arrays, read now; None if there are none."""
        return self._arrays.tree("scores")

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
        counts = self._counts(budget)
        cfg = nesting.slice_config(self.cfg, counts)
        specs = param_specs(cfg)
        on = nesting.resolved(self.cfg, counts)["layers"]
        kept = [i for i, keep in enumerate(on) if keep]
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"restore: expected a floating dtype, got {dtype}")
        placed = _placements(shardings, specs)

        def read(item):
            path, spec = item
            if path[0] == "layers":
                path = ("layers", kept[path[1]], *path[2:])
            name, shape = array_name("params", *path), axes.shape(cfg, specs, *item)
            return self._arrays.jax(name, shape, dtype, placed[item[0]])

        leaves = _parallel(read, specs)
        paths = (path for path, _ in specs)
        return axes.nest(dict(zip(paths, leaves, strict=True))), cfg

    def _counts(self, budget: str | Mapping | None) -> Counts:
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
        if problems:
            raise ValueError("\n  ".join(["describes no model:", *problems]))
        return Nested(
            path=path,
            cfg=cfg,
            budgets={name: nesting.counts(cfg, **kept) for name, kept in given.items()},
            provenance=record["provenance"],
            size_bytes=manifest.size_bytes,
            dtypes={name: entry["dtype"] for name, entry in manifest.arrays.items()},
            _arrays=_Arrays(manifest.folder, manifest.arrays),
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


# --------------------------------------------------------- checkpoints while training


class TrainCheckpoints:
    """Saves of a run by step, each of them whole or absent; a context manager.

    Opening removes what killed saves left behind, and holds the directory until
    `close`: two runs cannot mix. The newest `keep` steps stay.

    Raises:
      ValueError: another process holds `workdir`.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, got {keep}")
        self.workdir, self.keep = Path(workdir).absolute(), keep
        self._held = contextlib.ExitStack()
        self._held.enter_context(locked(self.workdir))
        for entry in self.workdir.iterdir():
            stray = STEP.fullmatch(entry.name) and not (entry / MANIFEST).exists()
            if stray and not foreign_entries(entry):
                shutil.rmtree(entry)

    def close(self) -> None:
        """Lets other processes use the directory."""
        self._held.close()

    def __enter__(self) -> "TrainCheckpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def steps(self) -> list[int]:
        """All complete steps, ascending."""
        names = (entry.parent.name for entry in self.workdir.glob(f"*/{MANIFEST}"))
        return sorted(int(found[1]) for found in map(STEP.fullmatch, names) if found)

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
        """Writes a step; when this returns, it is on disk.

        Args:
          state: a tree of arrays, random keys, Python numbers and strings.
          record: plain values (JSON); tuples come back as lists.

        Raises:
          ValueError: the step exists, or something cannot be stored.
          OSError: the disk is full or failed; earlier steps are intact.
        """
        target = self._at(step)
        if (target / MANIFEST).exists():
            raise ValueError(f"step {step} is saved already: {target}")
        leaves = flat(state, "state")
        scalars = {name: leaf for name, leaf in leaves.items() if is_scalar(leaf)}
        keys = {name: leaf for name, leaf in leaves.items() if _is_key(leaf)}
        arrays = {name: leaves[name] for name in leaves if name not in scalars}
        if odd := [name for name, leaf in arrays.items() if not hasattr(leaf, "dtype")]:
            raise ValueError(f"neither arrays nor plain numbers and strings: {odd}")
        arrays |= {name: jax.random.key_data(key) for name, key in keys.items()}
        content = {
            "leaves": {name: _described(leaf) for name, leaf in leaves.items()},
            "scalars": scalars,
            "keys": {name: str(jax.random.key_impl(key)) for name, key in keys.items()},
            "run": record,
        }
        target.mkdir(exist_ok=True)  # writes of a failed save may end after it
        try:
            _write(target, "train", arrays, content)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        for old in self.steps()[: -self.keep]:
            (self._at(old) / MANIFEST).unlink()  # from here on it is a stray
            shutil.rmtree(self._at(old))

    def record(self, step: int) -> dict[str, Any]:
        """The record of a step; reads no array."""
        return read_manifest(self._at(step), "train").record["run"]

    def restore(self, step: int, template: Any) -> Any:
        """The state of a step, to the bit, in the structure of `template`.

        Args:
          template: the state's structure, shapes and dtypes, in arrays or
            `jax.ShapeDtypeStruct`; each array is placed as its template is.

        Raises:
          ValueError: a damaged file; or with every difference from the template, for
            nothing is cast.
        """
        manifest = read_manifest(self._at(step), "train")
        record, arrays = manifest.record, _Arrays(manifest.folder, manifest.arrays)
        likes, stored = flat(template, "state"), record["leaves"]
        expected = {name: _described(like) for name, like in likes.items()}
        differences = [
            f"{name}: stored {stored.get(name, 'nothing')}, "
            f"expected {expected.get(name, 'nothing')}"
            for name in sorted({*stored, *expected})
            if stored.get(name) != expected.get(name)
        ]
        if differences:
            raise ValueError("\n  ".join([f"{manifest.path} differs:", *differences]))

        def read(item):
            name, like = item
            if is_scalar(like):
                return record["scalars"][name]
            if isinstance(like, (np.ndarray, np.generic)):
                value = arrays.numpy(name)
                return value if isinstance(like, np.ndarray) else value[()]
            place = like.sharding if getattr(like, "committed", True) else None
            if not _is_key(like):
                return arrays.jax(name, like.shape, None, place)
            data, impl = arrays.numpy(name), record["keys"][name]
            return jax.device_put(jax.random.wrap_key_data(data, impl=impl), place)

        leaves = _parallel(read, likes.items())
        return jax.tree.unflatten(jax.tree.structure(template), leaves)

    def _at(self, step: int) -> Path:
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step: expected an int from 0 on, got {step!r}")
        return self.workdir / f"step_{step:08d}"


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", object), jax.dtypes.prng_key)


def _described(leaf: Any) -> str:
    """What a leaf is, but for its value: `float32[4, 8]`, `key<fry>[]`, `int`."""
    if not hasattr(leaf, "dtype"):
        return type(leaf).__name__
    return f"{leaf.dtype}{list(leaf.shape)}"


# --------------------------------------------------------- arrays, on disk and back


def _write(
    path: Path, kind: str, arrays: Mapping, record: Mapping, dims: Mapping | None = None
) -> None:
    """Makes `path`, which the caller has locked, the checkpoint of these arrays.

    `dims` names the dimensions of arrays that are read in part.
    """
    record = plain(record, "record")
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    refused = [f"{k}: {v.dtype}" for k, v in arrays.items() if not storable(v.dtype)]
    if refused:
        raise ValueError("\n  ".join(["cannot store these dtypes:", *refused]))
    entries = {
        name: {
            "shape": list(a.shape),
            "dtype": a.dtype.name,
            "chunks": list(chunk_shape(a.shape, a.itemsize, (dims or {}).get(name))),
        }
        for name, a in arrays.items()
    }
    filled = {tuple(name.split(".")): a for name, a in arrays.items() if a.size}
    folder = f"arrays-{secrets.token_hex(4)}"
    remove_strays(path)
    try:
        with ocp.Checkpointer(_orbax_handler(entries)) as orbax:
            orbax.save(path / folder, args=ocp.args.PyTreeSave(axes.nest(filled)))
        stored = _Arrays(path / folder, entries)
        _parallel(stored.check_metadata, entries)
        write_manifest(path, kind, folder, entries, record)
    except Exception as error:
        raise OSError(
            f"{path}: not saved, what was there is as before; {error}"
        ) from error
    finally:
        remove_strays(path)


def _orbax_handler(entries: Mapping[str, Any]) -> ocp.PyTreeCheckpointHandler:
    """Orbax's writer of trees, with our chunks and checksums."""

    class Checksummed(ocp.type_handlers.NumpyHandler):
        async def _open_and_write(self, value, tspec, ts_context):
            name = tspec["kvstore"]["path"].strip("/")
            tspec = tspec | {"metadata": _zarr(entries[name])}
            await super()._open_and_write(value, tspec, ts_context)

    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, Checksummed(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # unused; Orbax warns without
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=True, type_handler_registry=registry
    )


def _zarr(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The zarr3 metadata of an array."""
    grid = {"name": "regular", "configuration": {"chunk_shape": entry["chunks"]}}
    return {
        "shape": entry["shape"],
        "data_type": entry["dtype"],
        "chunk_grid": grid,
        "codecs": list(CODECS),
    }


class _Arrays:
    """Stored arrays by name; whatever is read is verified."""

    def __init__(self, folder: Path, entries: Mapping[str, Mapping[str, Any]]):
        self.folder, self.entries = folder, entries
        # One cache of B-tree nodes for all arrays, or each would read them again.
        self._context = ts.Context({"cache_pool#nodes": {"total_bytes_limit": 10**8}})

    def numpy(self, name: str) -> np.ndarray:
        """A whole array."""
        return self._read(name, tuple(slice(n) for n in self.entries[name]["shape"]))

    def jax(self, name: str, shape: tuple[int, ...], dtype, sharding) -> jax.Array:
        """The first `shape` of an array, cast if `dtype`; each device gets its part."""
        target = jnp.dtype(self.entries[name]["dtype"] if dtype is None else dtype)
        if jax.dtypes.canonicalize_dtype(target) != target:
            raise ValueError(f"{name} is {target}: enable jax_enable_x64, or cast")

        @functools.cache  # copies of one part are read once
        def part(box: tuple[tuple[int, int], ...]) -> np.ndarray:
            value = self._read(name, tuple(slice(*bounds) for bounds in box))
            return value.astype(target, copy=False)

        def cut(index: tuple[slice, ...]) -> np.ndarray:
            pairs = zip(index, shape, strict=True)
            return part(tuple(s.indices(n)[:2] for s, n in pairs))

        if sharding is None:
            return jax.device_put(cut(tuple(slice(n) for n in shape)))
        return jax.make_array_from_callback(tuple(shape), sharding, cut)

    def tree(self, root: str) -> Any:
        """All arrays under `root`, in dicts and tuples; None if there are none."""
        names = unflat({name: name for name in self.entries}, root)
        return None if names is None else jax.tree.map(self.numpy, names)

    def check_metadata(self, name: str) -> None:
        """Raises unless the array was stored in the chunks and codecs of its entry."""
        if 0 not in self.entries[name]["shape"]:
            self._open(name, assume_metadata=False)

    def _read(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        entry = self.entries[name]
        if 0 in entry["shape"]:  # nothing to store
            return np.zeros(entry["shape"], jnp.dtype(entry["dtype"]))
        with blaming(f"{self.folder}: array {name!r} is damaged"):
            return self._open(name, assume_metadata=True)[box].read().result()

    def _open(self, name: str, *, assume_metadata: bool) -> ts.TensorStore:
        spec = {
            "driver": "zarr3",
            "metadata": _zarr(self.entries[name]),
            "fill_missing_data_reads": False,
            "kvstore": {
                "driver": "ocdbt",
                "base": {"driver": "file", "path": f"{self.folder}/"},
                "path": f"{name}/",
                "cache_pool": "cache_pool#nodes",
            },
        }
        options = {"open": True, "assume_metadata": assume_metadata}
        return ts.open(spec, read=True, context=self._context, **options).result()


def _parallel(function, items) -> list[Any]:
    """`function` of every item, in order, several at a time: reading waits on disk."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(function, items))
