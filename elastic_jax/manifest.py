"""What a checkpoint's directory says about itself, and how it changes: no arrays here.

The format is described at the head of `checkpoint.py`. A checkpoint is there once its
manifest is, and a manifest appears by one rename: so a directory holds the old
checkpoint or the new one whenever a process dies. What a manifest claims is checked
before anybody allocates for it.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import jax
import jax.numpy as jnp

from elastic_jax import axes
from elastic_jax.axes import AXES
from elastic_jax.directories import LOCK

FORMAT = "elastic_jax"
VERSIONS = {"nested": (1, 2), "train": (1,)}
QUANTIZED = "quantized"  # the member of a record that makes it version 2
MANIFEST = "manifest.json"
MEMBERS = {"sha256", "format", "version", "kind", "folder", "files", "arrays", "record"}
FOLDER = re.compile(r"arrays-[0-9a-f]{8}")

# Small where prefixes are cut out; larger where an array is only read as a whole.
SUBMODEL_CHUNK_BYTES = 2**16
# As many weights of 8 and of 4 bits as of 16, so that as few are read in excess.
SUBMODEL_CHUNK_WEIGHTS, SMALLEST_CHUNK_BYTES = 2**15, 2**12
WHOLE_CHUNK_BYTES = 2**20
# Weights shrink by a third, zeros by thousands. What claims more than this is refused,
# here and when it is saved: it could make a reader allocate at will.
LARGEST_EXPANSION = 2**10
LARGEST_MANIFEST_BYTES = 2**23  # 30 000 arrays; parsed, the worst takes twenty times it


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read and checked.

    Attributes:
      path: the checkpoint's directory.
      folder: where its arrays are.
      size_bytes: of all files in the folder.
      arrays: name -> {"shape", "dtype", "chunks"}, and "per" where it is packed.
      record: what the kind of checkpoint adds.
    """

    path: Path
    folder: Path
    size_bytes: int
    arrays: Mapping[str, Mapping[str, Any]]
    record: Mapping[str, Any]


def write_manifest(
    path: Path, kind: str, folder: str, arrays: Mapping, record: Mapping
) -> None:
    """Makes the checkpoint appear in `path`, at once and for good."""
    manifest = {
        "format": FORMAT,
        "version": 2 if QUANTIZED in record else 1,
        "kind": kind,
        "folder": folder,
        "files": _file_sizes(path / folder),
        "arrays": arrays,
        "record": record,
    }
    _refuse(_array_problems(manifest, sum(manifest["files"].values())))
    text = json.dumps({"sha256": _digest(manifest), **manifest}, indent=1)
    if len(text) > LARGEST_MANIFEST_BYTES:
        raise ValueError(f"a manifest of {len(text)} bytes; keep less provenance")
    beside = path / f"{MANIFEST}.tmp"
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path / MANIFEST)
    for directory in (path, path.parent):
        handle = os.open(directory, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def read_manifest(path: Path, kind: str) -> Manifest:
    """Reads and checks a manifest, and that the files it lists are there.

    Raises:
      ValueError: no checkpoint, one of another kind or version, or one that is
        damaged or claims what cannot be; with every file and array concerned.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise ValueError(f"{path} is no checkpoint: it has no {MANIFEST}")
    with blaming(file):
        found = _parsed(file)
        have = [found[key] for key in ("format", "version", "kind")]
        if have not in [[FORMAT, version, kind] for version in VERSIONS[kind]]:
            newest = [FORMAT, VERSIONS[kind][-1], kind]
            raise ValueError(f"expected at most {newest}, found {have}")
        if (found["version"] == 2) != (QUANTIZED in found["record"]):
            raise ValueError(f"version {found['version']} with or without {QUANTIZED}")
        if not FOLDER.fullmatch(found["folder"]):
            raise ValueError(f"folder {found['folder']!r} is none of ours")
        folder = path / found["folder"]
        sizes = _file_sizes(folder)
        total = sum(sizes.values())
        # A pipe or a device could keep a reader waiting for ever.
        problems = [
            f"{entry} is neither file nor directory"
            for entry in folder.rglob("*")
            if not (entry.is_file() or entry.is_dir())
        ]
        problems += [
            f"{folder / name}: {sizes.get(name, 'no')} bytes, expected {size}"
            for name, size in found["files"].items()
            if sizes.get(name) != size
        ]
        _refuse([*problems, *_array_problems(found, total)])
        return Manifest(path, folder, total, found["arrays"], found["record"])


def only(given: Mapping[str, Any], members: set[str]) -> None:
    """Refuses members that are missing or unknown."""
    if set(given) != members:
        odd = sorted(set(given) ^ members)
        raise ValueError(f"missing or unknown members: {odd}")


def _refuse(problems: Iterable[str]) -> None:
    if found := list(problems):
        raise ValueError("\n  ".join(["this cannot be:", *found]))


def _parsed(file: Path) -> dict[str, Any]:
    """The manifest's members, once their digest is right."""
    if file.stat().st_size > LARGEST_MANIFEST_BYTES or not file.is_file():
        raise ValueError(f"expected a file of at most {LARGEST_MANIFEST_BYTES} bytes")
    found = json.loads(file.read_bytes())
    only(found, MEMBERS)
    if found.pop("sha256") != _digest(found):
        raise ValueError("the digest differs: the file is damaged")
    return found


def _digest(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _file_sizes(folder: Path) -> dict[str, int]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def _array_problems(manifest: Mapping[str, Any], stored_bytes: int) -> Iterator[str]:
    """Why the entries of its arrays cannot be true."""
    claimed_bytes = 0
    packed = {"per"} if manifest["version"] == 2 else set()
    for name, entry in manifest["arrays"].items():
        only(entry, {"shape", "dtype", "chunks"} | (packed & entry.keys()))
        shape, chunks = entry["shape"], entry["chunks"]
        dtype = jnp.dtype(entry["dtype"])
        if not storable(dtype):
            yield f"{name}: dtype {dtype}"
        elif len(shape) != len(chunks) or not all(
            type(n) is int and type(c) is int and 0 <= n and 1 <= c <= max(n, 1)
            for n, c in zip(shape, chunks, strict=True)
        ):
            yield f"{name}: shape {shape} in chunks of {chunks}"
        else:
            claimed_bytes += math.prod(shape) * dtype.itemsize
    if claimed_bytes > stored_bytes * LARGEST_EXPANSION:
        yield f"{claimed_bytes} bytes of arrays cannot come from {stored_bytes} stored"


# ------------------------------------------------------------------- the directory


def foreign_entries(path: Path) -> list[str]:
    """What lies in the directory `path` and is no part of a checkpoint."""
    ours = {MANIFEST, f"{MANIFEST}.tmp", LOCK}
    names = sorted(entry.name for entry in path.iterdir())
    return [name for name in names if name not in ours and not FOLDER.match(name)]


def remove_strays(path: Path) -> None:
    """Deletes folders of arrays that no manifest names: what killed saves leave.

    Next to a manifest that cannot be read, everything stays.
    """
    named = None
    if (path / MANIFEST).exists():
        try:
            named = _parsed(path / MANIFEST)["folder"]
        except (OSError, ValueError, TypeError, RecursionError):
            return
    for entry in path.iterdir():
        if FOLDER.match(entry.name) and entry.name != named:
            shutil.rmtree(entry, ignore_errors=True)


@contextlib.contextmanager
def blaming(where: Any) -> Iterator[None]:
    """Turns whatever goes wrong while reading into a ValueError that says where."""
    try:
        yield
    except Exception as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        # Names in a manifest may hold halves of characters, which no terminal prints.
        said = said.encode("utf-8", "backslashreplace").decode()
        raise ValueError(f"{where}: {said}") from error


# ----------------------------------------------------------- names, trees and values


def array_name(*path: Any) -> str:
    """A path as one name, `params.layers.3.up`; dots within a step are quoted."""
    return ".".join(quote(str(step), safe="").replace(".", "%2E") for step in path)


def flat(tree: Any, root: str, is_leaf: Callable | None = None) -> dict[str, Any]:
    """Name -> leaf, in the order of `jax.tree.leaves`."""
    text = functools.partial(jax.tree_util.keystr, simple=True)
    return {
        array_name(root, *(text((key,)) for key in path)): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    }


def unflat(named: Mapping[str, Any], root: str) -> Any:
    """The dicts and tuples under `root`, from their names; None if there are none."""
    items = {}
    for name, leaf in named.items():
        first, *path = (unquote(step) for step in name.split("."))
        if first == root:
            items[tuple(int(s) if s.isdecimal() else s for s in path)] = leaf
    return axes.nest(items) if items else None


def is_scalar(leaf: Any) -> bool:
    """Whether a leaf is a plain Python value; a NumPy number is an array."""
    return type(leaf) in (bool, int, float, str)


def plain(value: Any, where: str) -> Any:
    """`value` as JSON gives it back: tuples become lists.

    Raises:
      ValueError: something that JSON would change or cannot say.
    """
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or is_scalar(value):
        return value
    raise ValueError(
        f"{where}: expected plain values (text, numbers, lists, dicts with text keys), "
        f"got {value!r}"
    )


def storable(dtype: Any) -> bool:
    """Whether arrays of `dtype` can be stored: numbers and booleans."""
    return dtype.isnative and (dtype.kind == "b" or jnp.issubdtype(dtype, jnp.number))


# --------------------------------------------------------------------------- chunks


def chunk_shape(
    shape: tuple[int, ...],
    itemsize: int,
    dims: tuple[str, ...] | None = None,
    per: Mapping[str, int] | None = None,
) -> tuple[int, ...]:
    """The shape in which an array of `shape` is stored.

    With `dims`, elastic dimensions are cut into equal shares, in multiples of their
    steps: among chunks of one size, these have the least expected overhang. The
    others are cut once a share is a sixteenth. Without, the leading dimensions are
    cut first. An element may span several units of a dimension: `per`.
    """
    limit = WHOLE_CHUNK_BYTES
    if dims is not None:
        weights_per_element = math.prod((per or {}).values())
        limit = SUBMODEL_CHUNK_WEIGHTS * itemsize // weights_per_element
        limit = min(SUBMODEL_CHUNK_BYTES, max(SMALLEST_CHUNK_BYTES, limit))
    known = [AXES.get(dim) for dim in dims or ("",) * len(shape)]
    spans = [(per or {}).get(dim, 1) for dim in dims or ("",) * len(shape)]
    options = [
        _lengths(n, max(1, axis.step // span) if axis else 1)
        for n, axis, span in zip(shape, known, spans, strict=True)
    ]

    def coarseness(i: int) -> float:
        if dims is None:
            return -i
        return options[i][0] / shape[i] / (1 if known[i] else 16)

    while math.prod(lengths[0] for lengths in options) * itemsize > limit:
        divisible = [i for i, lengths in enumerate(options) if len(lengths) > 1]
        if not divisible:
            break
        options[max(divisible, key=coarseness)].pop(0)
    return tuple(lengths[0] for lengths in options)


def _lengths(size: int, step: int) -> list[int]:
    """Lengths of chunks for `size`, descending, in multiples of `step`.

    Chunks are stored whole: lengths that overhang the end by more than 1% are out.
    """
    pieces = range(2, min(size // step, 4096) + 1)
    lengths = {-(-size // (k * step)) * step for k in pieces}
    fitting = {n for n in lengths if -(-size // n) * n <= 1.01 * size}
    return sorted({max(size, 1)} | fitting, reverse=True)
