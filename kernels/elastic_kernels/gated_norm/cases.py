"""Shapes of gated norms worth testing and timing, shared by the tests and the bench.

b batch   t time   g groups   r heads_per_group   p head_dim
"""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call, and how its mask and live count vary."""

    b: int
    t: int
    g: int
    r: int
    p: int
    mask: str | None = None  # "channels" or "tokens"


TESTED = {
    "plain": Case(2, 3, 2, 3, 4),
    "channels": Case(1, 5, 2, 3, 20, mask="channels"),
    "tokens": Case(2, 40, 1, 2, 5, mask="tokens"),
}

TIMED = {
    "T2048_G1_H8": Case(1, 2048, 1, 8, 64),
    "T2048_G8_H1": Case(1, 2048, 8, 1, 64),
}


def inputs(case: Case, seed: int = 0, dtype=np.float32) -> tuple:
    """Random `y, z, scale, mask, live`: some of the mask is off, live is its sum."""
    rng = np.random.default_rng(seed)
    b, t, g, r, p = case.b, case.t, case.g, case.r, case.p
    y, z = rng.standard_normal((2, b, t, g, r, p))
    scale = 1 + 0.3 * rng.standard_normal((g, r, p))
    shape = {None: None, "channels": (r, p), "tokens": (b, t, r, p)}[case.mask]
    mask, live = None, np.asarray(r * p)
    if shape:
        mask = np.maximum(rng.standard_normal(shape) + 0.5, 0)
        live = mask.sum((-2, -1)) + 1
    floats = (y, z, scale, mask, live)
    return tuple(None if a is None else jnp.asarray(a, dtype) for a in floats)
