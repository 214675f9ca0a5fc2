"""Rows in the order of their experts, cut into tiles: what a grid of blocks walks over.

m tokens   c choices (top_k)   n rows = m c   e experts
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Schedule(NamedTuple):
    """Rows in the order of their experts, and how they are cut into tiles."""

    order: Int[Array, " n"]  # the row at each place
    ends: Int[Array, " e+1"]  # the first place of each expert
    tiles: Int[Array, "tiles 3"]  # expert or -1, first place, place behind the last


def schedule_of(experts: Int[Array, "m c"], count: int, block: int) -> Schedule:
    """Sorts rows by expert, and cuts what each expert has into tiles of `block`."""
    n = experts.size
    keys = experts.reshape(-1).astype(jnp.uint32) * n + jnp.arange(n, dtype=jnp.uint32)
    keys = jnp.sort(keys)
    bounds = jnp.arange(count + 1, dtype=jnp.uint32) * n
    ends = jnp.searchsorted(keys, bounds).astype(jnp.int32)
    of_expert = -(-jnp.diff(ends) // block)
    behind = jnp.cumsum(of_expert)
    tile = jnp.arange(n // block + min(count, n), dtype=jnp.int32)
    expert = jnp.searchsorted(behind, tile, side="right").astype(jnp.int32)
    real, expert = expert < count, jnp.minimum(expert, count - 1)
    first = ends[expert] + (tile - (behind - of_expert)[expert]) * block
    last = jnp.minimum(first + block, ends[expert + 1])
    tiles = jnp.stack([expert, first, last], 1).astype(jnp.int32)
    tiles = jnp.where(real[:, None], tiles, jnp.array([-1, 0, 0], jnp.int32))
    return Schedule((keys % n).astype(jnp.int32), ends, tiles)
