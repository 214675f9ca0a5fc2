"""One smoke run of the tiny experiment, shared by every test that reads its workdir."""

import fcntl
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
COMMAND = (
    sys.executable,
    "experiments/run.py",
    "--config=experiments/configs/tiny.py",
    "--config.smoke=True",
)


@pytest.fixture(scope="session")
def smoke_workdir(tmp_path_factory) -> pathlib.Path:
    """The workdir of a complete smoke run, made by the first who asks: only read it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers of this session
    workdir, outcome = shared / "smoke", shared / "smoke.json"
    with (shared / "smoke.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not outcome.exists():
            done = subprocess.run(
                [*COMMAND, f"--workdir={workdir}"],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=600,
            )
            outcome.write_text(json.dumps([done.returncode, done.stdout]))
    code, output = json.loads(outcome.read_text())
    if code != 0:
        raise RuntimeError(f"the smoke run ended with exit code {code}:\n{output}")
    return workdir
