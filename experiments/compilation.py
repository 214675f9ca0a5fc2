"""Quick compilation, for runs that compile far longer than they compute.

No JAX is imported here: XLA reads its flags once, when JAX starts.
"""

import importlib.metadata
import os

FLAGS = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Halves the time; XLA aborts on a flag that it does not know.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")


def quick(*more: str) -> None:
    """Adds the flags, and `more`, to those that the environment sets."""
    given = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.partition("=")[0] for flag in given}
    added = [f for f in (*FLAGS, *more) if f.partition("=")[0] not in names]
    os.environ["XLA_FLAGS"] = " ".join([*given, *added])
