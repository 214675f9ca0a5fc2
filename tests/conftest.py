"""Virtual devices and quick compilation for all tests, and one smoke run to share."""

import fcntl
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

from experiments import compilation

# Read by JAX when it is imported, which the tests do later.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
compilation.quick("--xla_force_host_platform_device_count=8")

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="session")
def smoke_run() -> Callable[..., subprocess.CompletedProcess]:
    """Runs the tiny experiment at smoke size: `smoke_run(workdir, *flags)`."""

    def run(workdir: pathlib.Path, *flags: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [
                sys.executable,
                "experiments/run.py",
                "--config=experiments/configs/tiny.py",
                "--config.smoke=True",
                f"--workdir={workdir}",
                *flags,
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1800,
        )

    return run


@pytest.fixture(scope="session")
def smoke_workdir(tmp_path_factory, smoke_run) -> pathlib.Path:
    """The workdir of a complete smoke run, made by the first who asks: only read it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers of this session
    workdir, outcome = shared / "smoke", shared / "smoke.json"
    with (shared / "smoke.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not outcome.exists():
            done = smoke_run(workdir)
            outcome.write_text(json.dumps([done.returncode, done.stdout]))
    code, output = json.loads(outcome.read_text())
    if code != 0:
        raise RuntimeError(f"the smoke run ended with exit code {code}:\n{output}")
    return workdir
