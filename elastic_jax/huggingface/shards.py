"""Safetensors shards, read as data and written in one pass.

A shard is eight bytes of header length, a JSON header (name -> dtype, shape, byte
offsets) and the tensors, packed without gaps. A directory holds `model.safetensors`,
or several shards and `model.safetensors.index.json` (name -> shard). Nothing here
believes a file: lengths, offsets, names and paths are checked before anything is
allocated or opened, and no format that can carry code is read at all. Tensors are
read, not mapped, so that a file cut short meanwhile is an error and not a signal.
"""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from elastic_jax.huggingface.untrusted import (
    LARGEST_JSON_BYTES,
    inside,
    parse_json,
    read_json,
    refuse,
    short,
)
from elastic_jax.lazy import LazyArray, pieces

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CODE_CARRIERS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npy", ".npz")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
LARGEST_TENSOR_COUNT = 2**18

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{
        f"{kind}{8 * n}": np.dtype(f"{kind.lower()}{n}")
        for kind in "IU"
        for n in (1, 2, 4, 8)
    },
    "BOOL": np.dtype(bool),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


# ------------------------------------------------------------------------- reading


def read_shards(directory: str | os.PathLike) -> dict[str, LazyArray]:
    """Every tensor of a directory by name; headers are read and checked, no tensor.

    Raises:
      ValueError: with everything that is wrong: no weights, weights in another format,
        files that are missing, outside the directory or hostile, and tensors that
        index and shards do not agree on.
    """
    directory = Path(directory)
    present = set(os.listdir(directory)) if directory.is_dir() else set()
    where = _shard_of_each(directory, present)
    placed: dict[str, set[str]] = {SINGLE: set()} if where is None else {}
    for tensor, file in (where or {}).items():
        placed.setdefault(file, set()).add(tensor)
    found: dict[str, LazyArray] = {}
    problems: list[str] = []
    for name in sorted(placed):
        if name not in present:
            problems.append(f"{directory / name} is missing")
            continue
        try:
            tensors = read_header(inside(directory, name))
        except ValueError as error:
            problems.append(str(error))
            continue
        problems += [
            f"{short(tensor)} is in {name} and in another shard"
            for tensor in tensors
            if tensor in found
        ]
        if where is not None:
            problems += [
                f"{name} holds {short(tensor)}, which {INDEX} does not place there"
                for tensor in tensors
                if tensor not in placed[name]
            ]
            problems += [
                f"{name} lacks {short(tensor)}, which {INDEX} places there"
                for tensor in sorted(placed[name] - tensors.keys())
            ]
        found |= tensors
    refuse(f"{directory}: the weights cannot be read", problems)
    return found


def read_header(file: Path) -> dict[str, LazyArray]:
    """The tensors of one shard, unread.

    Raises:
      ValueError: what the file says cannot be; names the file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(size - 8, LARGEST_JSON_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = parse_json(stream.read(length))
        return dict(_tensors(file, header, 8 + length, size))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from error


def _tensors(
    file: Path, header: Any, data_start: int, size: int
) -> Iterator[tuple[str, LazyArray]]:
    """Name and tensor of every entry, once they cover the file's data exactly."""
    if not isinstance(header, dict):
        raise ValueError(f"the header is a {type(header).__name__}, no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(
        not isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError("__metadata__ is not text by name")
    spans = {name: _span(name, entry) for name, entry in header.items()}
    end = 0
    for name in sorted(spans, key=lambda name: spans[name][2:]):
        dtype, shape, start, stop = spans[name]
        if start != end:
            raise ValueError(f"{short(name)} starts at byte {start}, not at {end}")
        end = stop
        yield name, _tensor(file, dtype, shape, data_start + start)
    if data_start + end != size:
        raise ValueError(f"{size - data_start} bytes of tensors, {end} in the header")


def _span(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """dtype, shape, first and last byte of an entry that is right in itself."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{short(name)}: expected dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{short(name)}: dtype {short(kind)}, known: {[*DTYPES]}")
    if not _are_sizes(shape) or len(shape) > 8:
        raise ValueError(f"{short(name)}: shape {short(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{short(name)}: data_offsets {short(offsets)}")
    (start, stop), size_bytes = offsets, math.prod(shape) * DTYPES[kind].itemsize
    if stop - start != size_bytes:
        raise ValueError(
            f"{short(name)}: {stop - start} bytes for {kind}{shape}, expected "
            f"{size_bytes}"
        )
    return DTYPES[kind], tuple(shape), start, stop


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(
        type(n) is int and 0 <= n < 2**48 for n in numbers
    )


def _tensor(file: Path, dtype: np.dtype, shape: tuple[int, ...], at: int) -> LazyArray:
    def read() -> np.ndarray:
        size_bytes = math.prod(shape) * dtype.itemsize
        try:
            raw = np.fromfile(file, np.uint8, size_bytes, offset=at)
        except OSError as error:
            raise ValueError(f"{file} can no longer be read: {error}") from error
        if raw.size != size_bytes:
            raise ValueError(f"{file} was cut short while it was read")
        return raw.view(dtype).reshape(shape)

    return LazyArray(shape, dtype, read)


def _shard_of_each(directory: Path, present: Set[str]) -> dict[str, str] | None:
    """Tensor name -> file, from the index; None where one file holds everything."""
    if INDEX not in present:
        if SINGLE in present:
            return None
        others = sorted(n for n in present if n.endswith(CODE_CARRIERS))
        hint = (
            f"; {others[:3]} may carry code and are never read: load them where you "
            "trust them and save again with `save_pretrained`, which writes safetensors"
        )
        raise ValueError(
            f"{directory} holds neither {SINGLE} nor {INDEX}{hint if others else ''}"
        )
    if SINGLE in present:
        raise ValueError(f"{directory} holds both {SINGLE} and {INDEX}: remove one")
    index = read_json(inside(directory, INDEX))
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{directory / INDEX} has no weight_map")
    if len(where) > LARGEST_TENSOR_COUNT:
        raise ValueError(f"{directory / INDEX}: {len(where)} tensors")
    problems = [
        f"{short(tensor)}: {short(file)} is no name of a .safetensors file"
        for tensor, file in where.items()
        if not isinstance(file, str)
        or not FILE_NAME.fullmatch(file)
        or not file.endswith(".safetensors")
    ]
    refuse(f"{directory / INDEX}", problems)
    return where


# ------------------------------------------------------------------------- writing


def write_shards(
    directory: Path,
    tensors: Mapping[str, LazyArray],
    *,
    shard_bytes: int,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes tensors in their order, holding one at a time.

    Args:
      directory: exists; shards are added to it.
      shard_bytes: a shard holds at most this many bytes of tensors, or one tensor.
      on_bytes: called with the bytes of tensors that are written, and of all.

    Raises:
      ValueError: a dtype that safetensors does not know.
      OSError: the disk is full or failed.
    """
    odd = [f"{n}: {t.dtype}" for n, t in tensors.items() if t.dtype not in NAMES]
    refuse("safetensors cannot hold these dtypes", odd)
    shards = _distributed(tensors, shard_bytes)
    files = [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    if len(shards) == 1:
        files = [SINGLE]
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())
    for file, names in zip(files, shards, strict=True):
        for written in _write_shard(directory / file, {n: tensors[n] for n in names}):
            done += written
            on_bytes(done, total)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {
                n: file for file, s in zip(files, shards, strict=True) for n in s
            },
        }
        write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")


def _distributed(tensors: Mapping[str, LazyArray], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        if shards[-1] and held + tensor.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += tensor.nbytes
    return shards


def _write_shard(file: Path, tensors: Mapping[str, LazyArray]) -> Iterator[int]:
    """Writes one shard; yields the bytes of each tensor once they are written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    if len(text) > LARGEST_JSON_BYTES:
        raise ValueError(f"{file}: {len(tensors)} tensors are too many for one shard")
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            value = np.asarray(tensor.read())
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise ValueError(f"{name}: announced {tensor}, read {value.shape}")
            for piece in pieces(value):  # a transposed one is copied piece by piece
                stream.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
            yield tensor.nbytes
        stream.flush()
        os.fsync(stream.fileno())


def write_text(file: Path, text: str) -> None:
    """Writes a small file to the disk."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
