"""A model as a Hugging Face checkpoint, in the layout that Nemotron-H is released in.

Transformers, vLLM and the converter of llama.cpp read it (`backbone.`, one tensor per
expert). Tensors are made and written one at a time.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from elastic_jax import axes
from elastic_jax.config import ModelConfig
from elastic_jax.cost import cost
from elastic_jax.directories import appearing
from elastic_jax.huggingface.config import to_json
from elastic_jax.huggingface.names import Layout, Table
from elastic_jax.huggingface.reading import COMPANIONS
from elastic_jax.huggingface.shards import refuse, write_shards, write_text
from elastic_jax.huggingface.uniform import uniform
from elastic_jax.lazy import LazyArray, lazy
from elastic_jax.model import param_specs

SHARD_BYTES = 5 * 10**9


def to_hf(
    directory: str | os.PathLike,
    params: Any,
    cfg: ModelConfig,
    *,
    dtype: Any = None,
    pad_to_uniform: bool = False,
    shard_bytes: int = SHARD_BYTES,
    carried: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | Path] | None = None,
    card: str | None = None,
    overwrite: bool = False,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes a model as a Hugging Face checkpoint, in the released layout.

    The directory appears as a whole or not at all.

    Args:
      params: a tree of arrays or of `LazyArray`.
      dtype: of all tensors but the router's correction bias, which stays float32; None
        writes the parameters' own.
      pad_to_uniform: where blocks differ in width, fill the narrow ones with zeros; see
        `uniform.uniform`.
      shard_bytes: largest size of one file, if a tensor fits.
      carried: fields for config.json; as of `Checkpoint`.
      files: name -> content of tokenizer files and alike; names of `COMPANIONS`.
      card: text of the model card (README.md); a short one is made if None.
      overwrite: replace what is there.
      on_bytes: called with the bytes of tensors that are written, and of all.

    Raises:
      ValueError: before a byte is written: what this format cannot represent, with the
        reason and the way out; or the directory exists.
      OSError: the disk is full or failed; nothing is left behind.
    """
    # Every leaf gets its own LazyArray, so that a stack of experts is read once.
    specs = param_specs(cfg)
    params = axes.map_specs(lambda _, __, leaf: lazy(leaf), specs, params)
    params, cfg = uniform(params, cfg, pad=pad_to_uniform)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype: expected a floating one, got {dtype}")
    unknown = sorted(set(files or {}) - set(COMPANIONS))
    refuse(f"files: expected some of {COMPANIONS}, got", unknown)
    table = Table(cfg, Layout("backbone.", stacked=False))
    tensors = table.tensors(params, dtype)
    config = to_json(cfg, _common_dtype(tensors), carried or {})
    with appearing(Path(directory), overwrite=overwrite) as partial:
        write_shards(partial, tensors, shard_bytes=shard_bytes, on_bytes=on_bytes)
        write_text(partial / "config.json", _json_text(config))
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {name: config[name] for name in tokens if name in config}
        write_text(partial / "generation_config.json", _json_text(generation))
        write_text(partial / "README.md", card or model_card(cfg))
        for name, content in (files or {}).items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            (partial / name).write_bytes(data)


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


def _common_dtype(tensors: Mapping[str, LazyArray]) -> str:
    """The dtype that most elements have."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.size
    return max(sizes, key=lambda name: sizes[name])
