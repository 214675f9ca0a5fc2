"""A Hugging Face checkpoint, checked as a whole and read tensor by tensor.

The released layout is read (`backbone.`, one tensor per expert), and the one that
transformers 5 has in memory (`model.`, experts stacked). Nothing is filled in: a tensor
that is missing, unexpected or of another shape is an error, and all are named together.
Weights in FP8 and NVFP4 stay as they are, in the layouts of ModelOpt and of
compressed-tensors.
"""

import dataclasses
import os
import re
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
from elastic_jax.huggingface.names import ROUTER_BIAS, Layout, Table, weights
from elastic_jax.huggingface.quantization_config import MODELOPT, declared
from elastic_jax.huggingface.quantized import contradictions, stored_in
from elastic_jax.huggingface.shards import read_shards
from elastic_jax.huggingface.uniform import MASKED_BIAS
from elastic_jax.huggingface.untrusted import inside, read_json, refuse, short
from elastic_jax.lazy import pieces
from elastic_jax.model import param_specs
from elastic_jax.parts import SCALES, invalid_scales

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
QUANTIZATION = "hf_quant_config.json"
CACHE_SCALE = re.compile(r"(backbone|model)\.layers\.\d+\.mixer\.[kv]_proj\.[kv]_scale")
LARGEST_COMPANION_BYTES = 2**27


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory that was checked; no tensor is in memory.

    Attributes:
      cfg: the model.
      params: its parameters as a tree of `LazyArray`, in the stored dtypes; quantized
        weights are `QuantArray`s of them.
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
      allow_nonfinite: take weights that are NaN or infinite, experts all zero, and
        scales of quantized weights that are not positive numbers.

    Returns:
      the parameter tree, in the stored dtypes, and the configuration; quantized
      weights are `QuantArray`s.

    Raises:
      ValueError: with everything that cannot be taken over; see `open_hf`.
    """
    opened = open_hf(directory, allow_nonfinite=allow_nonfinite)
    for note in opened.notes:
        warnings.warn(note, stacklevel=2)
    specs = param_specs(opened.cfg)

    def read(path, leaf):
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            where = ".".join(map(str, path))
            raise ValueError(f"{where} is {leaf.dtype}: enable jax_enable_x64")
        return jnp.asarray(leaf.read())

    whole = lambda path, _, leaf: jax.tree.map(lambda part: read(path, part), leaf)
    return axes.map_specs(whole, specs, opened.params), opened.cfg


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
    cached = {name for name in tensors if CACHE_SCALE.fullmatch(name)}
    tensors = {n: t for n, t in tensors.items() if n not in skipped | cached}
    table = _table(directory, described, tensors)
    if not allow_nonfinite:
        faults = [*_faults(tensors, table, on_bytes)]
        ask = "; to take them all the same, allow non-finite weights"
        refuse(f"{directory} holds weights of no trained model{ask}", faults)
    notes = list(described.notes)
    if skipped:
        notes.append(f"{len(skipped)} tensors of multi-token prediction are skipped")
    if cached:
        notes.append(f"{len(cached)} scales of the KV cache are skipped")
    return Checkpoint(
        cfg=described.cfg,
        params=table.params(tensors, described.dtype),
        carried=described.carried,
        files=_companions(directory),
        notes=tuple(notes),
    )


def _table(directory: Path, described: Described, tensors) -> Table:
    """The table that the tensors fit, and what is said of their quantization."""
    said = described.quantization
    layout = dataclasses.replace(
        _layout(tensors), scheme=said.scheme if said else MODELOPT
    )
    names = weights(described.cfg, layout)
    stored = stored_in(names, tensors, layout.scheme)
    what = f"{directory} does not fit its config.json"
    try:
        table = Table(described.cfg, layout, stored if said else {})
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    refuse(what, [*contradictions(stored, said), *table.misfits(tensors)])
    return table


def _described(directory: Path) -> Described:
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory")
    try:
        described = from_json(read_json(inside(directory, "config.json")))
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error
    if described.quantization or not os.path.lexists(directory / QUANTIZATION):
        return described
    try:
        values = read_json(inside(directory, QUANTIZATION))
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, got {short(values)}")
        quantization = declared(values.get("quantization"))
    except ValueError as error:
        raise ValueError(f"{directory / QUANTIZATION}: {error}") from error
    return dataclasses.replace(
        described,
        quantization=quantization,
        notes=(*described.notes, *quantization.notes),
    )


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
    off, parts = _masked_experts(tensors, table), table.quantized()
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        value, part = tensor.read(), parts.get(name)
        if part in SCALES:
            if bad := invalid_scales(value):
                yield f"{name}: {bad} of {value.size} scales are no positive numbers"
        elif part or jnp.issubdtype(value.dtype, jnp.floating):
            if bad := 0 if value.dtype == np.uint8 else _nonfinite(value):
                yield f"{name}: {bad} of {value.size} values are not finite"
            elif "experts." in name and "shared" not in name:
                each = value if value.ndim == 3 else value[None]
                zero = [i for i, e in enumerate(each) if _is_zero(e)]
                dead = [i for i in zero if (name, i) not in off]
                if dead and value.ndim == 3:
                    yield f"{name}: experts {dead} are zero throughout"
                elif dead:
                    yield f"{name}: zero throughout"
        done += tensor.nbytes
        on_bytes(done, total)


def _is_zero(value: np.ndarray) -> bool:
    """Whether all is zero; of packed values both signs of it."""
    return not (value & 0x77 if value.dtype == np.uint8 else value).any()


def _masked_experts(tensors, table: Table) -> set[tuple[str, int]]:
    """(tensor, row) of experts whose correction bias says that none may choose them."""
    off = set()
    for entry in table.entries:
        if entry.parts[0][-1] == ROUTER_BIAS:
            bias = tensors[entry.name].read().astype(np.float32)
            block = entry.name.removesuffix("gate.e_score_correction_bias")
            for expert in np.flatnonzero(bias <= MASKED_BIAS / 10).tolist():
                for kind in ("up_proj", "down_proj"):
                    module = f"{block}experts.{expert}.{kind}"
                    off |= {(f"{module}.weight", 0), (f"{module}.weight_packed", 0)}
                    off.add((f"{block}experts.{kind}", expert))
    return off


def _nonfinite(value: np.ndarray) -> int:
    """How many values are NaN or infinite, without a mask as large as the array."""
    parts = pieces(value.reshape(-1))
    with np.errstate(invalid="ignore"):  # a NaN may be of the signalling kind
        return sum(int(np.count_nonzero(~np.isfinite(part))) for part in parts)
