"""What a process must be told before JAX starts, so nothing here imports it."""

import importlib.metadata
import os
import sys

QUICK = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Halves the time; XLA aborts on a flag that it does not know.
    QUICK.append("--xla_cpu_use_fusion_emitters=false")


def compile_quickly(*more: str) -> None:
    """For runs that compile far longer than they compute."""
    add_flags(*QUICK, *more)


def add_flags(*flags: str) -> None:
    """Adds XLA flags to those of the environment, which win."""
    given = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.partition("=")[0] for flag in given}
    added = [f for f in flags if f.partition("=")[0] not in names]
    os.environ["XLA_FLAGS"] = " ".join([*given, *added])


def use_huge_pages() -> None:
    """Restarts this process, once, with a malloc that asks for huge pages.

    XLA returns its buffers after every step; without this, a fifth to a quarter of a
    training step on a CPU goes into faulting their pages in again. A choice of the
    environment stays as it is; other systems than Linux with glibc ignore it.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
