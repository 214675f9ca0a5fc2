"""Dense squared-ReLU MLP, elastic in its hidden width.

b batch   t time   d embed   f ffn
"""

import jax
from jaxtyping import Array, Float

from elastic_jax.axes import ParamSpec
from elastic_jax.masks import LayerMasks, elastic
from elastic_kernels import contract

SPECS = {"up": ParamSpec("embed -> ffn"), "down": ParamSpec("ffn -> embed")}

CACHE = {}


def mlp(
    params,
    x: Float[Array, "b t d"],
    masks: LayerMasks,
    *,
    segment_ids=None,
    lengths=None,
    cache=None,
    tap=None,
):
    """Transforms every token alone; returns the residual update and the empty cache."""
    h = jax.nn.relu(contract("btd,df->btf", x, params["up"])) ** 2
    h = elastic(h, masks, "ffn", dim=-1, tap=tap)
    return contract("btf,fd->btd", h, params["down"]), cache
