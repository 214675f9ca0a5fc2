"""The whole train step, kernels included, compiles for a GPU that is not here."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
NEEDED = "triton", "jax_triton", "jax_cuda13_plugin"
ABSENT = [name for name in NEEDED if importlib.util.find_spec(name) is None]

# Of `ej.presets.tiny("ME*M-")`: forward, and what each saves or learns behind it.
MAMBA, EXPERTS = 4 + 2, 6  # a scan and its norm; the products of experts

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        bool(ABSENT), reason=f"{ABSENT} are not installed: pip install .[aot]"
    ),
]


def run(what):
    """In a process of its own: a compiler that fails may end it."""
    roots = f"{HERE.parents[1]}{os.pathsep}{HERE.parents[1] / 'kernels'}"
    done = subprocess.run(
        [sys.executable, str(HERE / "deviceless.py"), what],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": roots},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_train_step_lowers_for_cuda():
    assert run("lower") == {"kernels": 2 * MAMBA + EXPERTS}


def test_the_train_step_compiles_for_an_h100():
    found = run("compile")
    assert found["kernels"] == 2 * MAMBA + EXPERTS
    assert found["temporaries_bytes"] > 0
