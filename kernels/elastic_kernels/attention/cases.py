"""Shapes of attention worth testing and timing, shared by the tests and the bench.

    b batch   t time   s key time   k kv_heads   q q_per_kv   h head_dim
"""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call; `s` is a cache's capacity, `offset` what its rows hold."""

    b: int
    t: int
    k: int
    q: int
    h: int
    documents: bool = False
    s: int | None = None
    offset: tuple[int, ...] | None = None


TESTED = {
    "one_block": Case(b=2, t=17, k=1, q=2, h=5),
    "uneven_blocks": Case(b=2, t=131, k=2, q=2, h=4),
    "documents": Case(b=2, t=150, k=2, q=1, h=4, documents=True),
    "decoding": Case(b=3, t=1, k=2, q=3, h=4, s=40, offset=(0, 17, 39)),
    "prefill": Case(b=3, t=70, k=2, q=2, h=4, s=201, offset=(0, 40, 131)),
}

TIMED = {
    "B2_T512": Case(b=2, t=512, k=2, q=4, h=32),
    "B1_T2048": Case(b=1, t=2048, k=2, q=4, h=32),
    "B16_T128": Case(b=16, t=128, k=2, q=2, h=16),
    "B8_decoding": Case(b=8, t=1, k=2, q=4, h=32, s=1024, offset=(700,) * 8),
    "B1_prefill": Case(b=1, t=512, k=2, q=4, h=32, s=2048, offset=(512,)),
}


def inputs(case: Case, seed: int = 0, dtype=np.float32) -> tuple:
    """Random `q, k, v` and a dict of the options that the case has."""
    rng = np.random.default_rng(seed)
    keys = (case.b, case.s or case.t, case.k, case.h)
    shapes = (case.b, case.t, case.k, case.q, case.h), keys, keys
    q, k, v = (jnp.asarray(2 * rng.standard_normal(shape), dtype) for shape in shapes)
    options = {}
    if case.documents:
        starts = rng.random((case.b, case.t)) < 0.05
        options["segment_ids"] = jnp.asarray(starts.cumsum(axis=1), jnp.int32)
    if case.offset is not None:
        options["offset"] = jnp.asarray(case.offset, jnp.int32)
    return q, k, v, options
