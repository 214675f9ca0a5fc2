"""The Triton scan without a GPU: interpreted, compiled to machine code, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_kernels import dispatch, resources
from elastic_kernels.ssd import cases
from elastic_kernels.ssd.api import ssd

KERNELS = ["scan", "state_gradient", "head_gradient", "direction_gradient"]


def test_kernels_compute_the_recurrence(interpret):
    interpret("interpreted_ssd.py")


def shapes(p, n, t, dtype=jnp.bfloat16, b=2, g=8, r=8):
    """Arguments of `forward_and_backward` in the dimensions of Nemotron-H."""
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    x, B = of(b, t, g, r, p, dtype=dtype), of(b, t, g, n, dtype=dtype)
    heads, state = of(g, r), of(b, g, r, p, n)
    return x, of(b, t, g, r), heads, B, B, heads, state, of(b, t, dtype=jnp.bool_)


def forward(x, dt, A, B, C, D, state, resets):
    options = {"initial_state": state, "resets": resets}
    return ssd(x, dt, A, B, C, D, **options, implementation="triton")


def forward_and_backward(*arguments):
    *floats, resets = arguments
    results, pull = jax.vjp(lambda *a: forward(*a, resets), *floats)
    return pull(results)


@pytest.mark.parametrize("capability", resources.SHARED_BYTES)
def test_training_compiles_and_spills_nothing(capability):
    pytest.importorskip("triton", reason="triton is not installed: pip install .[test]")
    with dispatch.target(capability):
        launches = resources.recorded(forward_and_backward, *shapes(64, 128, 2048))
    names = [launch.kernel.__name__.removesuffix("_kernel") for launch in launches]
    assert names == KERNELS
    for launch in launches:
        found = resources.compiled(launch, capability)
        assert found.spilled_bytes == 0, (launch.kernel.__name__, found)
        assert found.shared_bytes <= resources.SHARED_BYTES[capability], found


@pytest.mark.parametrize("capability", [80, 90])
def test_decoding_compiles_and_updates_the_state_in_place(capability):
    pytest.importorskip("triton", reason="triton is not installed: pip install .[test]")
    with dispatch.target(capability):
        (launch,) = resources.recorded(forward, *shapes(80, 128, 1))
    found = resources.compiled(launch, capability)
    assert found.spilled_bytes == 0 and found.registers <= 128
    assert launch.aliases == {6: 1}


def test_few_heads_are_cut_into_segments():
    pytest.importorskip("triton", reason="triton is not installed: pip install .[test]")
    launches = resources.recorded(forward, *shapes(64, 128, 8192, b=1, g=1))
    first, second = launches
    assert not first.constants["WRITE"] and second.constants["SEGMENTED"]
    assert first.grid[1] > 1
    for launch in launches:
        assert resources.compiled(launch, 90).spilled_bytes == 0
    assert len(resources.recorded(forward, *shapes(64, 128, 8192, b=8))) == 1


def test_what_the_kernels_do_not_have_is_refused():
    pytest.importorskip("triton", reason="triton is not installed: pip install .[test]")
    arguments = shapes(64, 257, 64)
    with pytest.raises(NotImplementedError, match="at most 256 channels"):
        jax.eval_shape(forward, *arguments)
    with dispatch.target(75), pytest.raises(NotImplementedError, match="needs compute"):
        jax.eval_shape(forward, *shapes(64, 128, 64))
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        arguments, options = cases.inputs(cases.TESTED["tail"], dtype=np.float64)
        ssd(*arguments, **options, implementation="triton")
