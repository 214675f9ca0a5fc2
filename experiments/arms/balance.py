"""A parent with load balancing: experts that do too little are favoured.

    e experts

As in the released models the correction is a bias that takes part in the choice of
experts and in nothing else (arXiv 2408.15664). No loss reaches it, so what stands in
place of its gradient is the excess of an expert's load over the mean: Adam divides
that by its own size, which leaves about its sign.
"""

import functools

import jax
import jax.numpy as jnp

from elastic_jax import model, objectives
from elastic_jax.config import ModelConfig
from elastic_jax.curriculum import Stage
from elastic_jax.objectives import Objective

EXCESS = 1e-3  # far below other gradients, which share a norm that is clipped


def balanced_objective(cfg: ModelConfig, stage: Stage) -> Objective:
    """Next-token cross entropy, and a bias that evens out the loads of experts."""
    plain = objectives.language_objective(cfg, stage)

    def gradients(state, batch, step):
        found, losses = plain.gradients(state, batch, step)
        rows = batch["tokens"], batch["segment_ids"]
        rows = tuple(jnp.asarray(each[: stage.micro_batch]) for each in rows)
        layers = list(found["params"]["layers"])
        for block, share in loads(state.params, *rows, cfg).items():
            excess = EXCESS * (share - 1 / cfg.experts)
            layers[block] = layers[block] | {"router_bias": excess}
        params = found["params"] | {"layers": tuple(layers)}
        return found | {"params": params}, losses

    return Objective(gradients)


@functools.partial(jax.jit, static_argnums=3)
def loads(params, tokens, segment_ids, cfg: ModelConfig) -> dict[int, jax.Array]:
    """Block -> the share [e] of its choices that fell on each expert."""
    found, valid = {}, (segment_ids > 0)[..., None]

    def tap(layer, name, value):
        if name == "experts":
            chosen = jax.nn.one_hot(value[0], cfg.experts) * valid[..., None]
            found[layer] = jnp.sum(chosen, axis=(0, 1, 2)) / jnp.sum(chosen)

    model.hidden_states(params, tokens, cfg, segment_ids=segment_ids, tap=tap)
    return found
