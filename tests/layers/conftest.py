"""What the tests of single layers share: float64, and weights drawn by their specs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def weights():
    return draw


def draw(specs, sizes, *, seed=0, dtype=np.float64):
    """Random parameters of one layer; norms, biases and D away from plain starts."""
    rng = np.random.default_rng(seed)

    def one(spec):
        noise = rng.standard_normal([sizes[dim] for dim in spec.dims])
        if spec.contracted:
            return noise / np.sqrt(np.prod([sizes[dim] for dim in spec.contracted]))
        return (spec.init == "ones") + 0.3 * noise

    return {name: jnp.asarray(one(spec), dtype) for name, spec in specs.items()}
