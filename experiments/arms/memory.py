"""Bytes of one nested checkpoint and of separate ones, on disk and by accounting."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import elastic_jax as ej
from elastic_jax import checkpoint, convert
from elastic_jax.quantize import table
from experiments.arms.start import Start


def arms(start: Start, seed: int) -> tuple[str, ...]:
    """Those of a seed: what is accounted is there once."""
    return ("toy",) if seed else ("toy", "Nemotron 3 Nano")


def rows(start: Start, seed: int, missing) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arm -> bytes of the nested checkpoint, and of one for every size."""
    if "toy" in missing:
        yield "toy", on_disk(start, seed)
    if "Nemotron 3 Nano" in missing:
        yield "Nemotron 3 Nano", accounted(start.asked["family"])


def on_disk(start: Start, seed: int) -> dict[str, Any]:
    """A BF16 checkpoint of random weights, whole, and cut into one per budget."""
    key = jax.random.key(start.plan.values["seed"] + seed)
    params = ej.init_params(key, start.plan.cfg)
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    path = start.workdir.path / "nested"
    checkpoint.save_nested(
        path, params, start.plan.cfg, budgets=start.counts, overwrite=True
    )
    separate = {}
    for name in start.counts:
        alone = start.workdir.path / f"separate-{name}"
        convert.slice_nested(path, alone, name, overwrite=True)
        separate[name] = _size_bytes(alone)
    return {"nested": {"bf16": _size_bytes(path)}, "separate": separate}


def accounted(family) -> dict[str, Any]:
    """The released parent and its submodels; nothing is allocated."""
    cfg = ej.presets.nemotron3_nano()
    specs = ej.param_specs(cfg)
    nested = {"bf16": ej.cost(specs, cfg).weight_bytes("bf16")}
    for format in ("fp8", "nvfp4"):
        priced = table(specs, cfg, ej.Recipe(format))
        nested[format] = sum(row["bytes"] for row in priced)
    separate = {
        name: ej.cost(specs, cfg, counts=ej.counts(cfg, **sizes)).weight_bytes("bf16")
        for name, sizes in family.items()
    }
    return {"nested": nested, "separate": separate}


def _size_bytes(path: pathlib.Path) -> int:
    """Of all files: arrays, scores, metadata."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
