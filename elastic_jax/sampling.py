"""How the next token is drawn: greedily or at random, every row in its own way.

    b batch   v vocab

A draw depends on the row's logits, its seed and the number of the token in its row: not
on the batch around it, nor on how the work was split into calls.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32


class Sampling(NamedTuple):
    """The ways of all rows; `sampling` makes it.

    Attributes:
      temperature: 0 takes the most likely token, and nothing below matters.
      top_k: only this many of the most likely tokens; 0 is all.
      top_p: only the most likely tokens that reach this probability together.
      seeds: one stream of random numbers per row.
    """

    temperature: Float[Array, " b"]
    top_k: Int[Array, " b"]
    top_p: Float[Array, " b"]
    seeds: UInt32[Array, " b"]


def sampling(
    rows: int,
    *,
    temperature: Any = 0.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    seeds: Any = 0,
) -> Sampling:
    """The way of each of `rows` rows; every option is one value or one per row.

    Rows that share a seed draw alike from equal logits.

    Raises:
      ValueError: with everything that is out of range.
    """
    given = {
        "temperature": (temperature, np.float32, lambda x: np.isfinite(x) & (x >= 0)),
        "top_k": (top_k, np.int32, lambda x: x >= 0),
        "top_p": (top_p, np.float32, lambda x: (x > 0) & (x <= 1)),
        "seeds": (seeds, np.uint32, lambda x: (x >= 0) & (x < 2**32)),
    }
    ranges = {
        "temperature": "finite numbers from 0 on",
        "top_k": "ints from 0 on",
        "top_p": "numbers above 0, up to 1",
        "seeds": "ints in 0..2**32 - 1",
    }
    problems, made = [], {}
    for name, (value, dtype, fits) in given.items():
        array = np.asarray(value)
        whole = np.issubdtype(dtype, np.integer)
        number = array.dtype.kind in ("iu" if whole else "iuf")
        if array.shape not in ((), (rows,)) or not number or not fits(array).all():
            problems.append(
                f"{name}: expected {ranges[name]}, one or {rows} of them, got {value!r}"
            )
            continue
        made[name] = jnp.asarray(np.broadcast_to(array, (rows,)).astype(dtype))
    if problems:
        raise ValueError("cannot sample:\n  " + "\n  ".join(problems))
    return Sampling(**made)


def draw(logits: Float[Array, "b v"], how: Sampling, number: Array) -> Int[Array, " b"]:
    """The next token of every row.

    Args:
      number: how many tokens the row has drawn before, an int or [b].
    """
    greedy = jnp.argmax(logits, axis=-1)
    # A sort of the vocabulary at every step is dear: only where somebody asks for it.
    drawn = jax.lax.cond(
        jnp.any(how.temperature > 0), _random, lambda *_: greedy, logits, how, number
    )
    return jnp.where(how.temperature > 0, drawn, greedy).astype(jnp.int32)


def _random(logits, how: Sampling, number):
    """Gumbel's trick over what top-k and top-p leave."""
    vocab = logits.shape[-1]
    heat = jnp.where(how.temperature > 0, how.temperature, 1.0)[:, None]
    order = jnp.argsort(-logits, axis=-1, stable=True)
    scaled = jnp.take_along_axis(logits, order, axis=-1).astype(jnp.float32) / heat
    share = jax.nn.softmax(scaled, axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    rank = jnp.arange(vocab)
    most = jnp.where(how.top_k > 0, how.top_k, vocab)[:, None]
    kept = (rank < most) & ((before < how.top_p[:, None]) | (rank == 0))

    def noise(seed, n):
        key = jax.random.fold_in(jax.random.key(seed), n)
        return jax.random.gumbel(key, (vocab,))

    numbers = jnp.broadcast_to(number, how.seeds.shape)
    by_rank = jnp.take_along_axis(jax.vmap(noise)(how.seeds, numbers), order, axis=-1)
    best = jnp.argmax(jnp.where(kept, scaled + by_rank, -jnp.inf), axis=-1)
    return jnp.take_along_axis(order, best[:, None], axis=-1)[:, 0]
