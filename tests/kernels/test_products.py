"""Weights meet activations: dequantized on use, both factors rounded, looked at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_kernels import contract, dispatch
from elastic_kernels.products import FakeQuant, Observed, met
from elastic_kernels.quant_array import (
    FORMATS,
    dequantize,
    largest_magnitude,
    quantize,
    rounded,
    tensor_scale,
)


def drawn(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


def packed(array, format, *, axis=-2, inputs=None):
    """Quantized under its own scale, and under that of the inputs it is to meet."""
    scale = tensor_scale(largest_magnitude(array), format)
    met = None if inputs is None else tensor_scale(largest_magnitude(inputs), format)
    return quantize(array, format, axis=axis, scale=scale, input_scale=met)


@pytest.mark.parametrize("format", FORMATS)
def test_contract_dequantizes_on_use(format):
    x, w = drawn(5, 32), drawn(32, 2, 6)
    q = packed(w, format, axis=-3)
    want = jnp.einsum("bd,dgf->bgf", x, dequantize(q))
    product = lambda x: contract("bd,dgf->bgf", x, q)
    assert np.array_equal(product(x), want)
    np.testing.assert_allclose(jax.jit(product)(x), want, rtol=1e-5, atol=1e-5)
    dx = jax.grad(lambda x: jnp.sum(jnp.sin(product(x))))(x)
    plain = lambda x: jnp.sum(jnp.sin(contract("bd,dgf->bgf", x, dequantize(q))))
    np.testing.assert_allclose(dx, jax.grad(plain)(x), rtol=1e-6)
    half = x.astype(jnp.bfloat16)
    assert product(half).dtype == jnp.bfloat16


@pytest.mark.parametrize("format", FORMATS)
def test_fake_weights_are_the_rounded_ones_and_learn_as_the_exact(format):
    x, w = drawn(5, 32), drawn(32, 6)

    def product(w, x):
        return contract("bd,df->bf", x, FakeQuant(w, packed(w, format)))

    q = packed(w, format)
    assert np.array_equal(product(w, x), contract("bd,df->bf", x, q))
    _, pull = jax.vjp(product, w, x)
    dw, dx = pull(jnp.ones((5, 6)))
    np.testing.assert_allclose(dw, x.T @ jnp.ones((5, 6)), rtol=1e-6)
    np.testing.assert_allclose(dx, jnp.ones((5, 6)) @ dequantize(q).T, rtol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_both_factors_are_rounded_where_inputs_have_a_scale(format):
    """Along the contracted dimension, which need not be the last of the inputs."""
    x, w = drawn(2, 3, 32, 4), drawn(32, 4, 48, seed=1)
    q = packed(w, format, axis=-3, inputs=x)
    product = lambda x: contract("btdg,dgf->btf", x, q)
    near = rounded(x, format, axis=-2, scale=q.input_scale)
    want = jnp.einsum("btdg,dgf->btf", near, dequantize(q))
    np.testing.assert_allclose(product(x), want, rtol=1e-5, atol=1e-5)
    assert not np.allclose(want, jnp.einsum("btdg,dgf->btf", x, dequantize(q)))
    dx = jax.grad(lambda x: jnp.sum(product(x)))(x)  # straight through the rounding
    ones = jnp.ones((2, 3, 48))
    back = jnp.einsum("btf,dgf->btdg", ones, dequantize(q))
    np.testing.assert_allclose(dx, back, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_fake_weights_learn_from_rounded_inputs(format):
    x, w = drawn(5, 32), drawn(32, 6, seed=1)
    q = packed(w, format, inputs=x)
    product = lambda w, x: contract("bd,df->bf", x, FakeQuant(w, q))
    assert np.array_equal(product(w, x), contract("bd,df->bf", x, q))
    _, pull = jax.vjp(product, w, x)
    dw, dx = pull(jnp.ones((5, 6)))
    near = rounded(x, format, axis=-1, scale=q.input_scale)
    np.testing.assert_allclose(dw, near.T @ jnp.ones((5, 6)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, jnp.ones((5, 6)) @ dequantize(q).T, rtol=1e-5)


EQUATIONS = {  # of the layers, with the shapes of one small case
    "btd,dgrp->btgrp": ((2, 3, 32), (32, 2, 3, 16), -4),
    "btgrp,grpd->btd": ((2, 3, 2, 3, 16), (2, 3, 16, 24), -2),
    "...d,dv->...v": ((2, 3, 32), (32, 24), -2),
}


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_scaled_products_are_the_rounded_ones(format, equation):
    """Values, and gradients of the activations; some of them saturate."""
    x_shape, w_shape, axis = EQUATIONS[equation]
    x, w = drawn(*x_shape), drawn(*w_shape, seed=1)
    q = packed(w, format, axis=axis, inputs=0.5 * x)

    def run(kind):
        return jax.vjp(lambda x: contract(equation, x, q, implementation=kind), x)

    (got, pull), (want, pull_too) = run("scaled"), run("xla")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    for a, b in zip(pull(want), pull_too(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
    half = contract(equation, x.astype(jnp.bfloat16), q, implementation="scaled")
    assert half.dtype == jnp.bfloat16


def test_scaled_products_that_cannot_be():
    x, w = drawn(5, 32), drawn(32, 16, seed=1)
    q = packed(w, "nvfp4", inputs=x)
    with pytest.raises(NotImplementedError, match="'bd,df->fb' is no product of matr"):
        contract("bd,df->fb", x, q, implementation="scaled")
    with pytest.raises(ValueError, match="'scaled' does not exist; choose one of"):
        contract("bd,df->bf", x, FakeQuant(w, q), implementation="scaled")


@pytest.mark.parametrize("format, least", [("fp8", 8.9), ("nvfp4", 10.0)])
def test_scaled_products_decline_older_gpus(format, least):
    x, w = drawn(5, 32), drawn(32, 16, seed=1)
    q = packed(w, format, inputs=x)
    run = lambda: lambda x: contract("bd,df->bf", x, q)  # traced afresh
    with dispatch.target(100):
        text = str(jax.make_jaxpr(run())(x))
    assert ("f8_e4m3fn" if format == "fp8" else "scaled_dot") in text
    declined = pytest.warns(UserWarning, match=f"needs compute capability {least}")
    with dispatch.target(80), declined:
        jax.eval_shape(run(), x)


def test_an_observed_weight_tells_what_it_meets():
    x, w, seen = drawn(5, 32), drawn(32, 6), []
    y = contract("bd,df->bf", x, Observed(w, seen.append))
    assert np.array_equal(y, x @ w) and seen[0] is x


def test_what_no_scale_is_known_of_is_met_as_it_is():
    x, w = drawn(5, 32), drawn(32, 6)
    for weight in (w, packed(w, "fp8"), FakeQuant(w, packed(w, "fp8"))):
        assert met(x, weight) is x
