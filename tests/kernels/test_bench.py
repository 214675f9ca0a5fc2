"""The bench runs where a GPU's machine has JAX, NumPy and Triton, and no more."""

import json
import os
import pathlib
import subprocess
import sys

KERNELS = pathlib.Path(__file__).parents[2] / "kernels"
OTHERS = (
    *("jaxtyping", "flax", "optax", "orbax", "grain", "chex", "ml_collections"),
    *("torch", "transformers", "matplotlib", "elastic_jax"),
)


def test_the_half_of_a_gpu_needs_no_other_package(tmp_path):
    command = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({OTHERS}))  # None: importing it fails
sys.path.insert(0, {str(KERNELS)!r})
sys.argv[1:] = ["--small", "--ops", "grouped_matmul", "--json", "found.json"]
runpy.run_path({str(KERNELS / "bench.py")!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", command],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert {row["operation"] for row in found["errors"]} >= {"ssd", "expert_mlp"}
    assert {row["case"] for row in found["times"]} == {
        "grouped_matmul 32 rows forward",
        "grouped_matmul 32 rows both",
    }
