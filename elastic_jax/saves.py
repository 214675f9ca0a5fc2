"""Saves of a training run: the state of a step, each of them whole or absent.

    WORKDIR/
      step_00000100/   a checkpoint of kind `train`, see `checkpoint.py`
      .lock            held by the run

The record of a save: `leaves`, what every leaf of the state is; `scalars` and `keys`,
those that are no arrays; and `run`, what the caller adds.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax.directories import locked
from elastic_jax.manifest import (
    MANIFEST,
    flat,
    foreign_entries,
    is_scalar,
    read_manifest,
)
from elastic_jax.stored import StoredArrays, parallel, write_arrays

STEP = re.compile(r"step_([0-9]{8,})")


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
            write_arrays(target, "train", arrays, content)
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
        record, arrays = manifest.record, StoredArrays(manifest.folder, manifest.arrays)
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
                return arrays.jax(name, like.shape, like.dtype, place)
            data, impl = arrays.numpy(name), record["keys"][name]
            return jax.device_put(jax.random.wrap_key_data(data, impl=impl), place)

        leaves = parallel(read, likes.items())
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
