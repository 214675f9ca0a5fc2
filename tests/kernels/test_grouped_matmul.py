"""Row blocks compute every expert exactly: values, gradients, any routing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_kernels.grouped_matmul import cases, xla
from elastic_kernels.grouped_matmul.api import expert_mlp, grouped_matmul
from elastic_kernels.products import FakeQuant, Observed
from elastic_kernels.quant_array import (
    dequantize,
    largest_magnitude,
    quantize,
    tensor_scale,
)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def random(seed, *shape, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def hidden_mask(kind, case, dtype=np.float64):
    """[f] or [m f]; some channels are exactly off."""
    shape = (case.f,) if kind == "channels" else (case.m, case.f)
    return jnp.maximum(random(7, *shape, dtype=dtype), 0)


@functools.partial(jax.jit, static_argnames="implementation")
def run_mlp(arguments, mask=None, implementation="xla"):
    """The output and the gradient of every float argument."""
    x, up, down, experts, gates = arguments

    def f(x, up, down, gates, mask):
        return expert_mlp(
            *(x, up, down, experts, gates),
            hidden_mask=mask,
            implementation=implementation,
        )

    y, pull = jax.vjp(f, x, up, down, gates, mask)
    return y, pull(random(3, *y.shape, dtype=y.dtype))


@functools.partial(jax.jit, static_argnames="implementation")
def run_matmul(x, w, experts, implementation="xla"):
    f = functools.partial(grouped_matmul, implementation=implementation)
    y, pull = jax.vjp(lambda x, w: f(x, w, experts), x, w)
    return y, pull(random(3, *y.shape, dtype=y.dtype))


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)


def assert_close(actual, expected, bound):
    for got, want in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert error(got, want) < bound


@pytest.mark.parametrize("name", cases.TESTED)
def test_mlp_values_and_gradients(name, float64):
    arguments = cases.inputs(cases.TESTED[name], dtype=np.float64)
    assert_close(run_mlp(arguments), run_mlp(arguments, None, "reference"), 1e-12)


@pytest.mark.parametrize("kind", ["channels", "tokens"])
def test_mlp_with_masked_hidden_channels(kind, float64):
    case = cases.TESTED["uneven"]
    arguments = cases.inputs(case, dtype=np.float64)
    mask = hidden_mask(kind, case)
    want = run_mlp(arguments, mask, "reference")
    assert_close(run_mlp(arguments, mask), want, 1e-12)


@pytest.mark.parametrize("name", ["one_token", "uneven", "idle_experts"])
def test_matmul_values_and_gradients(name, float64):
    case = cases.TESTED[name]
    _, w, _, experts, _ = cases.inputs(case, dtype=np.float64)
    x = random(1, case.m, case.c, case.d)
    want = run_matmul(x, w, experts, "reference")
    assert_close(run_matmul(x, w, experts), want, 1e-12)


def test_float32():
    case = cases.TESTED["uneven"]
    arguments = cases.inputs(case)
    mask = hidden_mask("tokens", case, np.float32)
    want = run_mlp(arguments, mask, "reference")
    assert_close(run_mlp(arguments, mask), want, 1e-5)


def test_bfloat16_stays_in_the_error_budget():
    """Against float32: at most twice the error of the reference run in bfloat16."""
    arguments = cases.inputs(cases.TESTED["idle_experts"])
    narrow = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, arguments
    )
    exact = run_mlp(jax.tree.map(_widen, narrow), None, "reference")
    plain, got = run_mlp(narrow, None, "reference"), run_mlp(narrow)
    for e, p, g in zip(*map(jax.tree.leaves, (exact, plain, got)), strict=True):
        assert g.dtype == jnp.bfloat16
        assert error(g, e) <= 2 * error(p, e)


def _widen(a):
    return a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a


def test_weights_may_be_wider_than_activations():
    """float32 parameters, bfloat16 activations: the gradients are the parameters'."""
    x, up, down, experts, gates = cases.inputs(cases.TESTED["uneven"])
    y, (dx, dup, ddown, dgates, _) = run_mlp(
        (x.astype(jnp.bfloat16), up, down, experts, gates)
    )
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert dup.dtype == ddown.dtype == dgates.dtype == jnp.float32


def test_idle_experts_get_exactly_nothing():
    case = cases.TESTED["idle_experts"]
    arguments = cases.inputs(case)
    _, (_, dup, ddown, _, _) = run_mlp(arguments)
    for gradient in (dup, ddown):
        assert not gradient[case.routed :].any()
        assert gradient[: case.routed].any(axis=(1, 2)).all()


@pytest.mark.parametrize("block", [1, 3])
def test_any_block_size_computes_the_same(block, float64, monkeypatch):
    arguments = cases.inputs(cases.TESTED["uneven"], dtype=np.float64)
    want = run_mlp(arguments, None, "reference")
    monkeypatch.setattr(xla, "block_size", lambda rows, experts: block)
    assert_close(run_mlp.__wrapped__(arguments), want, 1e-12)


def test_everything_to_one_expert_drops_nothing(float64):
    """The worst routing there is, for which any capacity would drop rows."""
    case = cases.Case(m=90, e=16, c=2, d=4, f=6, routed=2)
    arguments = cases.inputs(case, dtype=np.float64)
    assert_close(run_mlp(arguments), run_mlp(arguments, None, "reference"), 1e-12)


def test_the_same_expert_twice_counts_twice(float64):
    x, up, down, experts, gates = cases.inputs(cases.TESTED["uneven"], dtype=np.float64)
    twice = jnp.repeat(experts[:, :1], 2, axis=1)
    got = expert_mlp(x, up, down, twice, gates)
    once = expert_mlp(x, up, down, experts[:, :1], gates.sum(1, keepdims=True))
    assert_close(got, once, 1e-12)


def test_composes_with_vmap_and_checkpoint(float64):
    case = cases.TESTED["uneven"]
    rows = [cases.inputs(case, seed, np.float64) for seed in (0, 1)]
    masks = jnp.stack([hidden_mask("channels", case), jnp.ones(case.f)])
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *rows)
    got = jax.jit(jax.vmap(jax.checkpoint(run_mlp)))(stacked, masks)
    for i, row in enumerate(rows):
        mine = jax.tree.map(lambda a, i=i: a[i], got)
        assert_close(mine, run_mlp(row, masks[i], "reference"), 1e-12)


def test_vmap_shares_weights(float64):
    """Batched tokens, common experts: the weight gradients add up over the batch."""
    case = cases.TESTED["uneven"]
    _, up, down, _, _ = cases.inputs(case, dtype=np.float64)
    batches = [cases.inputs(case, seed, np.float64) for seed in (0, 1)]
    x, experts, gates = (jnp.stack([b[i] for b in batches]) for i in (0, 3, 4))

    def loss(up, down, implementation):
        f = functools.partial(expert_mlp, implementation=implementation)
        y = jax.vmap(f, (0, None, None, 0, 0))(x, up, down, experts, gates)
        return jnp.sum(jnp.sin(y))

    grad = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    assert_close(grad(up, down, "xla"), grad(up, down, "reference"), 1e-12)


def test_memory_is_one_hidden_row_per_choice():
    """No row of width d is kept per choice, and no weight gradient per block."""
    case = cases.Case(m=1024, e=8, c=4, d=32, f=32)
    x, up, down, experts, gates = cases.inputs(case)

    compiled = run_mlp.lower((x, up, down, experts, gates)).compile()
    hidden_bytes = case.m * case.c * case.f * 4
    small = 8 * experts.nbytes + x.nbytes + up.nbytes + down.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < hidden_bytes + small


@pytest.mark.parametrize(
    "change, message",
    [
        ({"down": (5, 9, 7)}, r"down has shape \(5, 9, 7\), expected \(5, 9, 6\)"),
        ({"gates": (37, 3)}, r"gates has shape \(37, 3\), expected \(37, 2\)"),
        ({"x": (36, 6)}, r"experts has shape \(37, 2\), expected \(36, 2\)"),
        ({"hidden_mask": (8,)}, r"hidden_mask has shape \(8,\), expected \(9,\)"),
        ({"hidden_mask": (3, 9)}, r"hidden_mask has .* \(3, 9\), expected \(37, 9\)"),
        ({"experts": (37, 2)}, "expected integers"),
    ],
)
def test_mistakes_are_named(change, message):
    names = "x", "up", "down", "experts", "gates"
    named = dict(zip(names, cases.inputs(cases.TESTED["uneven"]), strict=True))
    named |= {name: jnp.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        expert_mlp(**named)


def test_too_many_rows_are_refused():
    """Row and expert share one int32; the shapes alone decide, nothing is computed."""
    x = jax.ShapeDtypeStruct((2**24, 1, 2), jnp.float32)
    w = jax.ShapeDtypeStruct((256, 2, 2), jnp.float32)
    experts = jax.ShapeDtypeStruct((2**24, 1), jnp.int32)
    with pytest.raises(ValueError, match="split the tokens"):
        jax.eval_shape(grouped_matmul, x, w, experts)


# -------------------------------------------------------------------------- quantized


def packed(w, format):
    scale = tensor_scale(largest_magnitude(w, 1), format)
    return quantize(w, format, axis=-2, scale=scale)


def both_products(x, up, down, experts, gates, implementation):
    options = {"implementation": implementation}
    rows = jnp.broadcast_to(x[:, None], (*experts.shape, x.shape[-1]))
    y = expert_mlp(x, up, down, experts, gates, **options)
    return y, grouped_matmul(rows, up, experts, **options)


@pytest.mark.parametrize("formats", [("nvfp4", "nvfp4"), ("fp8", None)])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("m", [3, 40])
def test_quantized_experts_are_the_dequantized_ones(
    formats, implementation, m, float64
):
    """Values, and gradients of what is not quantized."""
    case = cases.Case(m=m, e=5, c=2, d=32, f=48, routed=4)
    x, *weights, experts, gates = cases.inputs(case, dtype=np.float64)
    stored = [
        w if format is None else packed(w, format)
        for w, format in zip(weights, formats, strict=True)
    ]
    arrays = [w.astype(jnp.float64) for w in stored]

    @jax.jit
    def run(x, gates, up, down):
        f = lambda x, gates: both_products(x, up, down, experts, gates, implementation)
        y, pull = jax.vjp(f, x, gates)
        return y, pull(jax.tree.map(jnp.cos, y))

    assert_close(run(x, gates, *stored), run(x, gates, *arrays), 1e-12)


def test_fake_experts_learn_as_the_rounded_ones(float64):
    case = cases.Case(m=9, e=3, c=2, d=16, f=32)
    x, up, down, experts, gates = cases.inputs(case, dtype=np.float64)

    def loss(up, down):
        products = both_products(x, up, down, experts, gates, "xla")
        return sum(jnp.sum(jnp.sin(y)) for y in products)

    @jax.jit
    def faked(up, down):
        return loss(*(FakeQuant(w, packed(w, "nvfp4")) for w in (up, down)))

    rounded = [dequantize(packed(w, "nvfp4"), jnp.float64) for w in (up, down)]
    got = jax.value_and_grad(faked, argnums=(0, 1))(up, down)
    want = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*rounded)
    assert_close(got, want, 1e-12)


# ------------------------------------------------------------------ rounded inputs


def rounding(w, format, largest):
    """Packed, with an input scale per expert."""
    scale = tensor_scale(largest_magnitude(w, 1), format)
    inputs = tensor_scale(jnp.asarray(largest, jnp.float32), format)
    return quantize(w, format, axis=-2, scale=scale, input_scale=inputs)


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
@pytest.mark.parametrize("m", [3, 40])
def test_rows_are_rounded_as_the_experts_they_chose(format, m):
    """Values and gradients of every form are those of the specification."""
    case = cases.Case(m=m, e=3, c=2, d=16, f=32)
    x, up, down, experts, gates = cases.inputs(case)

    @functools.partial(jax.jit, static_argnums=4)
    def run(x, up, down, gates, implementation):
        def loss(x, up, down, gates):
            weights = (
                FakeQuant(w, rounding(jax.lax.stop_gradient(w), format, largest))
                for w, largest in ((up, [1.0, 2.0, 4.0]), (down, [3.0, 30.0, 9.0]))
            )
            products = both_products(x, *weights, experts, gates, implementation)
            return sum(jnp.sum(jnp.sin(y)) for y in products), products

        return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(x, up, down, gates)

    given = x, up, down, gates
    got, want = run(*given, "xla"), run(*given, "reference")
    assert_close(got, want, 1e-4)
    (_, (mlp, product)), _ = got
    stored = rounding(up, format, [1.0, 2.0, 4.0]), rounding(down, format, [3, 30, 9])
    plain = both_products(x, *stored, experts, gates, "xla")
    assert_close((mlp, product), plain, 1e-5)
    unrounded = [packed(w, format) for w in (up, down)]
    other = both_products(x, *unrounded, experts, gates, "xla")
    assert not np.allclose(mlp, other[0], rtol=1e-3)


def test_observed_experts_tell_what_they_meet():
    case = cases.TESTED["uneven"]
    x, up, _, experts, _ = cases.inputs(case)
    rows, seen = jnp.broadcast_to(x[:, None], (*experts.shape, case.d)), []
    y = grouped_matmul(rows, Observed(up, lambda *met: seen.append(met)), experts)
    assert np.array_equal(y, grouped_matmul(rows, up, experts))
    assert seen[0][0] is rows and seen[0][1] is experts
