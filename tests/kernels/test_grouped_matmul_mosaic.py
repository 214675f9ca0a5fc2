"""Mosaic's grouped product without a GPU: lowered, interpreted, or refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from elastic_kernels import dispatch
from elastic_kernels.grouped_matmul import cases, reference
from elastic_kernels.grouped_matmul.api import grouped_matmul

CASES = {  # an idle expert each, and tiles of 64 and of 128 rows that are not full
    "few": cases.Case(m=10, e=3, c=2, d=64, f=128, routed=2),
    "many": cases.Case(m=150, e=3, c=2, d=128, f=192, routed=2),
}
EPSILON = {jnp.float16: 2.0**-10, jnp.bfloat16: 2.0**-7}

mosaic = functools.partial(grouped_matmul, implementation="mosaic")


def inputs(case, dtype):
    """x by choice, weights, experts."""
    x, up, _, experts, _ = cases.inputs(case)
    x = jnp.stack([x, -0.5 * x], 1)
    return x.astype(dtype), up.astype(dtype), experts


def both_ways(product, x, w, experts):
    y, pull = jax.vjp(lambda x, w: product(x, w, experts), x, w)
    return y, pull(jnp.cos(y))


@pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="Mosaic GPU is interpreted from jax 0.11 on, which needs Python 3.12",
)
@pytest.mark.parametrize("name, dtype", [*zip(CASES, EPSILON, strict=True)])
def test_values_and_gradients_in_the_interpreter(name, dtype):
    arguments = inputs(CASES[name], dtype)
    with dispatch.target(90), plgpu.force_gpu_interpret_mode():
        got = both_ways(mosaic, *arguments)
    wide = [a.astype(jnp.float32) for a in arguments[:2]]
    want = both_ways(reference.grouped_matmul, *wide, arguments[2])
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == dtype and g.shape == w.shape
        scale = np.abs(w).max()
        assert np.abs(g.astype(jnp.float32) - w).max() <= 2 * EPSILON[dtype] * scale
    assert not got[1][1][2].any()  # the idle expert


def test_it_lowers_for_hopper_with_both_gradients(deviceless):
    assert deviceless("lower", "mosaic") == {"kernels": 3}


def test_it_runs_only_where_it_is_named():
    assert "mosaic" not in sum(dispatch.PREFERENCE.values(), ())


def test_what_it_does_not_take_is_refused():
    x, w, experts = inputs(CASES["few"], jnp.float16)
    with pytest.raises(NotImplementedError, match="compute capability 9.0 alone"):
        mosaic(x, w, experts)
    with dispatch.target(100), pytest.raises(NotImplementedError, match="has 10.0"):
        mosaic(x, w, experts)
    with dispatch.target(90):
        with pytest.raises(NotImplementedError, match="got float32"):
            mosaic(x.astype(jnp.float32), w, experts)
        with pytest.raises(NotImplementedError, match="multiples of 64"):
            mosaic(x[..., :48], w[:, :48], experts)
