"""A model as a Hugging Face checkpoint, in the layout that Nemotron-H is released in.

Transformers, vLLM and the converter of llama.cpp read it (`backbone.`, one tensor per
expert). Tensors are made and written one at a time, quantized ones as they are.
"""

import collections
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from elastic_jax import axes
from elastic_jax.config import ModelConfig, did_you_mean
from elastic_jax.cost import cost
from elastic_jax.directories import appearing
from elastic_jax.huggingface.config import to_json
from elastic_jax.huggingface.names import Layout, Table, weights
from elastic_jax.huggingface.quantization_config import (
    COMPRESSED,
    MODELOPT,
    Stored,
    compressed,
    modelopt,
)
from elastic_jax.huggingface.quantized import as_lazy, dequantized, formats_of, notes
from elastic_jax.huggingface.reading import COMPANIONS, QUANTIZATION
from elastic_jax.huggingface.shards import write_shards, write_text
from elastic_jax.huggingface.uniform import uniform
from elastic_jax.huggingface.untrusted import refuse
from elastic_jax.lazy import LazyArray
from elastic_jax.model import param_specs
from elastic_kernels import QuantArray

PLAIN = "plain"
FORMATS = (MODELOPT, COMPRESSED, PLAIN)
SHARD_BYTES = 5 * 10**9


def to_hf(
    directory: str | os.PathLike,
    params: Any,
    cfg: ModelConfig,
    *,
    dtype: Any = None,
    format: str = MODELOPT,
    pad_to_uniform: bool = False,
    shard_bytes: int = SHARD_BYTES,
    carried: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | Path] | None = None,
    card: str | None = None,
    overwrite: bool = False,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[str, ...]:
    """Writes a model as a Hugging Face checkpoint, in the released layout.

    The directory appears as a whole or not at all.

    Args:
      params: a tree of arrays or of `LazyArray`, quantized or not.
      dtype: of all tensors but the router's correction bias, which stays float32, and
        of quantized weights; None writes the parameters' own.
      format: of quantized weights. `"modelopt"` is what NVIDIA ships and vLLM, SGLang
        and TensorRT-LLM read; `"compressed-tensors"` is read by transformers and vLLM;
        `"plain"` writes them dequantized, for whatever reads BF16.
      pad_to_uniform: where blocks differ in width, fill the narrow ones with zeros; see
        `uniform.uniform`.
      shard_bytes: largest size of one file, if a tensor fits.
      carried: fields for config.json; as of `Checkpoint`.
      files: name -> content of tokenizer files and alike; names of `COMPANIONS`.
      card: text of the model card (README.md); a short one is made if None.
      overwrite: replace what is there.
      on_bytes: called with the bytes of tensors that are written, and of all.

    Returns:
      lines that the user of an engine should know.

    Raises:
      ValueError: before a byte is written: what this format cannot represent, with the
        reason and the way out; or the directory exists.
      OSError: the disk is full or failed; nothing is left behind.
    """
    specs = param_specs(cfg)
    params = axes.map_specs(lambda p, _, leaf: as_lazy(p, leaf), specs, params)
    params, cfg = uniform(params, cfg, pad=pad_to_uniform)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype: expected a floating one, got {dtype}")
    if format not in FORMATS:
        near = did_you_mean(format, FORMATS)
        raise ValueError(f"format {format!r}, expected one of {FORMATS}{near}")
    unknown = sorted(set(files or {}) - set(COMPANIONS))
    refuse(f"files: expected some of {COMPANIONS}, got", unknown)
    if format == PLAIN:
        plain = lambda _, __, leaf: dequantized(leaf, dtype)
        params = axes.map_specs(plain, param_specs(cfg), params)
    layout = Layout("backbone.", stacked=False, scheme=format)
    names = weights(cfg, layout)
    stored = formats_of(names, params)
    table = Table(cfg, layout, stored)
    tensors = table.tensors(params, dtype)
    config = to_json(cfg, _common_dtype(params, tensors, dtype), carried or {})
    said, apart = _quantization(cfg, format, names, stored)
    config |= {"quantization_config": said} if said else {}
    with appearing(Path(directory), overwrite=overwrite) as partial:
        write_shards(partial, tensors, shard_bytes=shard_bytes, on_bytes=on_bytes)
        write_text(partial / "config.json", _json_text(config))
        if apart:
            write_text(partial / QUANTIZATION, _json_text(apart))
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {name: config[name] for name in tokens if name in config}
        write_text(partial / "generation_config.json", _json_text(generation))
        write_text(partial / "README.md", card or model_card(cfg))
        for name, content in (files or {}).items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            (partial / name).write_bytes(data)
    return notes(stored, format)


def _quantization(
    cfg: ModelConfig, format: str, names: Mapping, stored: Mapping[str, Stored]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What config.json says of quantized weights, and a file of its own."""
    if not stored:
        return None, None
    known = dict(param_specs(cfg))
    modules, excluded = {}, []
    for name, paths in names.items():
        module, experts = name.removesuffix(".weight"), 1
        if "{expert}" in module:
            (path,) = paths
            experts = axes.shape(cfg, param_specs(cfg), path, known[path])[0]
        each = list(dict.fromkeys(module.format(expert=e) for e in range(experts)))
        if name in stored:
            modules |= dict.fromkeys(each, stored[name])
            continue
        whole = module.partition(".{expert}")[0]
        if not any(other.startswith(f"{whole}.{{expert}}") for other in stored):
            each = [f"{whole}*"] if "{expert}" in module else each
        excluded += [e for e in each if e not in excluded]
    if format == COMPRESSED:
        return compressed(modules, excluded), None
    return modelopt(modules, excluded)


def model_card(cfg: ModelConfig, lines: tuple[str, ...] = ()) -> str:
    """A short model card: sizes, and `lines` about where the model comes from."""
    sizes = cost(param_specs(cfg), cfg)
    said = [
        f"- {sizes.total_params:,} parameters, {sizes.active_params:,} active",
        f"- blocks: `{cfg.pattern}`",
        f"- hidden size {cfg.embed}, vocabulary {cfg.vocab}",
        *(f"- {line}" for line in lines),
    ]
    head = "---\nlibrary_name: transformers\ntags: [nemotron_h, elastic_jax]\n---\n"
    title = "# A submodel cut by elastic_jax" if lines else "# Written by elastic_jax"
    return f"{head}\n{title}\n\n" + "\n".join(said) + "\n"


def _json_text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def _common_dtype(params: Any, tensors: Mapping[str, LazyArray], dtype: Any) -> str:
    """The dtype that most weights have, or are used in."""
    sizes = collections.Counter()
    for tensor in tensors.values():
        if jnp.issubdtype(tensor.dtype, jnp.floating) and tensor.dtype.itemsize > 1:
            sizes[tensor.dtype.name] += tensor.size
    is_packed = lambda leaf: isinstance(leaf, QuantArray)
    for leaf in filter(is_packed, jax.tree.leaves(params, is_leaf=is_packed)):
        kind = leaf.dtype if dtype is None else dtype
        sizes[jnp.dtype(kind).name] += math.prod(leaf.shape)
    return sizes.most_common(1)[0][0]
