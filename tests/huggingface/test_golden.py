"""Logits that transformers computed, stored: parity is tested also without torch.

`test_parity.py` checks that the stored ones are still those of transformers.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import axes

FILE = pathlib.Path(__file__).with_name("golden.npz")


def cases():
    """Name -> configuration, seed of the parameters, tokens."""
    tiny = ej.presets.tiny
    models = {
        "nano_v3": tiny("ME*"),
        "dense_nano_v2": tiny("M-*"),
        "expert_groups": dataclasses.replace(
            tiny("E*"), experts=12, n_group=4, topk_group=2, top_k=3
        ),
    }
    return {
        name: (cfg, i, np.random.default_rng(i).integers(3, cfg.vocab, (2, 7)))
        for i, (name, cfg) in enumerate(models.items())
    }


def params(cfg, seed: int, dtype=jnp.float32):
    """Values at which every term matters: biases, gates and norms are not at rest."""
    draw, specs = np.random.default_rng(seed), ej.param_specs(cfg)

    def value(path, spec):
        shape = axes.shape(cfg, specs, path, spec)
        fan_in = np.prod([getattr(cfg, d) for d in spec.contracted] or [4.0])
        noise = draw.normal(size=shape) / np.sqrt(fan_in)
        if spec.init == "embedding":
            noise = draw.normal(size=shape)
        if path[-1] in ("norm", "gate_norm", "final_norm", "D"):
            noise = 1 + 0.3 * draw.normal(size=shape)
        if path[-1] == "A_log":
            noise = np.log(draw.uniform(0.5, 4, size=shape))
        kind = jnp.float32 if path[-1] == "router_bias" else dtype
        return jnp.asarray(noise, kind)

    return axes.map_specs(value, specs)


@pytest.mark.parametrize("name", cases())
def test_stored_logits(name, tmp_path):
    """Ours, and ours through a directory and back, are what transformers computed."""
    cfg, seed, tokens = cases()[name]
    tokens, stored = jnp.asarray(tokens, jnp.int32), np.load(FILE)[name]
    apply = jax.jit(ej.apply, static_argnums=2)
    ej.to_hf(tmp_path / "hf", params(cfg, seed), cfg)
    for model, known in ((params(cfg, seed), cfg), ej.from_hf(tmp_path / "hf")):
        ours = np.asarray(apply(model, tokens, known))
        bound = 2e-5 * np.abs(stored).max()
        np.testing.assert_allclose(ours, stored, rtol=0, atol=bound)
