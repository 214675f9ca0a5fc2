"""Virtual devices and quick compilation for all tests, and one smoke run to share."""

import fcntl
import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest
from jaxtyping import install_import_hook

from experiments import process

# Read by JAX when it is imported, which the tests do later.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
process.compile_quickly("--xla_force_host_platform_device_count=8")

# The shapes in signatures hold, wherever arguments are not checked for users anyway.
OPERATIONS = ("ssd", "grouped_matmul", "attention", "gated_norm")
FORMS = itertools.product(OPERATIONS, ("xla", "reference"))
install_import_hook(
    ["elastic_jax.layers", *(f"elastic_kernels.{op}.{form}" for op, form in FORMS)],
    "beartype.beartype",
)

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def programs_are_given_back():
    """After each module: Linux maps 65,530 regions, a program takes a hundred."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="session")
def smoke_run() -> Callable[..., subprocess.CompletedProcess]:
    """Runs an experiment at smoke size: `smoke_run(workdir, *flags, config=name)`."""

    def run(
        workdir: pathlib.Path, *flags: str, config: str = "tiny"
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [
                sys.executable,
                "experiments/run.py",
                f"--config=experiments/configs/{config}.py",
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
    """The workdir of a complete smoke run of the tiny experiment: only read it."""
    return _shared(tmp_path_factory, smoke_run, "tiny")


@pytest.fixture(scope="session")
def text_workdir(tmp_path_factory, smoke_run) -> pathlib.Path:
    """The same of the experiment on text."""
    return _shared(tmp_path_factory, smoke_run, "text")


@pytest.fixture(scope="session")
def control_workdir(tmp_path_factory, smoke_run) -> pathlib.Path:
    """The same of the experiment on budget control."""
    return _shared(tmp_path_factory, smoke_run, "budget_control")


def _shared(tmp_path_factory, smoke_run, config: str) -> pathlib.Path:
    """The workdir of a run that the first who asks makes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers of this session
    workdir, outcome = shared / f"smoke-{config}", shared / f"smoke-{config}.json"
    with (shared / f"smoke-{config}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not outcome.exists():
            done = smoke_run(workdir, config=config)
            outcome.write_text(json.dumps([done.returncode, done.stdout]))
    code, output = json.loads(outcome.read_text())
    if code != 0:
        raise RuntimeError(f"the smoke run ended with exit code {code}:\n{output}")
    return workdir


@pytest.fixture(scope="session")
def talker():
    """A random model (params, cfg) whose greedy text wanders over its vocabulary."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import elastic_jax as ej
    from elastic_jax import axes

    cfg = ej.ModelConfig(
        pattern="ME*M-",
        vocab=97,
        embed=64,
        ssm_groups=2,
        heads_per_group=2,
        ssm_head_dim=16,
        ssm_state=32,
        kv_heads=2,
        q_per_kv=2,
        head_dim=16,
        experts=4,
        expert_ffn=32,
        shared_ffn=48,
        ffn=80,
        top_k=2,
    )
    specs, rng = ej.param_specs(cfg), np.random.default_rng(0)

    def loud(path, spec):
        noise = rng.standard_normal(axes.shape(cfg, specs, path, spec))
        if spec.contracted:
            return noise / np.sqrt(np.prod([getattr(cfg, d) for d in spec.contracted]))
        return (spec.init == "ones") + 0.3 * noise

    return jax.tree.map(jnp.float32, axes.map_specs(loud, specs)), cfg
