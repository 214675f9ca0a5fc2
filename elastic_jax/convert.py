"""Checkpoints from one form into another, array by array: import, export, slice.

A nested checkpoint keeps what a Hugging Face directory says beside its weights: fields
of config.json under `huggingface` in its provenance, tokenizer files as they are. So a
submodel that is exported finds its tokenizer again.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from elastic_jax import nesting
from elastic_jax.axes import AXES, Counts
from elastic_jax.checkpoint import Nested, open_nested, save_nested
from elastic_jax.config import did_you_mean
from elastic_jax.cost import cost
from elastic_jax.directories import check_free
from elastic_jax.huggingface import model_card, open_hf, to_hf
from elastic_jax.huggingface.quantization_config import MODELOPT
from elastic_jax.model import param_specs

Progress = Callable[[str, int, int], None]  # what is done, bytes of it, of how many


def import_hf(
    directory: str | os.PathLike,
    path: str | os.PathLike,
    *,
    budgets: Mapping[str, Mapping[str, Any]] | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> tuple[str, ...]:
    """Writes a Hugging Face checkpoint as a nested one, in its own order.

    Args:
      budgets: name -> counts; for a parent whose units are in importance order already.
      allow_nonfinite: as of `from_hf`.
      overwrite: replace the nested checkpoint at `path`.

    Returns:
      lines about what was not taken over.

    Raises:
      ValueError: what `open_hf` and `save_nested` refuse; `path` is taken.
      OSError: the disk is full or failed; `path` is as before.
    """
    _apart(directory, path)
    check_free(path, overwrite=overwrite)
    opened = open_hf(
        directory,
        allow_nonfinite=allow_nonfinite,
        on_bytes=lambda done, total: progress("check", done, total),
    )
    given = {
        name: nesting.counts(opened.cfg, **kept)
        for name, kept in (budgets or {}).items()
    }
    config = (Path(directory) / "config.json").read_bytes()
    save_nested(
        path,
        opened.params,
        opened.cfg,
        budgets=given,
        provenance={
            "imported": Path(directory).absolute().name,
            "config_sha256": hashlib.sha256(config).hexdigest(),
            "huggingface": dict(opened.carried),
        },
        files={name: file.read_bytes() for name, file in opened.files.items()},
        overwrite=overwrite,
        on_bytes=lambda done, total: progress("write", done, total),
    )
    return opened.notes


def export_hf(
    checkpoint: str | os.PathLike,
    directory: str | os.PathLike,
    budget: str | Mapping[str, Any] | None = None,
    *,
    dtype: Any = None,
    format: str = MODELOPT,
    pad_to_uniform: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> tuple[str, ...]:
    """Writes a submodel of a nested checkpoint as a Hugging Face one.

    Args:
      budget: name of a budget, any counts, or None for the parent.
      dtype, format, pad_to_uniform, overwrite: as of `to_hf`.

    Returns:
      lines that the user should know.

    Raises:
      ValueError: an unknown budget, a damaged file, or what `to_hf` refuses.
      OSError: the disk is full or failed; nothing is left behind.
    """
    _apart(checkpoint, directory)
    nested = open_nested(checkpoint)
    params, cfg = nested.lazy(budget)
    notes = to_hf(
        directory,
        params,
        cfg,
        dtype=dtype,
        format=format,
        pad_to_uniform=pad_to_uniform,
        carried=nested.provenance.get("huggingface"),
        files=nested.files(),
        card=model_card(cfg, _story(nested, budget)),
        overwrite=overwrite,
        on_bytes=lambda done, total: progress("write", done, total),
    )
    if "E" in cfg.pattern and "-" in cfg.pattern:
        notes += (
            "blocks E and - together load in transformers; the converter of llama.cpp "
            "cannot take them",
        )
    return notes


def slice_nested(
    checkpoint: str | os.PathLike,
    path: str | os.PathLike,
    budget: str | Mapping[str, Any],
    *,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> tuple[str, ...]:
    """Writes a submodel as a nested checkpoint of its own.

    It keeps the budgets that lie within it, and the tokenizer. The router chose among
    counts of the parent, and the scores are of its units: both stay behind.

    Returns:
      lines about what stayed behind.

    Raises:
      ValueError: an unknown budget, a damaged file; `path` is taken.
      OSError: the disk is full or failed; `path` is as before.
    """
    _apart(checkpoint, path)
    check_free(path, overwrite=overwrite)
    nested = open_nested(checkpoint)
    params, cfg = nested.lazy(budget)
    whole = nested.counts(budget)
    kept, notes = {}, ["the router and the scores of the parent stay behind"]
    for name, counts in nested.budgets.items():
        if nesting.nested(nested.cfg, counts, whole) and counts != whole:
            kept[name] = nesting.within(nested.cfg, counts, whole)
        elif counts != whole:
            notes.append(f"budget {name!r} does not lie within, and stays behind")
    save_nested(
        path,
        params,
        cfg,
        budgets=kept,
        provenance={**nested.provenance, "sliced": list(_story(nested, budget))},
        files=nested.files(),
        overwrite=overwrite,
        on_bytes=lambda done, total: progress("write", done, total),
    )
    return tuple(notes)


def parse_budget_or_counts(text: str) -> str | dict[str, Any]:
    """`12b`, a name, or `embed=1920,expert_ffn=960`, counts; per block `ffn=16/32`.

    Raises:
      ValueError: with everything that is no count.
    """
    if "=" not in text:
        return text
    counts, problems = {}, []
    for item in text.split(","):
        axis, _, number = (part.strip() for part in item.partition("="))
        if axis not in AXES:
            problems.append(f"{item!r}: unknown axis{did_you_mean(axis, AXES)}")
            continue
        try:
            each = tuple(int(n) for n in number.split("/"))
        except ValueError:
            problems.append(f"{item!r}: expected axis=count, or axis=count/count/...")
            continue
        counts[axis] = each if "/" in number else each[0]
    if problems:
        raise ValueError("counts:\n  " + "\n  ".join(problems))
    return counts


def _story(nested: Nested, budget: Any) -> tuple[str, ...]:
    """How a submodel was cut, for people."""
    counts: Counts = nested.counts(budget)
    parent = cost(param_specs(nested.cfg), nested.cfg)
    kept = ", ".join(f"`{axis}` {n}" for axis, n in counts.items())
    formats = sorted({*nested.formats.values()})
    named = f"budget `{budget}` of" if isinstance(budget, str) else "cut from"
    lines = [
        f"{named} a nested checkpoint with {parent.total_params:,} parameters, "
        f"{parent.active_params:,} active",
        f"kept, the first units of every axis in order of importance: {kept or 'all'}",
    ]
    if formats:
        lines.append(f"quantized in the nested checkpoint: {', '.join(formats)}")
    told = ("imported", "date", "sliced")
    return (
        *lines,
        *(f"{n}: {nested.provenance[n]}" for n in told if n in nested.provenance),
    )


def _apart(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Refuses to write into what is being read."""
    one, other = Path(source).resolve(), Path(target).resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"{target} and {source} lie within one another: take another")
