"""Peak memory of import and export, for a model with Nano v3's real widths.

    python experiments/bench_convert.py [--workdir=DIR] [--pattern=ME*M]

Writes a random BF16 checkpoint in the Hugging Face layout (real vocabulary, 128
experts; 4.2 GB for the default pattern), then runs `import`, `export` of a 12B-style
slice and `export` of the whole as processes of their own. Each holds one tensor, or one
stack of experts, at a time: so the peak does not grow with the depth. Needs 13 GB of
disk.
"""

import argparse
import dataclasses
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402

import elastic_jax as ej  # noqa: E402
from elastic_jax import axes  # noqa: E402
from elastic_jax.lazy import LazyArray  # noqa: E402
from elastic_jax.tables import format_bytes, markdown_table  # noqa: E402

SLICE = "embed=1920,expert_ffn=960"
RUN = (
    "import resource, sys; sys.path[:0] = {paths}; "
    "from elastic_jax.__main__ import main; code = main({arguments}); "
    "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); "
    "sys.exit(code)"
)


def random_params(cfg: ej.ModelConfig):
    """A lazy tree of random BF16 weights: a tile of noise, repeated."""
    tile = np.random.default_rng(0).normal(size=2**20).astype(ml_dtypes.bfloat16) / 50
    specs = ej.param_specs(cfg)

    def leaf(path, spec):
        shape = axes.shape(cfg, specs, path, spec)
        return LazyArray(shape, tile.dtype, lambda: np.resize(tile, shape))

    return axes.map_specs(leaf, specs)


def run(*arguments: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of one command, in a process of its own."""
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels")]
    code = RUN.format(paths=paths, arguments=list(arguments))
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    return time.monotonic() - start, int(done.stdout.rsplit("peak", 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path)
    parser.add_argument("--pattern", default="ME*M")
    given = parser.parse_args()
    workdir = given.workdir or pathlib.Path(tempfile.mkdtemp())
    cfg = dataclasses.replace(ej.presets.nemotron3_nano(), pattern=given.pattern)
    specs = ej.param_specs(cfg)
    largest = max(np.prod(axes.shape(cfg, specs, *item)) * 2 for item in specs)
    total = ej.cost(specs, cfg).weight_bytes("bf16")
    ej.to_hf(workdir / "hf", random_params(cfg), cfg)
    rest, parts = str(workdir), []
    for name, arguments in {
        "import": ("import", f"{rest}/hf", f"{rest}/nested"),
        "export, 12B-style slice": (
            *("export", f"{rest}/nested", f"{rest}/slice", "--budget", SLICE),
        ),
        "export, whole": ("export", f"{rest}/nested", f"{rest}/whole"),
    }.items():
        seconds, peak = run(*arguments)
        parts.append({"command": name, "peak": peak, "seconds": seconds})
    print(
        f"pattern {cfg.pattern}: weights {format_bytes(total)}, largest tensor or "
        f"stack of experts {format_bytes(int(largest))}"
    )
    print(
        markdown_table(
            parts,
            {
                "command": lambda row: row["command"],
                "peak resident": lambda row: format_bytes(row["peak"]),
                "seconds": lambda row: f"{row['seconds']:.0f}",
            },
        )
    )
    same = all(
        (workdir / "hf" / file.name).read_bytes() == file.read_bytes()
        for file in (workdir / "whole").glob("*.safetensors")
    )
    print(f"export(import(D)) reproduces D's shards byte for byte: {same}")
    if given.workdir is None:
        shutil.rmtree(workdir)


if __name__ == "__main__":
    main()
