"""The kernels of the chunked scan in Triton's interpreter; run by test_ssd_triton."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from elastic_kernels.ssd import cases
from elastic_kernels.ssd import triton as kernels
from elastic_kernels.ssd.api import ssd

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
BUDGET, ROUNDING = 2.0, 1e-5
CASES = cases.TESTED | cases.TILED


@functools.partial(jax.jit, static_argnums=2)
def run(arguments, options, implementation="triton"):
    """Results and the gradient of every float argument, for random cotangents."""
    state = options.get("initial_state")
    floats = (*arguments, *(() if state is None else (state,)))

    def f(x, dt, A, B, C, D, initial_state=None):
        kept = {"initial_state": initial_state, "resets": options.get("resets")}
        return ssd(x, dt, A, B, C, D, implementation=implementation, **kept)

    results, pull = jax.vjp(f, *floats)
    rng = np.random.default_rng(1)
    cotangents = [jnp.asarray(rng.standard_normal(r.shape), r.dtype) for r in results]
    return results, pull(tuple(cotangents))


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)


def assert_close(actual, expected, bound=ROUNDING):
    for got, want in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert error(got, want) < bound, error(got, want)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    """In float32 to rounding; in float16 at most twice the error of the reference."""
    arguments, options = cases.inputs(CASES[name])
    exact = run(arguments, options, "reference")
    assert_close(run(arguments, options), exact)

    narrow = jax.tree.map(
        lambda a: a.astype(jnp.float16) if a.dtype == jnp.float32 else a,
        (arguments, options),
    )
    plain, got = run(*narrow, "reference"), run(*narrow)
    assert got[0][0].dtype == jnp.float16 and got[0][1].dtype == jnp.float32
    for e, p, g in zip(*map(jax.tree.leaves, (exact, plain, got)), strict=True):
        assert error(g, e) <= max(BUDGET * error(p, e), ROUNDING)


def test_the_segmented_case_is_cut():
    """Else the case would prove nothing about two passes."""
    x, _, _, B, *_ = cases.inputs(CASES["segments"])[0]
    segments, per_segment = kernels._segments(x, kernels._blocks(x, B))
    assert segments > 1 and per_segment > 1


def test_decoding_continues_a_scan():
    (x, dt, A, B, C, D), options = cases.inputs(cases.TESTED["documents"])
    x, dt, B, C = (a[:, :6] for a in (x, dt, B, C))
    resets = options["resets"][:, :6]
    call = jax.jit(functools.partial(ssd, implementation="triton"))
    state = options["initial_state"]
    whole = call(x, dt, A, B, C, D, initial_state=state, resets=resets)
    steps = []
    for t in range(6):
        at = slice(t, t + 1)
        y, state = call(
            *(x[:, at], dt[:, at], A, B[:, at], C[:, at], D),
            initial_state=state,
            resets=resets[:, at],
        )
        steps.append(y)
    assert_close((jnp.concatenate(steps, 1), state), whole)


def test_composes_with_vmap_and_checkpoint():
    arguments, options = cases.inputs(cases.TESTED["tail"])
    rows = [arguments, jax.tree.map(lambda a: 0.5 * a, arguments)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *rows)
    mapped = jax.vmap(jax.checkpoint(run), (0, None))
    got = jax.jit(mapped)(stacked, options)
    for i, row in enumerate(rows):
        mine = jax.tree.map(lambda a, i=i: a[i], got)
        assert_close(mine, run(row, options, "reference"))


def test_composes_with_shard_map():
    """Rows on two devices, decays on both: their gradients are summed over devices."""
    (x, dt, A, B, C, D), options = cases.inputs(cases.TESTED["tail"])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, all_ = PartitionSpec("data"), PartitionSpec()

    def loss(implementation, x, dt, A, B, C, D, state):
        def local(x, dt, A, B, C, D, state):
            y, last = ssd(
                x, dt, A, B, C, D, initial_state=state, implementation=implementation
            )
            return y, last

        call = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows, rows, all_, rows, rows, all_, rows),
            out_specs=(rows, rows),
        )
        y, last = call(x, dt, A, B, C, D, state)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(last))

    inputs = (x, dt, A, B, C, D, options["initial_state"])
    grads = jax.grad(loss, argnums=range(1, 8))
    grads = jax.jit(grads, static_argnums=0)
    assert_close(grads("triton", *inputs), grads("reference", *inputs))
