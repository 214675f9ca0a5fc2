"""Kernels without a GPU: run in Triton's interpreter, or compiled to machine code."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

HERE = pathlib.Path(__file__).parent
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "JAX_PLATFORMS": "cpu",
    "NPROC": "16",  # threads of XLA: some wait in an interpreted kernel for others
}


@pytest.fixture(scope="session")
def interpret() -> Callable[[str], None]:
    """Runs the tests of a file in this folder with every kernel interpreted.

    In a process of its own: a kernel is interpreted or compiled from its import on.
    """
    pytest.importorskip("triton", reason="triton is not installed: pip install .[test]")

    def run(file: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, str(HERE / file)],
            env=os.environ | ENVIRONMENT,
            cwd=HERE.parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout
        assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout

    return run


@pytest.fixture(scope="session")
def deviceless() -> Callable[..., dict[str, int]]:
    """Runs `deviceless.py`, by itself: a compiler that fails may end its process."""

    def run(*arguments: str) -> dict[str, int]:
        roots = f"{HERE.parents[1]}{os.pathsep}{HERE.parents[1] / 'kernels'}"
        done = subprocess.run(
            [sys.executable, str(HERE / "deviceless.py"), *arguments],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": roots},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
