"""RMSNorm: what it divides by, what shares a statistic, and where it rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.layers.norm import rms_norm

EPS = 1e-5


def random(*shape, seed=0, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def test_the_mean_square_becomes_one():
    x = 7 * random(2, 3, 64)
    y = rms_norm(x, jnp.ones(64), live=64, eps=1e-30)
    np.testing.assert_allclose(jnp.mean(y * y, axis=-1), 1, rtol=1e-12)
    scale = random(64, seed=1)
    np.testing.assert_allclose(rms_norm(x, scale, live=64, eps=1e-30), y * scale)


def test_eps_is_added_to_the_mean_square():
    """A vector whose mean square is eps comes out at half the power."""
    x = jnp.full((1, 1, 16), EPS**0.5)
    y = rms_norm(x, jnp.ones(16), live=16, eps=EPS)
    np.testing.assert_allclose(y, 0.5**0.5, rtol=1e-12)
    assert not rms_norm(0 * x, jnp.ones(16), live=16, eps=EPS).any()


@pytest.mark.parametrize("dims", [1, 2])
def test_the_length_of_the_input_does_not_matter(dims):
    """By gradient: along the input itself the output is constant."""
    x, scale = random(1, 2, 3, 4), random(3, 4, seed=1)[(0,) * (2 - dims)]

    def f(x):
        y = rms_norm(x, scale, live=scale.size, eps=1e-30, dims=dims)
        return jnp.sum(jnp.sin(y))

    gradient = jax.grad(f)(x)
    axes = tuple(range(-dims, 0))
    assert jnp.abs(gradient).min() > 1e-6
    np.testing.assert_allclose(jnp.sum(gradient * x, axes), 0, atol=1e-12)


def test_two_dimensions_share_one_statistic_and_groups_do_not():
    x, scale = random(2, 3, 2, 3, 4), random(2, 3, 4, seed=1)
    y = rms_norm(x, scale, live=12, eps=EPS, dims=2)
    for g in range(2):
        flat = x[:, :, g].reshape(2, 3, 12)
        alone = rms_norm(flat, scale[g].reshape(12), live=12, eps=EPS)
        np.testing.assert_allclose(y[:, :, g].reshape(2, 3, 12), alone, rtol=1e-12)


def test_dead_channels_count_for_nothing():
    short, scale = random(2, 3, 5), random(8, seed=1)
    padded = jnp.pad(short, ((0, 0), (0, 0), (0, 3)))
    want = rms_norm(short, scale[:5], live=5, eps=EPS)
    for live in (5, jnp.asarray(5.0), jnp.full((2, 3), 5.0)):
        y = rms_norm(padded, scale, live=live, eps=EPS)
        np.testing.assert_allclose(y[..., :5], want, rtol=1e-12)
        assert not y[..., 5:].any()


def test_the_live_count_may_differ_per_token():
    x, scale, counts = random(1, 3, 2, 4), random(2, 4, seed=1), (8.0, 6.0, 2.0)
    y = rms_norm(x, scale, live=jnp.asarray([counts]), eps=EPS, dims=2)
    for t, live in enumerate(counts):
        alone = rms_norm(x[:, t : t + 1], scale, live=live, eps=EPS, dims=2)
        np.testing.assert_allclose(y[:, t : t + 1], alone, rtol=1e-12)


def test_bfloat16_rounds_once_at_the_end():
    """Statistics and the product with the scale are in float32, unlike in Llama."""
    x, scale = random(2, 8, 64, dtype=jnp.bfloat16), random(64, seed=1)
    scale = scale.astype(jnp.bfloat16)
    wide = rms_norm(*(a.astype(jnp.float32) for a in (x, scale)), live=64, eps=EPS)
    y = rms_norm(x, scale, live=64, eps=EPS)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))
    early = rms_norm(x, jnp.ones(64), live=64, eps=EPS) * scale
    assert (early != y).any()  # Rounding before the scale is something else.
