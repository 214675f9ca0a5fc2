"""How many bytes a submodel's restore reads, and what verifying them costs.

    python experiments/bench_checkpoint.py [--dir=DIR] [--repeats=25] [--format=nvfp4]

Saves a nested checkpoint with the widths of Nemotron 3 Nano (fewer blocks, experts
and vocabulary entries: 270 MB) and restores submodels of it. Bytes are what the
process reads (`rchar`), metadata included; a share is the submodel's fraction of the
parent's bytes in memory, times the bytes on disk. The cost of verifying is the
difference to the same checkpoint stored without checksums, restored in turn, in CPU
seconds, which other processes disturb least.

2 cores of an AMD EPYC shared with other work, files in the page cache, JAX 0.10.2,
2026-11-22, 3 minutes with --repeats=15:

    submodel                                    share MB   read MB   read / share
    30B                                            269.2     269.1          1.000
    23B  embed=2016                                201.9     202.7          1.004
    12B  expert_ffn=960 embed=1920                 149.4     156.3          1.046
    six random counts on eight axes               92-172   103-185    1.015-1.117

    --format=nvfp4, 147 MB in memory, 127 on disk (2026-11-23):

    30B                                            127.3     127.0          0.998
    23B  embed=2016                                 95.5      96.0          1.006
    12B  expert_ffn=960 embed=1920                  77.5      78.7          1.015
    six random counts on eight axes                46-91     49-95    1.004-1.086

    verifying, in bfloat16: 8.7% of restoring 30B (1.28 s), 6.9% of 12B (0.61 s).
    TensorStore's wheel computed the CRC-32C from tables here, at about 3 GB/s.
"""

import argparse
import dataclasses
import os
import resource
import statistics
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import elastic_jax as ej
from elastic_jax import axes, checkpoint, stored
from elastic_jax.axes import AXES
from elastic_jax.quantize import size_bytes
from elastic_kernels.quant_array import FORMATS

# The released sizes by name; `unplanned` adds counts that nobody prepared for.
SUBMODELS = {
    "30B": {},
    "23B": {"embed": 2016},
    "12B": {"embed": 1920, "expert_ffn": 960},
}


def nano() -> ej.ModelConfig:
    """Nemotron 3 Nano's widths, in one block of each kind."""
    parent = ej.presets.nemotron3_nano()
    return dataclasses.replace(parent, pattern="ME*", vocab=2048, experts=8)


def normal_params(cfg: ej.ModelConfig):
    """Normal numbers in bfloat16: their bytes compress like those of weights."""
    draw, specs = np.random.default_rng(0), ej.param_specs(cfg)

    def leaf(path, spec):
        shape = axes.shape(cfg, specs, path, spec)
        return draw.standard_normal(shape, dtype=np.float32).astype(jnp.bfloat16)

    return axes.map_specs(leaf, specs)


def unplanned(cfg: ej.ModelConfig, number: int) -> dict[str, dict[str, int]]:
    """Counts drawn uniformly from the upper half of every axis of `cfg`."""
    draw, found = np.random.default_rng(0), {}
    for i in range(number):
        kept = {}
        for name in (axis for axis in AXES if axis not in ("ffn", "layers")):
            full, step = getattr(cfg, name), AXES[name].step
            low = max(full // 2, cfg.top_k if name == "experts" else step)
            options = np.arange(-(-low // step) * step, full + 1, step)
            kept[name] = int(draw.choice(options))
        found[f"random {i}"] = kept
    return found


def restored(path: str, counts: dict) -> tuple[int, int, float, float]:
    """Bytes of the arrays, bytes read, CPU and wall seconds of one restore."""
    read, cpu, wall = bytes_read(), cpu_seconds(), time.perf_counter()
    params, _ = checkpoint.open_nested(path).restore(counts)
    jax.block_until_ready(params)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    return size_bytes(params), bytes_read() - read, cpu, wall


def bytes_read() -> int:
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def unverified():
    """Codecs without the checksum, which comes last."""
    return mock.patch.object(stored, "CODECS", stored.CODECS[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", help="where to write; the system's temporary place")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--format", choices=FORMATS, help="quantize; default: bfloat16")
    given = parser.parse_args()

    cfg = nano()
    params = normal_params(cfg)
    if given.format:
        recipe = ej.Recipe(given.format)
        params = ej.quantize(params, ej.param_specs(cfg), cfg, recipe)
    with tempfile.TemporaryDirectory(dir=given.dir) as work:
        path, bare = os.path.join(work, "checkpoint"), os.path.join(work, "bare")
        begin = time.perf_counter()
        checkpoint.save_nested(path, params, cfg, budgets={})
        seconds = time.perf_counter() - begin
        with unverified():
            checkpoint.save_nested(bare, params, cfg, budgets={})

        total = size_bytes(params)
        size = checkpoint.open_nested(path).size_bytes
        print(f"{total / 1e6:.1f} MB in {given.format or 'bfloat16'}, ", end="")
        print(f"{size / 1e6:.1f} MB on disk, saved in {seconds:.1f} s\n")
        print("submodel   share MB   read MB   read / share   seconds   counts")
        for name, counts in (SUBMODELS | unplanned(cfg, 6)).items():
            kept_bytes, read, _, wall = restored(path, counts)
            share = size * kept_bytes / total
            kept = " ".join(f"{a}={counts[a]}" for a in AXES if a in counts)
            print(
                f"{name:9}{share / 1e6:10.1f}{read / 1e6:10.1f}{read / share:15.3f}"
                f"{wall:10.2f}   {kept}"
            )
        for name in ("30B", "12B") if given.repeats else ():
            with_, without = [], []
            for _ in range(given.repeats):
                with_.append(restored(path, SUBMODELS[name])[2])
                with unverified():
                    without.append(restored(bare, SUBMODELS[name])[2])
            middle = statistics.median(with_), statistics.median(without)
            print(
                f"\nverifying {name}: {1 - middle[1] / middle[0]:.1%} of a restore "
                f"(medians of {given.repeats}: {middle[0]:.3f} s, {middle[1]:.3f} s "
                f"without; least {min(with_):.3f} s, {min(without):.3f} s)"
            )


if __name__ == "__main__":
    main()
