"""A Hugging Face checkpoint, checked as a whole and read tensor by tensor.

The released layout is read (`backbone.`, one tensor per expert), and the one that
transformers 5 has in memory (`model.`, experts stacked). Nothing is filled in: a tensor
that is missing, unexpected or of another shape is an error, and all are named together.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax import axes
from elastic_jax.config import ModelConfig
from elastic_jax.huggingface.config import Described, from_json
from elastic_jax.huggingface.names import ROUTER_BIAS, Layout, Table
from elastic_jax.huggingface.shards import inside, read_json, read_shards, refuse
from elastic_jax.huggingface.uniform import MASKED_BIAS
from elastic_jax.lazy import pieces
from elastic_jax.model import param_specs

# What a tokenizer needs, and how to generate: copied as they are, never looked into.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
LARGEST_COMPANION_BYTES = 2**27


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory that was checked; no tensor is in memory.

    Attributes:
      cfg: the model.
      params: its parameters as a tree of `LazyArray`, in the stored dtypes.
      carried: fields of config.json that the way back should keep.
      files: name -> path, of the tokenizer and alike.
      notes: lines for the user about what was not taken over.
    """

    cfg: ModelConfig
    params: Any
    carried: Mapping[str, Any]
    files: Mapping[str, Path]
    notes: tuple[str, ...]


def from_hf(
    directory: str | os.PathLike, *, allow_nonfinite: bool = False
) -> tuple[Any, ModelConfig]:
    """The parameters and configuration of a Hugging Face checkpoint.

    Args:
      directory: config.json and safetensors, one file or shards with their index.
      allow_nonfinite: take weights that are NaN or infinite, and experts all zero.

    Returns:
      the parameter tree, in the stored dtypes, and the configuration.

    Raises:
      ValueError: with everything that cannot be taken over; see `open_hf`.
    """
    opened = open_hf(directory, allow_nonfinite=allow_nonfinite)
    for note in opened.notes:
        warnings.warn(note, stacklevel=2)
    specs = param_specs(opened.cfg)

    def read(path, _, leaf):
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            where = ".".join(map(str, path))
            raise ValueError(f"{where} is {leaf.dtype}: enable jax_enable_x64")
        return jnp.asarray(leaf.read())

    return axes.map_specs(read, specs, opened.params), opened.cfg


def read_config(directory: str | os.PathLike) -> ModelConfig:
    """The configuration alone.

    Raises:
      ValueError: with everything that is missing, impossible or of another model.
    """
    return _described(Path(directory)).cfg


def read_companions(
    directory: str | os.PathLike,
) -> tuple[Mapping[str, Any], Mapping[str, Path]]:
    """Fields of config.json that an export should keep, and files: see `Checkpoint`."""
    return _described(Path(directory)).carried, _companions(Path(directory))


def open_hf(
    directory: str | os.PathLike,
    *,
    allow_nonfinite: bool = False,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> Checkpoint:
    """Checks a Hugging Face checkpoint as a whole: names, shapes and values.

    Args:
      allow_nonfinite: as of `from_hf`; then values are not looked at here.
      on_bytes: called with the bytes whose values are checked, and of all.

    Raises:
      ValueError: a configuration of another model; files that are missing, foreign or
        hostile; tensors that are missing, unexpected, doubled or of another shape;
        values that no trained model has. All of one stage together.
    """
    directory = Path(directory)
    described = _described(directory)
    tensors = read_shards(directory)
    skipped = {name for name in tensors if name.startswith("mtp.")}
    tensors = {name: t for name, t in tensors.items() if name not in skipped}
    table = Table(described.cfg, _layout(tensors))
    refuse(f"{directory} does not fit its config.json", table.misfits(tensors))
    if not allow_nonfinite:
        faults = [*_faults(tensors, table, on_bytes)]
        ask = "; to take them all the same, allow non-finite weights"
        refuse(f"{directory} holds weights of no trained model{ask}", faults)
    notes = list(described.notes)
    if skipped:
        notes.append(f"{len(skipped)} tensors of multi-token prediction are skipped")
    return Checkpoint(
        cfg=described.cfg,
        params=table.params(tensors),
        carried=described.carried,
        files=_companions(directory),
        notes=tuple(notes),
    )


def _described(directory: Path) -> Described:
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory")
    file = inside(directory, "config.json")
    try:
        return from_json(read_json(file))
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error


def _companions(directory: Path) -> dict[str, Path]:
    present = [name for name in COMPANIONS if os.path.lexists(directory / name)]
    found = {name: inside(directory, name) for name in present}
    refuse(
        f"{directory}: expected at most {LARGEST_COMPANION_BYTES} bytes",
        [
            f"{name}: {file.stat().st_size} bytes"
            for name, file in found.items()
            if file.stat().st_size > LARGEST_COMPANION_BYTES
        ],
    )
    return found


def _layout(tensors: Mapping[str, Any]) -> Layout:
    """Which of the two layouts these names belong to; the released one if unsure."""
    memory = any(name.startswith("model.") for name in tensors)
    stacked = any(name.endswith("mixer.experts.up_proj") for name in tensors)
    return Layout("model." if memory else "backbone.", stacked)


def _faults(tensors, table: Table, on_bytes) -> Iterator[str]:
    """Tensors with values that are not finite, and experts that are all zero."""
    off = _masked_experts(tensors, table)
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        value = tensor.read()
        if jnp.issubdtype(value.dtype, jnp.floating):
            if bad := _nonfinite(value):
                yield f"{name}: {bad} of {value.size} values are not finite"
            elif "experts." in name and "shared" not in name:
                each = value if value.ndim == 3 else value[None]
                zero = [i for i, e in enumerate(each) if not e.any()]
                dead = [i for i in zero if (name, i) not in off]
                if dead and value.ndim == 3:
                    yield f"{name}: experts {dead} are zero throughout"
                elif dead:
                    yield f"{name}: zero throughout"
        done += tensor.nbytes
        on_bytes(done, total)


def _masked_experts(tensors, table: Table) -> set[tuple[str, int]]:
    """(tensor, row) of experts whose correction bias says that none may choose them."""
    off = set()
    for entry in table.entries:
        if entry.parts[0][-1] == ROUTER_BIAS:
            bias = tensors[entry.name].read().astype(np.float32)
            block = entry.name.removesuffix("gate.e_score_correction_bias")
            for expert in np.flatnonzero(bias <= MASKED_BIAS / 10).tolist():
                for kind in ("up_proj", "down_proj"):
                    off.add((f"{block}experts.{expert}.{kind}.weight", 0))
                    off.add((f"{block}experts.{kind}", expert))
    return off


def _nonfinite(value: np.ndarray) -> int:
    """How many values are NaN or infinite, without a mask as large as the array."""
    parts = pieces(value.reshape(-1))
    with np.errstate(invalid="ignore"):  # a NaN may be of the signalling kind
        return sum(int(np.count_nonzero(~np.isfinite(part))) for part in parts)
