"""Triton's grouped products without a GPU: interpreted, compiled, or refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_kernels import dispatch, resources
from elastic_kernels.grouped_matmul import cases
from elastic_kernels.grouped_matmul.api import expert_mlp
from elastic_kernels.quant_array import QuantArray

EXPERTS, CHOICES, EMBED, FFN = 128, 6, 2688, 1856  # of Nemotron 3 Nano
FORWARD = ["up", "rows"]
BACKWARD = ["hidden_gradient", "rows", "weight_gradient", "weight_gradient"]

mlp = functools.partial(expert_mlp, implementation="triton")


def test_kernels_compute_every_expert(interpret):
    interpret("interpreted_grouped_matmul.py")


def of(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def arguments(tokens):
    """x, up, down, experts, gates, hidden mask and both active widths."""
    up, down = of(EXPERTS, EMBED, FFN), of(EXPERTS, FFN, EMBED)
    experts = of(tokens, CHOICES, dtype=jnp.int32)
    widths = of(dtype=jnp.int32), of(dtype=jnp.int32)
    return of(tokens, EMBED), up, down, experts, of(tokens, CHOICES), of(FFN), *widths


def forward_and_backward(x, up, down, experts, gates, mask, f, d):
    def run(x, up, down, gates, mask):
        return mlp(x, up, down, experts, gates, hidden_mask=mask, active=(f, d))

    y, pull = jax.vjp(run, x, up, down, gates, mask)
    return pull(y)


def assert_fits(launches, names, capability):
    """Without a spill, in the shared memory of the device."""
    found = [launch.kernel.__name__.removesuffix("_kernel") for launch in launches]
    assert found == names
    for launch in launches:
        found = resources.compiled(launch, capability)
        assert found.spilled_bytes == 0, (launch.kernel.__name__, found)
        assert found.shared_bytes <= resources.SHARED_BYTES[capability], found


@pytest.mark.parametrize("capability", resources.SHARED_BYTES)
def test_training_compiles_and_spills_nothing(capability):
    pytest.importorskip("triton", reason="triton is not installed: pip install .[test]")
    with dispatch.target(capability):
        launches = resources.recorded(forward_and_backward, *arguments(8192))
    assert launches[0].constants["BLOCK_M"] == 128
    assert_fits(launches, FORWARD + BACKWARD, capability)


@pytest.mark.parametrize("format, capability", [("nvfp4", 80), ("fp8", 80)])
def test_quantized_decoding_compiles_where_no_unit_knows_such_numbers(
    format, capability
):
    pytest.importorskip("triton", reason="triton is not installed: pip install .[test]")

    def packed(e, rows, columns):
        scale, e4m3 = of(e, dtype=jnp.float32), jnp.float8_e4m3fn
        if format == "fp8":
            values, blocks = of(e, rows, columns, dtype=e4m3), None
        else:
            values = of(e, rows // 2, columns, dtype=jnp.uint8)
            blocks = of(e, rows // 16, columns, dtype=e4m3)
        return QuantArray(values, scale, blocks, None, -2, jnp.dtype(jnp.bfloat16))

    x, _, _, experts, gates, *_ = arguments(8)
    up, down = packed(EXPERTS, EMBED, FFN), packed(EXPERTS, FFN, EMBED)
    with dispatch.target(capability):
        launches = resources.recorded(mlp, x, up, down, experts, gates)
    assert launches[0].constants["BLOCK_M"] == 16
    assert_fits(launches, FORWARD, capability)


def test_what_the_kernels_do_not_have_is_refused():
    pytest.importorskip("triton", reason="triton is not installed: pip install .[test]")
    inputs = cases.inputs(cases.TESTED["uneven"])
    with dispatch.target(75), pytest.raises(NotImplementedError, match="needs compute"):
        mlp(*inputs)
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        mlp(*cases.inputs(cases.TESTED["uneven"], dtype=np.float64))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_portable_forms_honour_active_widths(implementation):
    """As the same call on matrices that were cut, padded by exact zeros."""
    x, up, down, experts, gates = cases.inputs(cases.TESTED["uneven"])
    f, d = 7, 4

    @jax.jit
    def wide(x, up, down, gates, widths):
        def run(*a):
            options = {"active": widths, "implementation": implementation}
            return expert_mlp(*a[:3], experts, a[3], **options)

        y, pull = jax.vjp(run, x, up, down, gates)
        return y, pull(jnp.cos(y))

    def small(*a):
        return expert_mlp(*a[:3], experts, a[3], implementation=implementation)

    cut = (x[:, :d], up[:, :d, :f], down[:, :f, :d], gates)
    y, pull = jax.vjp(small, *cut)
    dx, dup, ddown, dgates = pull(jnp.cos(y))
    got_y, got = wide(x, up, down, gates, (jnp.int32(f), jnp.int32(d)))
    np.testing.assert_array_equal(got_y[:, d:], 0)
    pairs = [(got_y, y), (got[0], dx), (got[1], dup), (got[2], ddown)]
    for whole, part in pairs:
        padding = [(0, w - p) for w, p in zip(whole.shape, part.shape, strict=True)]
        want = np.pad(part, padding)
        np.testing.assert_allclose(whole, want, rtol=1e-4, atol=1e-5)
        assert not whole[want == 0].any()


def test_active_widths_beyond_the_matrices_are_named():
    inputs = cases.inputs(cases.TESTED["uneven"])
    with pytest.raises(ValueError, match="active embed is 7, expected 1 to 6"):
        expert_mlp(*inputs, active=(9, 7))
