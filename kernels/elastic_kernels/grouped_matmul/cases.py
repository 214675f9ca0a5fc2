"""Shapes of expert layers worth testing and timing, shared by the tests and the bench.

m tokens   c choices (top_k)   e experts   d embed   f expert_ffn
"""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call; tokens choose among the first `routed` experts only."""

    m: int
    e: int
    c: int
    d: int
    f: int
    routed: int | None = None


TESTED = {
    "one_token": Case(m=1, e=4, c=2, d=3, f=5),
    "one_expert": Case(m=7, e=1, c=1, d=3, f=5),
    "uneven": Case(m=37, e=5, c=2, d=6, f=9),
    "idle_experts": Case(m=50, e=8, c=3, d=6, f=9, routed=3),
    "many_rows": Case(m=160, e=3, c=2, d=4, f=8),
    "strips": Case(m=2, e=3, c=2, d=96, f=4096),  # of weights, where rows are few
}

# Of the kernels: widths of more than one tile, the last of which is not full.
TILED = {"tiles": Case(m=24, e=3, c=2, d=80, f=144)}

TIMED = {
    "T512_E16_K2": Case(m=512, e=16, c=2, d=256, f=512),
    "T2048_E64_K6": Case(m=2048, e=64, c=6, d=256, f=512),
    "T16_E64_K6": Case(m=16, e=64, c=6, d=256, f=512),
    "T1_E64_K6": Case(m=1, e=64, c=6, d=256, f=512),
}


def inputs(case: Case, seed: int = 0, dtype=np.float32) -> tuple:
    """Random `x, up, down, experts, gates`: distinct experts, gates that sum to one."""
    rng = np.random.default_rng(seed)
    m, e, c, d, f = case.m, case.e, case.c, case.d, case.f
    preference = rng.random((m, case.routed or e))
    experts = np.argsort(preference, axis=-1)[:, :c]
    gates = rng.random((m, c)) + 0.1
    x = rng.standard_normal((m, d))
    up = rng.standard_normal((e, d, f)) / np.sqrt(d)
    down = rng.standard_normal((e, f, d)) / np.sqrt(f)
    x, up, down, gates = (
        jnp.asarray(a, dtype) for a in (x, up, down, gates / gates.sum(1)[:, None])
    )
    return x, up, down, jnp.asarray(experts, jnp.int32), gates
