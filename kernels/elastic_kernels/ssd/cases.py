"""Shapes worth testing and timing, shared by the tests and the bench.

    b batch   t time   g ssm_groups   r heads_per_group   p ssm_head_dim   n ssm_state

TESTED are small and awkward, TIMED are the widths that models have.
"""

import dataclasses

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call, and which optional arguments it has."""

    b: int
    t: int
    g: int
    r: int
    p: int
    n: int
    initial_state: bool = False
    resets: bool = False


TESTED = {
    "one_token": Case(2, 1, 2, 3, 4, 5, initial_state=True, resets=True),
    "tail": Case(2, 45, 2, 2, 3, 4, initial_state=True),
    "documents": Case(2, 77, 2, 3, 4, 5, initial_state=True, resets=True),
}

# Of the kernels: dimensions that fill no tile, more than one, and a cut sequence.
TILED = {
    "head_80": Case(1, 37, 1, 2, 80, 64, initial_state=True),
    "state_256": Case(1, 35, 1, 1, 16, 256, resets=True),
    "segments": Case(1, 266, 1, 2, 4, 5, initial_state=True),
    "segments_documents": Case(2, 266, 1, 1, 4, 5, resets=True),
}

TIMED = {
    "B1_T2048": Case(1, 2048, 1, 8, 64, 64),
    "B1_T4096": Case(1, 4096, 1, 8, 64, 64),
    "B1_T2048_G8": Case(1, 2048, 8, 1, 64, 64),
    "B4_T512": Case(4, 512, 1, 8, 64, 64),
    "B1_T512_small": Case(1, 512, 1, 8, 32, 32),
}


def inputs(case: Case, seed: int = 0, dtype=np.float32) -> tuple[tuple, dict]:
    """Random positional and keyword arguments of `ssd` for one case.

    Decays vary from nothing to complete within a chunk, a few steps are exactly
    zero as after padding, and resets, where the case has them, fall on the first
    token, on neighbours, and inside and between chunks.
    """
    rng = np.random.default_rng(seed)
    b, t, g, r, p, n = case.b, case.t, case.g, case.r, case.p, case.n

    def normal(*shape):
        return rng.standard_normal(shape)

    dt = np.logaddexp(0, normal(b, t, g, r) - 1) * (rng.random((b, t, 1, 1)) > 0.05)
    arguments = (
        normal(b, t, g, r, p),
        dt,
        -np.exp(normal(g, r)),
        normal(b, t, g, n) / np.sqrt(n),
        normal(b, t, g, n),
        normal(g, r),
    )
    options = {}
    if case.initial_state:
        options["initial_state"] = normal(b, g, r, p, n)
    if case.resets:
        resets = rng.random((b, t)) < 0.1
        resets[0, 0] = True
        resets[-1, 2:4] = True
        resets[-1, 32:33] = True
        options["resets"] = resets

    def cast(a):
        return jax.numpy.asarray(a, a.dtype if a.dtype == bool else dtype)

    return jax.tree.map(cast, (arguments, options))
