"""The kernels of the gated norm in Triton's interpreter; run by test_gated_norm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from elastic_kernels.gated_norm import cases
from elastic_kernels.gated_norm.api import gated_rms_norm

BUDGET, ROUNDING, EPS = 2.0, 1e-5, 1e-5


@functools.partial(jax.jit, static_argnums=2)
def run(arguments, active=None, implementation="triton"):
    """The output and the gradient of every float argument."""
    options = {"eps": EPS, "active": active, "implementation": implementation}

    def f(y, z, scale, mask, live):
        return gated_rms_norm(y, z, scale, mask=mask, live=live, **options)

    out, pull = jax.vjp(f, *arguments)
    cotangent = np.random.default_rng(3).standard_normal(out.shape)
    return out, pull(jnp.asarray(cotangent, out.dtype))


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).mean() / max(np.abs(b).mean(), 1e-30)


def assert_close(actual, expected, bound=ROUNDING):
    for got, want in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert error(got, want) < bound, error(got, want)


@pytest.mark.parametrize("name", cases.TESTED)
def test_values_and_gradients(name):
    arguments = cases.inputs(cases.TESTED[name])
    exact = run(arguments, None, "reference")
    assert_close(run(arguments), exact)

    *floats, live = arguments
    half = lambda a: None if a is None else a.astype(jnp.float16)
    narrow = (*map(half, floats), live)
    plain, got = run(narrow, None, "reference"), run(narrow)
    assert got[0].dtype == jnp.float16
    for g, p, e in zip(*map(jax.tree.leaves, (got, plain, exact)), strict=True):
        assert g.dtype == p.dtype
        assert error(g, e) <= max(BUDGET * error(p, e), ROUNDING)


def test_heads_that_are_off_are_not_read():
    case = cases.TESTED["channels"]
    y, z, scale, mask, live = cases.inputs(case)
    active = case.r - 1
    poisoned = (a.at[..., active:, :].set(jnp.nan) for a in (y, z, scale, mask))
    got = run((*poisoned, live), jnp.int32(active))
    want = run((y, z, scale, mask, live), jnp.int32(active), "reference")
    assert_close(got, want)
    assert not got[0][:, :, :, active:].any()
    for gradient in got[1][:4]:
        assert not gradient[..., active:, :].any()


def test_composes_with_vmap_checkpoint_and_shard_map():
    y, z, scale, _, live = cases.inputs(cases.TESTED["plain"])
    norm = functools.partial(gated_rms_norm, live=live, eps=EPS)

    def gradients(implementation, y, z, scale):
        f = functools.partial(norm, implementation=implementation)
        loss = lambda *a: jnp.sum(jnp.sin(jax.checkpoint(f)(*a)))
        return jax.grad(loss, argnums=(0, 1, 2))(y, z, scale)

    ys, zs = (jnp.stack([a, 0.5 * a]) for a in (y, z))
    mapped = lambda i: jax.jit(
        jax.vmap(functools.partial(gradients, i), in_axes=(0, 0, None))
    )
    assert_close(mapped("triton")(ys, zs, scale), mapped("reference")(ys, zs, scale))

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, all_ = PartitionSpec("data"), PartitionSpec()

    def loss(implementation, *arguments):
        call = jax.shard_map(
            functools.partial(norm, implementation=implementation),
            mesh=mesh,
            in_specs=(rows, rows, all_),
            out_specs=rows,
        )
        return jnp.sum(jnp.sin(call(*arguments)))

    grads = jax.jit(jax.grad(loss, argnums=(1, 2, 3)), static_argnums=0)
    assert_close(grads("triton", y, z, scale), grads("reference", y, z, scale))
