"""Drafting: a submodel of the same weights guesses what a larger one will write.

    b batch   k drafted tokens   v vocab

Both draw with the same random numbers (Gumbel noise by row, seed and token number; the
coupling of arXiv 2408.07978), so a draft is right exactly where the larger model itself
would have drawn that token: what is written, greedy or sampled, is what it would have
written alone, and its distribution with it. Nothing is lost but drafts.

By bytes read, a round costs (k + 1) c + v, c being the draft's share of the larger
model's bytes per token and v what verifying k + 1 tokens costs against one. It writes
1 + a tokens, a being the accepted drafts: a draft pays only where 1 + a exceeds that.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from elastic_jax.sampling import Sampling, draw


def propose(
    model: Any, cache: Any, last, lengths, how: Sampling, number, k: int
) -> tuple[Int[Array, "b k"], Any]:
    """Drafts k tokens per row, to be traced.

    Args:
      model: `extend` and `settle` of the drafting submodel.
      cache: all of the text but `last`, the last token [b].
      lengths: how many tokens of `last` and the drafts may stay, [b].
      number: how many tokens each row has drawn before, [b].

    Returns:
      the drafts, and the cache, which has read `last` and them tentatively: it holds
      what it held, and beside it what was read in all k + 1 steps.
    """

    def step(carry, i):
        live, token = carry
        here = (i < lengths).astype(jnp.int32)
        logits, read = model.extend(token[:, None], live, here, tentative=True)
        token = draw(logits[:, 0], how, number + i)
        return (model.settle(read, here), token), (token, _reads(read))

    (live, _), (tokens, reads) = jax.lax.scan(step, (cache, last), jnp.arange(k + 1))
    layers = tuple(
        held | {"read": jax.tree.map(_joined, read)} if read is not None else written
        for held, written, read in zip(
            cache["layers"], live["layers"], reads, strict=True
        )
    )
    return tokens[:k].T, {"filled": cache["filled"], "layers": layers}


def _reads(cache) -> tuple[Any, ...]:
    return tuple(layer.get("read") for layer in cache["layers"])


def _joined(steps: Array) -> Array:
    """[k + 1, b, 1, ...] of single steps as one chunk [b, k + 1, ...]."""
    return jnp.moveaxis(steps[:, :, 0], 0, 1)
