"""The dense MLP: its formula, and that every token is transformed alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.layers.mlp import CACHE, SPECS, mlp

SIZES = {"embed": 6, "ffn": 10}


@pytest.fixture
def params(weights):
    return weights(SPECS, SIZES)


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 6)))


def test_it_is_a_squared_relu_between_two_products(params, x):
    up, down = np.asarray(params["up"]), np.asarray(params["down"])
    want = np.maximum(np.asarray(x) @ up, 0) ** 2 @ down
    y, cache = mlp(params, x, {})
    np.testing.assert_allclose(y, want, rtol=1e-12, atol=1e-14)
    assert cache is None and CACHE == {}


def test_it_is_homogeneous_of_degree_two(params, x):
    y, twice = mlp(params, x, {})[0], mlp(params, 2 * x, {})[0]
    np.testing.assert_allclose(twice, 4 * y, rtol=1e-12)


def test_no_token_sees_another(params, x):
    def one(x):
        return jnp.sum(jnp.sin(mlp(params, x, {})[0][0, 2]))

    gradient = jax.grad(one)(x)
    assert gradient[0, 2].all()
    assert not gradient.at[0, 2].set(0).any()


def test_a_soft_mask_scales_the_channels_contribution(params, x):
    """The update is linear in the mask, channel by channel."""
    full = mlp(params, x, {})[0]
    each = [mlp(params, x, {"ffn": one})[0] for one in jnp.eye(10)]
    np.testing.assert_allclose(sum(each), full, rtol=1e-12)
    mask = jnp.linspace(0, 1, 10)
    want = sum(m * y for m, y in zip(mask, each, strict=True))
    np.testing.assert_allclose(mlp(params, x, {"ffn": mask})[0], want, rtol=1e-12)
    varying = jnp.broadcast_to(mask, (2, 5, 10))
    np.testing.assert_allclose(mlp(params, x, {"ffn": varying})[0], want, rtol=1e-12)


def test_the_tap_sees_hidden_channels_before_the_mask(params, x):
    seen = {}
    mlp(params, x, {"ffn": jnp.zeros(10)}, tap=seen.__setitem__)
    assert set(seen) == {"ffn"} and seen["ffn"].shape == (2, 5, 10)
    assert seen["ffn"].any() and (seen["ffn"] >= 0).all()


def test_the_cache_passes_through(params, x):
    assert mlp(params, x, {}, cache={})[1] == {}
