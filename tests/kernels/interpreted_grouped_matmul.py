"""The kernels of grouped products in Triton's interpreter; run by
test_grouped_matmul_triton."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from elastic_kernels.grouped_matmul import cases
from elastic_kernels.grouped_matmul.api import expert_mlp, grouped_matmul
from elastic_kernels.products import FakeQuant
from elastic_kernels.quant_array import largest_magnitude, quantize, tensor_scale

BUDGET, ROUNDING = 2.0, 1e-5
CASES = {name: case for name, case in cases.TESTED.items() if name != "strips"}
CASES |= cases.TILED


def random(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def hidden_mask(kind, case):
    """[f] or [m f]; some channels are exactly off."""
    shape = {"channels": (case.f,), "tokens": (case.m, case.f)}
    return None if kind is None else jnp.maximum(random(7, *shape[kind]), 0)


@functools.partial(jax.jit, static_argnames="implementation")
def run(arguments, mask, active=(None, None), implementation="triton"):
    """The output and the gradient of every float argument."""
    x, up, down, experts, gates = arguments
    options = {"active": active, "implementation": implementation}

    def f(x, up, down, gates, mask):
        return expert_mlp(x, up, down, experts, gates, hidden_mask=mask, **options)

    y, pull = jax.vjp(f, x, up, down, gates, mask)
    return y, pull(random(3, *y.shape, dtype=y.dtype))


@functools.partial(jax.jit, static_argnums=3)
def run_matmul(x, w, experts, implementation="triton"):
    f = functools.partial(grouped_matmul, implementation=implementation)
    y, pull = jax.vjp(lambda x, w: f(x, w, experts), x, w)
    return y, pull(random(3, *y.shape, dtype=y.dtype))


def error(a, b, norm=np.max):
    """Largest or mean error over the largest or mean value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return norm(np.abs(a - b)) / max(norm(np.abs(b)), 1e-30)


def assert_close(actual, expected, bound=ROUNDING):
    for got, want in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert error(got, want) < bound, error(got, want)


def assert_in_budget(actual, plain, exact):
    """By mean errors: the largest of a handful of roundings is chance."""
    for g, p, e in zip(*map(jax.tree.leaves, (actual, plain, exact)), strict=True):
        assert error(g, e, np.mean) <= max(BUDGET * error(p, e, np.mean), ROUNDING)


def halved(tree):
    half = lambda a: a.astype(jnp.float16) if a.dtype == jnp.float32 else a
    return jax.tree.map(half, tree)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    arguments = cases.inputs(CASES[name])
    exact = run(arguments, None, implementation="reference")
    assert_close(run(arguments, None), exact)

    narrow = halved(arguments)
    plain, got = run(narrow, None, implementation="reference"), run(narrow, None)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float16")}
    assert_in_budget(got, plain, exact)


def test_few_rows_of_a_wide_expert():
    x, up, down, experts, gates = cases.inputs(cases.TESTED["strips"])
    f = jax.jit(expert_mlp, static_argnames="implementation")
    want = f(x, up, down, experts, gates, implementation="reference")
    assert_close(f(x, up, down, experts, gates, implementation="triton"), want)


ALL = (CASES["tiles"].f, CASES["tiles"].d)


@pytest.mark.parametrize(
    "kind, widths",
    [(None, (70, 33)), (None, (1, 1)), ("channels", ALL), ("tokens", (130, 80))],
)
def test_masks_and_active_widths(widths, kind):
    """Traced widths; tails are exact zeros, though operands there are not."""
    arguments, mask = cases.inputs(CASES["tiles"]), hidden_mask(kind, CASES["tiles"])
    widths = f, d = tuple(map(jnp.int32, widths))
    got = run(arguments, mask, widths)
    assert_close(got, run(arguments, mask, widths, implementation="reference"))
    y, (dx, dup, ddown, _, dmask) = got
    assert not y[:, d:].any() and not dx[:, d:].any()
    assert not dup[:, d:].any() and not dup[:, :, f:].any()
    assert not ddown[:, f:].any() and not ddown[:, :, d:].any()
    assert mask is None or not dmask[..., f:].any()


def test_what_lies_behind_the_active_widths_is_not_read():
    case, (f, d) = CASES["tiles"], (70, 33)
    x, up, down, experts, gates = cases.inputs(case)
    poisoned = (
        x.at[:, d:].set(jnp.nan),
        up.at[:, d:].set(jnp.nan).at[:, :, f:].set(jnp.nan),
        down.at[:, f:].set(jnp.nan).at[:, :, d:].set(jnp.nan),
    )
    widths = (jnp.int32(f), jnp.int32(d))
    got = run((*poisoned, experts, gates), None, widths)
    assert_close(got, run((x, up, down, experts, gates), None, widths))


def test_one_executable_serves_every_width():
    arguments = cases.inputs(CASES["uneven"])
    run.clear_cache()
    for f, d in ((9, 6), (4, 2)):
        run(arguments, None, (jnp.int32(f), jnp.int32(d)))
    assert run._cache_size() == 1


def test_weights_may_be_wider_than_activations():
    x, up, down, experts, gates = cases.inputs(CASES["uneven"])
    x, gates = halved((x, gates))
    got = run((x, up, down, experts, gates), None)
    want = run((x, up, down, experts, gates), None, implementation="reference")
    assert got[1][1].dtype == got[1][2].dtype == jnp.float32
    for g, w in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert g.dtype == w.dtype and error(g, w) < 5e-3


@pytest.mark.parametrize("name", ["one_token", "uneven", "tiles"])
def test_grouped_matmul(name):
    case = CASES[name]
    _, w, _, experts, _ = cases.inputs(case)
    x = random(1, case.m, case.c, case.d)
    exact = run_matmul(x, w, experts, "reference")
    assert_close(run_matmul(x, w, experts), exact)
    x, w = halved((x, w))
    got, plain = run_matmul(x, w, experts), run_matmul(x, w, experts, "reference")
    assert_in_budget(got, plain, exact)


def packed(w, format, input_scale=None):
    scale = tensor_scale(largest_magnitude(w, 1), format)
    return quantize(w, format, axis=-2, scale=scale, input_scale=input_scale)


@pytest.mark.parametrize("formats", [("nvfp4", "nvfp4"), ("fp8", "nvfp4")])
def test_quantized_experts_are_the_dequantized_ones(formats):
    """Values, and gradients of what is not quantized."""
    x, *weights, experts, gates = cases.inputs(CASES["tiles"])
    stored = [packed(w, f) for w, f in zip(weights, formats, strict=True)]

    @functools.partial(jax.jit, static_argnums=4)
    def both(x, gates, up, down, implementation):
        options = {"implementation": implementation}

        def f(x, gates):
            rows = jnp.broadcast_to(x[:, None], (*experts.shape, x.shape[-1]))
            y = expert_mlp(x, up, down, experts, gates, **options)
            return y, grouped_matmul(rows, up, experts, **options)

        y, pull = jax.vjp(f, x, gates)
        return y, pull(jax.tree.map(jnp.cos, y))

    arrays = [w.astype(jnp.float32) for w in stored]
    got = both(x, gates, *stored, "triton")
    assert_close(got, both(x, gates, *arrays, "reference"))


def test_every_code_is_decoded():
    """All numbers of FP8, its NaN too, and of E2M1, by a product with one."""
    codes = jnp.arange(256, dtype=jnp.uint8)
    values = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).reshape(1, 16, 16)
    eighths = jax.lax.bitcast_convert_type(codes[16:32], jnp.float8_e4m3fn)
    w = packed(jnp.ones((1, 16, 16)), "fp8")
    fp8 = type(w)(values, jnp.array([0.5]), None, None, -2, w.dtype)
    pairs = jnp.arange(128, dtype=jnp.uint8).reshape(1, 8, 16) * 2
    nvfp4 = type(w)(
        pairs, jnp.array([3.0]), eighths.reshape(1, 1, 16), None, -2, w.dtype
    )
    eye = jnp.eye(16)[:, None]
    experts = jnp.zeros((16, 1), jnp.int32)
    for stored in (nvfp4, fp8):
        want = stored.astype(jnp.float32)[0]
        rows = jnp.where(jnp.isnan(want).any(0), jnp.nan, want)  # NaN times 0
        got = grouped_matmul(eye, stored, experts, implementation="triton")[:, 0]
        np.testing.assert_array_equal(got, rows)
    assert jnp.isnan(fp8.astype(jnp.float32)).sum() == 2


def test_fake_experts_learn_as_the_rounded_ones():
    x, up, down, experts, gates = cases.inputs(CASES["tiles"])

    def loss(up, down, implementation):
        options = {"implementation": implementation}
        return jnp.sum(jnp.sin(expert_mlp(x, up, down, experts, gates, **options)))

    @jax.jit
    def faked(up, down):
        fakes = (FakeQuant(w, packed(w, "nvfp4")) for w in (up, down))
        return loss(*fakes, "triton")

    rounded = [packed(w, "nvfp4").astype(jnp.float32) for w in (up, down)]
    got = jax.value_and_grad(faked, argnums=(0, 1))(up, down)
    want = jax.value_and_grad(loss, argnums=(0, 1))(*rounded, "reference")
    assert_close(got, want)


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
def test_inputs_are_rounded_by_the_scale_of_the_expert_they_chose(format):
    """Stored weights and trained ones, under a mask and widths that cut a tile."""
    case = CASES["tiles"]
    x, up, down, experts, gates = cases.inputs(case)
    scales = [jnp.geomspace(0.002, 0.02, case.e), jnp.geomspace(0.02, 0.002, case.e)]
    stored = [packed(w, format, s) for w, s in zip((up, down), scales, strict=True)]
    mask, active = hidden_mask("channels", case), (jnp.int32(80), jnp.int32(48))

    @functools.partial(jax.jit, static_argnums=2)
    def both(x, weights, implementation):
        def f(x, gates, weights):
            options = {"active": active, "implementation": implementation}
            fakes = [FakeQuant(w, q) for w, q in zip(weights, stored, strict=True)]
            run = functools.partial(expert_mlp, hidden_mask=mask, **options)
            return run(x, *stored, experts, gates), run(x, *fakes, experts, gates)

        y, pull = jax.vjp(f, x, gates, weights)
        return y, pull(jax.tree.map(jnp.cos, y))

    want = both(x, (up, down), "reference")
    assert_close(both(x, (up, down), "triton"), want)
    plain = [dataclasses.replace(q, input_scale=None) for q in stored]
    exact = expert_mlp(x, *plain, experts, gates, hidden_mask=mask, active=active)
    assert error(exact, want[0][0]) > 100 * ROUNDING  # rounding them is no trifle


def test_composes_with_vmap_and_checkpoint():
    x, up, down, experts, gates = cases.inputs(CASES["uneven"])
    call = functools.partial(expert_mlp, implementation="triton")

    def gradients(x, gates):
        loss = lambda *a: jnp.sum(jnp.sin(jax.checkpoint(call)(*a)))
        return jax.grad(loss, argnums=(0, 1, 2, 4))(x, up, down, experts, gates)

    xs, gates_ = (jnp.stack([a, 0.5 * a]) for a in (x, gates))
    got = jax.jit(jax.vmap(gradients))(xs, gates_)
    call = functools.partial(expert_mlp, implementation="reference")
    for i in range(2):
        mine = jax.tree.map(lambda a, i=i: a[i], got)
        assert_close(mine, gradients(xs[i], gates_[i]))


def test_composes_with_shard_map():
    """Tokens on two devices, weights on both: their gradients are summed."""
    x, up, down, experts, gates = cases.inputs(CASES["tiles"])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, all_ = PartitionSpec("data"), PartitionSpec()

    def loss(implementation, *arguments):
        call = jax.shard_map(
            functools.partial(expert_mlp, implementation=implementation),
            mesh=mesh,
            in_specs=(rows, all_, all_, rows, rows),
            out_specs=rows,
        )
        return jnp.sum(jnp.sin(call(*arguments)))

    grads = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 5)), static_argnums=0)
    arguments = (x, up, down, experts, gates)
    assert_close(grads("triton", *arguments), grads("reference", *arguments))
