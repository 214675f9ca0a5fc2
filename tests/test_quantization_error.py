"""The error report: what it says of weights whose fate is known."""

import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import axes
from elastic_jax.quantization_error import quantization_errors
from elastic_jax.quantize import Recipe
from elastic_kernels.quant_array import quantize, tensor_scale

CFG = ej.presets.tiny("ME")
SPECS = ej.param_specs(CFG)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)

    def draw(path, spec):
        shape = axes.shape(CFG, SPECS, path, spec)
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return axes.map_specs(draw, SPECS)


def replaced(params, block, name, value):
    layers = list(params["layers"])
    layers[block] = layers[block] | {name: value}
    return params | {"layers": tuple(layers)}


@pytest.mark.parametrize("format, usual", [("nvfp4", 0.095), ("fp8", 0.026)])
def test_normal_weights(format, usual, params):
    """One row for each quantized parameter; the error that the format is known for."""
    quantized = ej.quantize(params, SPECS, CFG, Recipe(format))
    rows = list(quantization_errors(params, quantized, SPECS))
    names = [p for p, _ in SPECS if axes.leaf(quantized, p) is not axes.leaf(params, p)]
    assert [row.path for row in rows] == names
    for row in rows:
        assert row.format == format and row.saturated == row.dead_blocks == 0
        assert 0.8 * usual < row.relative <= row.worst < 1.3 * usual
        w, q = axes.leaf(params, row.path), axes.leaf(quantized, row.path)
        near = np.asarray(q.astype(jnp.float32))
        error = np.linalg.norm(near - w) / np.linalg.norm(w)
        np.testing.assert_allclose(row.relative, error, rtol=1e-5)
        np.testing.assert_allclose(row.zeroed, np.mean(near == 0), atol=1e-6)


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_weights_beyond_a_frozen_scale(format, params):
    """Twice the largest weight under the old scale: it is cut off, and counted."""
    up = params["layers"][1]["up"]
    old = ej.quantize(params, SPECS, CFG, Recipe(format))
    loud = replaced(params, 1, "up", up.at[0, 0, 0].set(2.5 * jnp.max(jnp.abs(up[0]))))
    quantized = ej.quantize(loud, SPECS, CFG, Recipe(format), like=old)
    found = {row.path[-1]: row for row in quantization_errors(loud, quantized, SPECS)}
    np.testing.assert_allclose(found["up"].saturated, 1 / up.size, rtol=1e-6)
    assert found["up"].worst > 1.1 * found["up"].relative  # the first expert's
    assert found["down"].saturated == 0


def test_blocks_that_vanish(params):
    """Zeros were nothing to lose; what is too quiet for the tensor's scale is."""
    out = np.array(params["layers"][0]["z"])
    flat = out.reshape(out.shape[0], -1)
    flat[:16, 0] = 0  # a block of zeros
    flat[:16, 1] *= 1e-6  # a block that rounds to zeros
    flat[0, 2] = 0
    z = jnp.asarray(flat.reshape(out.shape))
    scale = tensor_scale(jnp.float32(500.0), "nvfp4")
    stored = quantize(z, "nvfp4", axis=-4, scale=scale)
    quantized = replaced(params, 0, "z", stored)
    (row,) = quantization_errors(replaced(params, 0, "z", z), quantized, SPECS)
    blocks = z.size // 16
    np.testing.assert_allclose(row.dead_blocks, 1 / blocks, rtol=1e-6)
    near = np.asarray(stored.astype(jnp.float32))
    zeroed = np.mean((near == 0) & (np.asarray(z) != 0))
    np.testing.assert_allclose(row.zeroed, zeroed, rtol=1e-5)


def test_what_was_not_quantized_from_these(params):
    quantized = ej.quantize(params, SPECS, CFG, Recipe("fp8"))
    with pytest.raises(ValueError, match="layers/0/z: expected the array of shape"):
        list(quantization_errors(quantized, quantized, SPECS))
