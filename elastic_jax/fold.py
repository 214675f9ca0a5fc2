"""A pass over calibration batches: what it reads, and how it survives a kill.

    b batch   t time

The state of the pass is a pytree of sums and lives in one file. The file says what it
belongs to, and a chained digest says which batches it has seen, so that a pass
continues on the same data or not at all.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from elastic_jax.config import ModelConfig, did_you_mean
from elastic_jax.scores import named_leaves, to_json

FILE_FORMAT = 1

# What a batch may hold, and in which kinds of numbers.
ENTRIES = {"tokens": "iu", "segment_ids": "iu", "lengths": "iu", "valid": "b"}
Batch = Array | np.ndarray | Mapping[str, Any]


def checked(batch: Batch, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """A batch as host arrays in one form.

    Args:
      batch: tokens [b, t], or a mapping with `tokens` and, where needed,
        `segment_ids` [b, t], `lengths` [b] (what follows is padding) and `valid`
        [b, t] bool (False: the model reads the token, but it counts for nothing).

    Raises:
      ValueError: with everything that is wrong with the batch.
    """
    given = batch if isinstance(batch, Mapping) else {"tokens": batch}
    problems = [
        f"unknown entry {name!r}{did_you_mean(name, ENTRIES)}"
        for name in given
        if name not in ENTRIES
    ]
    arrays = {name: np.asarray(a) for name, a in given.items() if name in ENTRIES}
    shape = arrays["tokens"].shape if "tokens" in arrays else ()
    if len(shape) != 2 or 0 in shape:
        problems.append(f"tokens: expected [b, t], got shape {shape}")
    for name, array in arrays.items():
        expected = shape[:1] if name == "lengths" else shape
        if array.shape != expected:
            problems.append(f"{name}: expected shape {expected}, got {array.shape}")
        if array.dtype.kind not in ENTRIES[name]:
            kind = "bool" if name == "valid" else "integers"
            problems.append(f"{name}: expected {kind}, got {array.dtype}")
    if not problems:
        lengths = arrays.get("lengths", np.full(shape[0], shape[1]))
        if lengths.min() < 0 or lengths.max() > shape[1]:
            problems.append(f"lengths: expected 0..{shape[1]}, got {lengths.tolist()}")
        read = arrays["tokens"][np.arange(shape[1]) < lengths[:, None]]
        if read.size and not 0 <= read.min() <= read.max() < cfg.vocab:
            problems.append(
                f"tokens: expected 0..{cfg.vocab - 1}, got {read.min()}..{read.max()}"
            )
    if problems:
        raise ValueError("the batch does not fit:\n  " + "\n  ".join(problems))
    return {n: a if n == "valid" else a.astype(np.int32) for n, a in arrays.items()}


def context(batch: Mapping[str, Array]) -> dict[str, Array | None]:
    """What a forward pass is told beside the tokens."""
    return {name: batch.get(name) for name in ("segment_ids", "lengths")}


def valid_tokens(batch: Mapping[str, Array]):
    """Which tokens count: bool [b, t]."""
    valid = batch.get("valid", jnp.ones(batch["tokens"].shape, bool))
    if "lengths" in batch:
        valid = valid & (jnp.arange(valid.shape[1]) < batch["lengths"][:, None])
    return valid


def resume(
    step: Callable[[Any, Mapping[str, np.ndarray]], Any],
    state: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    path: str | os.PathLike,
    *,
    belongs_to: Mapping[str, Any],
    save_every: int = 16,
    on_batch: Callable[[Any], None] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Folds `state = step(state, batch)` over the batches that `path` has not seen.

    Batches already seen are read again but not computed: they must be the same ones
    in the same order, and the result is that of an unbroken pass, bit for bit.

    Args:
      state: the pytree of arrays to start from where there is no file.
      path: one NumPy `.npz` file, replaced atomically.
      belongs_to: plain values that must equal those in the file.
      save_every: batches between saves; the end always saves.
      on_batch: called with the state after every computed batch.

    Returns:
      the state, and `batches` and `batches_sha256`: how many and which were seen.

    Raises:
      ValueError: a file that cannot be read or belongs to something else, other
        batches than it has seen, or a state that is not finite.
    """
    if save_every < 1:
        raise ValueError(f"save_every: expected a positive int, got {save_every!r}")
    path = Path(path)
    belongs_to = json.loads(to_json({**belongs_to, "format": FILE_FORMAT}))
    seen = at = {"batches": 0, "batches_sha256": ""}
    if path.exists():
        state, seen = _load(path, state, belongs_to)

    for batch in batches:
        at = _advanced(at, batch)
        if at["batches"] == seen["batches"] and at != seen:
            raise ValueError(
                f"{path}: its first {seen['batches']} batches are not those given; "
                "restore the data and its order, or delete the file"
            )
        if at["batches"] > seen["batches"]:
            state = jax.block_until_ready(step(state, batch))
            if at["batches"] % save_every == 0:
                _save(path, state, belongs_to | at)
            if on_batch is not None:
                on_batch(state)
    if at["batches"] < seen["batches"]:
        raise ValueError(
            f"{path} has seen {seen['batches']} batches, only {at['batches']} were "
            "given; give all of them from the start, or delete the file"
        )
    if at != seen:
        _save(path, state, belongs_to | at)
    return state, at


def config_digest(cfg: ModelConfig) -> str:
    """SHA-256 of a configuration's values."""
    return hashlib.sha256(to_json(cfg.to_dict()).encode()).hexdigest()


def params_digest(params) -> str:
    """SHA-256 of the head of every leaf: tells models apart without reading them."""
    heads = jax.tree.map(lambda a: a[(0,) * (a.ndim - 1)][:64], params)
    digest = hashlib.sha256(str(jax.tree.map(jnp.shape, params)).encode())
    for name, head in named_leaves(heads).items():
        digest.update(f"{name} {head.dtype}".encode() + head.tobytes())
    return digest.hexdigest()


def _advanced(at: Mapping[str, Any], batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What has been seen after one more batch; each digest covers the one before."""
    digest = hashlib.sha256(at["batches_sha256"].encode())
    for name, array in sorted(batch.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return {"batches": at["batches"] + 1, "batches_sha256": digest.hexdigest()}


def _save(path: Path, state: Any, about: Mapping[str, Any]) -> None:
    """Writes beside the file, then replaces it: a kill leaves the old or the new."""
    arrays = named_leaves(state)
    bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if bad:
        raise ValueError(f"not finite after batch {about['batches']}: {', '.join(bad)}")
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.savez(file, about=np.array(to_json(about)), **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _load(path: Path, empty: Any, belongs_to: Mapping[str, Any]):
    """The state and what it has seen, if the file is whole and belongs here."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged, or not of this kind: {error}") from None
    differ = [
        f"{name} was {about.get(name)!r}, now {value!r}"
        for name, value in belongs_to.items()
        if about.get(name) != value
    ]
    if differ:
        raise ValueError(
            f"{path} belongs to another pass; give another path, or delete the file:"
            + "".join(f"\n  {line}" for line in differ)
        )
    leaves = [jnp.asarray(arrays[name]) for name in named_leaves(empty)]
    state = jax.tree.unflatten(jax.tree.structure(empty), leaves)
    return state, {name: about[name] for name in ("batches", "batches_sha256")}
