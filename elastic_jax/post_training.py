"""Post-training quantization of a nested checkpoint, on text, into another one.

The parent is calibrated with all its named budgets, quantized as a whole and saved with
everything else that the checkpoint holds. Every budget is a slice of the result.
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elastic_jax import axes
from elastic_jax.axes import Path as ParamPath
from elastic_jax.calibration import InputStatistics, input_statistics
from elastic_jax.checkpoint import Nested, open_nested, save_nested
from elastic_jax.corpus import read_corpus
from elastic_jax.directories import check_free
from elastic_jax.model import param_specs
from elastic_jax.packing import Rows, read, stacked
from elastic_jax.quantization_error import Error, quantization_errors
from elastic_jax.quantize import Recipe, formats, quantize, table

PRECISIONS = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
}


@dataclass(frozen=True)
class CalibrationText:
    """What the parent reads to learn how large activations are.

    Attributes:
      files: as of `corpus.read_corpus`; the checkpoint's own tokenizer reads them.
      rows, context, batch: how many rows of how many tokens, and how many at a time.
      state: a file that keeps the pass, so that it can be continued; "" keeps none.

    Raises:
      ValueError: with every number that cannot be.
    """

    files: tuple[str, ...]
    rows: int = 128
    context: int = 512
    batch: int = 8
    state: str = ""

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("rows", "context", "batch")}
        problems = [
            f"{name}: expected a positive int, got {n!r}"
            for name, n in sizes.items()
            if type(n) is not int or n < 1
        ]
        if not self.files:
            problems.append("files: expected at least one")
        if problems:
            raise ValueError("invalid CalibrationText:\n  " + "\n  ".join(problems))


@dataclass(frozen=True)
class Quantized:
    """What was done.

    Attributes:
      table: rows of `quantize.table`, of the parent.
      errors: one per quantized parameter.
      never_met: experts that no token of the calibration reached, by parameter.
    """

    table: list[dict[str, Any]]
    errors: tuple[Error, ...]
    never_met: dict[ParamPath, tuple[int, ...]]


def quantize_nested(
    checkpoint: str | os.PathLike,
    path: str | os.PathLike,
    recipe: Recipe,
    *,
    calibration: CalibrationText | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Quantized:
    """Writes a nested checkpoint with the weights of another, quantized.

    The parent is in memory as it is stored, and packed beside.

    Args:
      calibration: without it weights alone are quantized, and what runs them keeps
        activations as they are.
      progress: called with what is done, how much of it, and of how much.

    Raises:
      ValueError: a checkpoint that is quantized already, a recipe or text that does not
        fit, weights or activations that are not finite; `path` is taken.
      OSError: the disk is full or failed; `path` is as before.
    """
    if Path(checkpoint).resolve() == Path(path).resolve():
        raise ValueError(f"{path} is what is read: take another path")
    check_free(path, overwrite=overwrite)
    nested = open_nested(checkpoint)
    if nested.formats:
        raise ValueError(
            f"{checkpoint} is quantized already: quantize the checkpoint that it was "
            "made from"
        )
    cfg, specs = nested.cfg, param_specs(nested.cfg)
    formats(specs, cfg, recipe)  # before anything is read
    batches = None if calibration is None else _batches(nested, calibration)
    odd = {p: kind for p, kind in nested.dtypes.items() if p.startswith("params.")}
    odd = sorted(p for p, kind in odd.items() if kind == "float64")
    if odd:
        raise ValueError(f"{odd[0]} is float64: save the checkpoint in float32 first")
    params, _ = nested.restore()
    record: dict[str, Any] = {"recipe": dataclasses.asdict(recipe)}
    inputs = None
    if batches is not None:
        inputs = _calibrated(params, batches, nested, calibration, progress)
        record["calibration"] = dict(inputs.provenance)
    packed = quantize(
        params, specs, cfg, recipe, input_largest=inputs and inputs.largest
    )
    errors = tuple(quantization_errors(params, packed, specs))
    save_nested(
        path,
        packed,
        cfg,
        budgets=nested.budgets,
        router=nested.router(),
        scores=nested.scores(),
        provenance=dict(nested.provenance) | {"quantized": record},
        files=nested.files(),
        overwrite=overwrite,
        on_bytes=lambda done, total: progress("write", done, total),
    )
    kinds = {p: PRECISIONS[axes.leaf(params, p).dtype.name] for p, _ in specs}
    rows = table(specs, cfg, recipe, precision=kinds)
    return Quantized(rows, errors, inputs.never_met if inputs else {})


def _batches(nested: Nested, text: CalibrationText) -> Sequence[dict[str, np.ndarray]]:
    """The calibration rows, by the checkpoint's own tokenizer, in equal batches."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = ""
        if data := nested.files().get("tokenizer.json"):
            tokenizer = str(Path(folder) / "tokenizer.json")
            Path(tokenizer).write_bytes(data)
        corpus = read_corpus(text.files, tokenizer=tokenizer)
    if corpus.vocab > nested.cfg.vocab:
        raise ValueError(
            f"the text needs {corpus.vocab} tokens, {nested.path} has "
            f"{nested.cfg.vocab}; it keeps {'a' if data else 'no'} tokenizer.json"
        )
    rows = Rows(corpus.documents, text.context)
    rows = rows.spread(min(text.rows, len(rows)))
    return [read(batch) for batch in stacked(rows, text.batch)]


def _calibrated(
    params, batches, nested: Nested, text: CalibrationText, progress
) -> InputStatistics:
    with tempfile.TemporaryDirectory() as folder:
        seen = iter(range(1, len(batches) + 1))
        return input_statistics(
            params,
            batches,
            nested.cfg,
            path=text.state or Path(folder) / "inputs.npz",
            budgets=tuple(nested.budgets.values()),
            save_every=4,
            provenance={"files": list(text.files), "rows": text.rows},
            on_batch=lambda _: progress("calibrate", next(seen), len(batches)),
        )
