"""Arrays in a directory, written by Orbax, read in parts, every chunk checked.

The format is described at the head of `checkpoint.py`. Arrays are written a few at a
time, so a lazy tree may be larger than memory; a read touches the chunks of its box.
"""

import asyncio
import contextlib
import functools
import math
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from elastic_jax import axes
from elastic_jax.lazy import LazyArray, lazy, pieces
from elastic_jax.manifest import (
    blaming,
    chunk_shape,
    plain,
    remove_strays,
    storable,
    unflat,
    write_manifest,
)
from elastic_jax.parts import Part

LARGEST_FILE_BYTES = 2**28  # what OCDBT holds in memory before it begins another file

# The checksum covers compressed bytes: fewer of them, and cheaper to verify.
CODECS = (
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 1}},
    {"name": "crc32c"},
)


def write_arrays(
    path: Path,
    kind: str,
    arrays: Mapping,
    record: Mapping,
    layout: Mapping[str, Part] | None = None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Makes `path`, which the caller has locked, the checkpoint of these arrays.

    `layout` names the dimensions of arrays that are read in part.
    """
    record = plain(record, "record")
    arrays = {name: lazy(array) for name, array in arrays.items()}
    refused = [f"{k}: {v.dtype}" for k, v in arrays.items() if not storable(v.dtype)]
    if refused:
        raise ValueError("\n  ".join(["cannot store these dtypes:", *refused]))
    entries = {name: _entry(a, (layout or {}).get(name)) for name, a in arrays.items()}
    filled = {tuple(name.split(".")): a for name, a in arrays.items() if a.size}
    folder = f"arrays-{secrets.token_hex(4)}"
    remove_strays(path)
    try:
        if filled:
            save = ocp.args.PyTreeSave(
                axes.nest(filled), ocdbt_target_data_file_size=LARGEST_FILE_BYTES
            )
            with ocp.Checkpointer(_orbax_handler(entries, on_bytes)) as orbax:
                orbax.save(path / folder, args=save)
        else:
            (path / folder).mkdir()  # a state of plain values
        stored = StoredArrays(path / folder, entries)
        parallel(stored.check_metadata, entries)
        write_manifest(path, kind, folder, entries, record)
    except Exception as error:
        raise OSError(
            f"{path}: not saved, what was there is as before; {error}"
        ) from error
    finally:
        remove_strays(path)


def _entry(array: LazyArray, part: Part | None) -> dict[str, Any]:
    """What the manifest says of an array."""
    dims, per = (part.dims, part.per) if part else (None, {})
    chunks = chunk_shape(array.shape, array.dtype.itemsize, dims, per)
    entry = {"shape": list(array.shape), "dtype": array.dtype.name}
    entry["chunks"] = list(chunks)
    return entry | ({"per": dict(per)} if per else {})


def _orbax_handler(
    entries: Mapping[str, Any], on_bytes: Callable[[int, int], None]
) -> ocp.PyTreeCheckpointHandler:
    """Orbax's writer of trees, with our chunks and checksums, few arrays at a time."""
    room, done = _Room(LARGEST_FILE_BYTES), 0
    total = sum(_size_bytes(entry) for entry in entries.values())

    class Checksummed(ocp.type_handlers.NumpyHandler):
        async def _open_and_write(self, value, tspec, ts_context):
            nonlocal done
            name = tspec["kvstore"]["path"].strip("/")
            tspec = tspec | {"metadata": _zarr(entries[name])}
            async with room.taken(value.nbytes):
                array = await asyncio.to_thread(value.read)
                target = await ts.open(
                    ts.Spec(tspec), create=True, open=True, context=ts_context
                )
                await _write_in_pieces(target, array, entries[name]["chunks"])
            done += value.nbytes
            on_bytes(done, total)

    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, Checksummed(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # unused; Orbax warns without
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=True, type_handler_registry=registry
    )


async def _write_in_pieces(target: ts.TensorStore, array, chunks) -> None:
    """Whole chunks at a time, so that few of them wait, encoded, for the disk."""
    start = 0
    rows = chunks[0] if chunks else 1
    for piece in pieces(array, size_bytes=LARGEST_FILE_BYTES, multiple=rows):
        part = target[start : start + len(piece)] if array.ndim else target
        await part.write(piece, can_reference_source_data_indefinitely=True)
        start += len(piece) if array.ndim else 0


def _read_in_pieces(source: ts.TensorStore, chunks) -> np.ndarray:
    """Some chunks at a time, so that few of them wait, compressed, to be decoded."""
    dtype, start = source.dtype.numpy_dtype, source.domain.inclusive_min
    if source.size * dtype.itemsize <= LARGEST_FILE_BYTES:
        return source.read().result()
    value, at = np.empty(source.shape, dtype), start[0]
    for piece in pieces(value, size_bytes=LARGEST_FILE_BYTES, multiple=chunks[0]):
        piece[...] = source[at : at + len(piece)].read().result()
        at += len(piece)
    return value


def _size_bytes(entry: Mapping[str, Any]) -> int:
    return math.prod(entry["shape"]) * jnp.dtype(entry["dtype"]).itemsize


class _Room:
    """Lets arrays in while they are small together, a large one alone."""

    def __init__(self, size_bytes: int):
        self._size_bytes, self._taken = size_bytes, 0
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def taken(self, size_bytes: int):
        fits = lambda: not self._taken or self._taken + size_bytes <= self._size_bytes
        async with self._changed:
            await self._changed.wait_for(fits)
            self._taken += size_bytes
        try:
            yield
        finally:
            async with self._changed:
                self._taken -= size_bytes
                self._changed.notify_all()


def _zarr(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The zarr3 metadata of an array."""
    grid = {"name": "regular", "configuration": {"chunk_shape": entry["chunks"]}}
    return {
        "shape": entry["shape"],
        "data_type": entry["dtype"],
        "chunk_grid": grid,
        "codecs": list(CODECS),
    }


class StoredArrays:
    """Stored arrays by name; whatever is read is verified."""

    def __init__(self, folder: Path, entries: Mapping[str, Mapping[str, Any]]):
        self.folder, self.entries = folder, entries
        # One cache of B-tree nodes for all arrays, or each would read them again.
        self._context = ts.Context({"cache_pool#nodes": {"total_bytes_limit": 10**8}})

    def numpy(self, name: str) -> np.ndarray:
        """A whole array."""
        return self._read(name, tuple(slice(n) for n in self.entries[name]["shape"]))

    def prefix(self, name: str, shape: tuple[int, ...], dtype) -> np.ndarray:
        """The first `shape` of an array, in `dtype`."""
        value = self._read(name, tuple(slice(n) for n in shape))
        return value.astype(dtype, copy=False)

    def jax(
        self,
        name: str,
        shape: tuple[int, ...],
        target,
        sharding,
        on_read: Callable[[np.ndarray], None] = lambda value: None,
    ) -> jax.Array:
        """The first `shape` of an array, as `target`; each device gets its part.

        `on_read` may look at what is read, part by part.
        """
        if jax.dtypes.canonicalize_dtype(target) != target:
            raise ValueError(f"{name} is {target}: enable jax_enable_x64, or cast")

        @functools.cache  # copies of one part are read once
        def part(box: tuple[tuple[int, int], ...]) -> np.ndarray:
            value = self._read(name, tuple(slice(*bounds) for bounds in box))
            on_read(value)
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
            return _read_in_pieces(
                self._open(name, assume_metadata=True)[box], entry["chunks"]
            )

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


def parallel(function, items) -> list[Any]:
    """`function` of every item, in order, several at a time: reading waits on disk."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(function, items))
