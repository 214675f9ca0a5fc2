"""Packed weights: rounding against ml_dtypes, packing against compressed-tensors."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from elastic_kernels.quant_array import (
    BLOCK,
    BLOCK_SCALES,
    FORMATS,
    SMALLEST_SCALE,
    QuantArray,
    dequantize,
    e2m1_codes,
    e2m1_values,
    largest_magnitude,
    quantize,
    rounded,
    tensor_scale,
    to_e4m3,
)

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def drawn(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def packed(array, format, *, axis=None, batch=0, **options):
    """Quantized under its own scale, contracted over all but its last dimension."""
    scale = tensor_scale(largest_magnitude(array, batch), format)
    axis = (-2 if array.ndim > 1 else -1) if axis is None else axis
    return quantize(array, format, axis=axis, scale=scale, **options)


def same_bits(a, b):
    leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(leaves, others, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# ------------------------------------------------------------------------- rounding


def neighbourhoods(numbers):
    """Every number, every midpoint, their float32 neighbours, and both signs."""
    numbers = np.unique(np.asarray(numbers, np.float32))
    middles = (numbers[1:] + numbers[:-1]) / 2  # exact in float32
    points = np.concatenate([numbers, middles])
    near = [np.nextafter(points, np.float32(to)) for to in (-np.inf, np.inf)]
    points = np.concatenate([points, *near]).astype(np.float32)
    return np.concatenate([points, -points])


def all_bfloat16():
    """Every finite bfloat16 but the subnormals, which XLA flushes to zero on a CPU."""
    bits = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    numbers = bits.astype(np.float32)
    normal = np.abs(numbers) >= np.finfo(np.float32).tiny
    return numbers[np.isfinite(numbers) & normal]


BEYOND = np.array([448, 449, 464, 465, 480, 1e4, 3e38], np.float32)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_e4m3_rounding_is_that_of_ml_dtypes(wrap):
    finite = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    near = neighbourhoods(finite.astype(np.float32))
    points = np.concatenate([near, BEYOND, -BEYOND, all_bfloat16()])
    want = np.clip(points, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    got = np.asarray(wrap(to_e4m3)(points))
    assert np.array_equal(got.view(np.uint8), want.view(np.uint8))
    assert np.isnan(np.float32(np.asarray(to_e4m3(jnp.float32(np.nan)))))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_e2m1_rounding_is_that_of_ml_dtypes(wrap):
    points = np.concatenate([neighbourhoods(E2M1), BEYOND, -BEYOND, all_bfloat16()])
    want = points.astype(ml_dtypes.float4_e2m1fn)
    codes = wrap(e2m1_codes)(points)
    got = np.asarray(wrap(e2m1_values)(codes))
    assert np.array_equal(got, want.astype(np.float32))
    assert np.array_equal(np.signbit(got), np.signbit(points))
    assert np.array_equal(np.asarray(codes), want.view(np.uint8) & 15)


def test_ties_go_to_the_even_code():
    ties = jnp.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    want = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert e2m1_values(e2m1_codes(ties)).tolist() == want


# -------------------------------------------------------------------------- formats


def plain_nvfp4(w, scale):
    """The formulas in numpy for one matrix [k, n]: (numbers, block scales)."""
    blocks = w.reshape(-1, BLOCK, w.shape[1]).astype(np.float32)
    largest = np.abs(blocks).max(1, keepdims=True)
    scales = np.clip(largest / (np.float32(6) * scale), 2.0**-9, 448)
    scales = np.where(largest == 0, 1, scales).astype(ml_dtypes.float8_e4m3fn)
    whole = scales.astype(np.float32) * scale
    numbers = (blocks / whole).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return (numbers * whole).reshape(w.shape), scales[:, 0]


def near_ties(*shape):
    """Few bits each, so that quotients by a scale often lie at a bound or beside it."""
    numbers = np.random.default_rng(5).integers(-24, 25, shape)
    return jnp.asarray(numbers * np.float32(0.0375))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_scales_are_divided_and_not_multiplied_by_a_reciprocal(wrap):
    largest = np.abs(np.asarray(drawn(64)))
    for format, most in (("fp8", 448), ("nvfp4", 2688)):
        got = wrap(lambda a, f=format: tensor_scale(a, f))(largest)
        assert np.array_equal(got, largest / np.float32(most))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_nvfp4_is_the_formula_in_numpy(wrap):
    w = drawn(64, 24) * np.exp(4 * np.asarray(drawn(64, 24, seed=1)))
    w = jnp.asarray(w).at[16:32, 3].set(0).at[32:].set(near_ties(32, 24))
    q = wrap(lambda w: packed(w, "nvfp4"))(w)
    scale = np.abs(w).max() / np.float32(2688)
    assert np.asarray(q.scale) == scale
    numbers, scales = plain_nvfp4(np.asarray(w), scale)
    assert np.array_equal(
        np.asarray(q.block_scale).view(np.uint8), scales.view(np.uint8)
    )
    assert np.array_equal(dequantize(q), numbers)
    assert np.array_equal(jax.jit(dequantize)(q), numbers)
    assert float(q.block_scale[1, 3]) == 1 and not np.any(numbers[16:32, 3])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_fp8_is_the_formula_in_numpy(wrap):
    w = jnp.concatenate([drawn(30, 7), near_ties(30, 7)])
    q = wrap(lambda w: packed(w, "fp8"))(w)
    scale = np.abs(w).max() / np.float32(448)
    want = (np.asarray(w) / scale).astype(ml_dtypes.float8_e4m3fn)
    assert np.asarray(q.scale) == scale
    assert np.array_equal(np.asarray(q.values).view(np.uint8), want.view(np.uint8))
    assert np.array_equal(dequantize(q), want.astype(np.float32) * scale)


def test_the_error_of_normal_weights():
    """Relative, root mean square: what the formats cost, and what 4-or-6 gives back."""
    w = drawn(64, 256)
    error = lambda q: float(jnp.linalg.norm(dequantize(q) - w) / jnp.linalg.norm(w))
    plain, searched = (
        error(packed(w, "nvfp4", block_scale=rule)) for rule in BLOCK_SCALES
    )
    assert 0.09 < plain < 0.1
    assert searched < 0.95 * plain
    assert error(packed(w, "fp8")) < 0.03


def test_four_over_six_is_never_worse_in_any_block():
    w = drawn(64, 256)
    six, both = (packed(w, "nvfp4", block_scale=rule) for rule in BLOCK_SCALES)
    square = lambda q: np.square(dequantize(q) - w).reshape(4, 16, 256).sum(1)
    better = np.asarray(square(both) < square(six))
    same = np.asarray(six.block_scale == both.block_scale)
    assert 0.1 < better.mean() < 0.9
    assert np.array_equal(better, ~same)


@pytest.mark.parametrize("format", FORMATS)
def test_four_and_a_half_bits_or_eight(format):
    q = packed(drawn(48, 10), format)
    bits = {"nvfp4": 4.5, "fp8": 8}[format]
    assert (q.size_bytes - 4) * 8 == bits * 480
    assert q.values.dtype == (jnp.uint8 if format == "nvfp4" else jnp.float8_e4m3fn)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_it_looks_like_from_outside(format, dtype):
    w = drawn(3, 2, 32, 5, dtype=dtype)
    q = packed(w, format, batch=1)
    assert (q.shape, q.ndim, len(q), q.dtype) == (w.shape, 4, 3, dtype)
    assert dequantize(q).dtype == dtype
    assert dequantize(q, jnp.float32).dtype == jnp.float32
    assert q.scale.shape == (3,)
    shapes = jax.eval_shape(lambda w: packed(w, format, batch=1), w)
    assert shapes.shape == w.shape and shapes.size_bytes == q.size_bytes
    same_bits(jax.tree.map(jnp.copy, q), q)


@pytest.mark.parametrize("format", FORMATS)
def test_rounding_what_is_rounded_changes_nothing(format):
    q = packed(drawn(32, 8), format)
    same_bits(quantize(dequantize(q), format, axis=-2, scale=q.scale), q)


# ----------------------------------------------------------------------- edge values


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_have_scales_of_one(format):
    q = packed(jnp.zeros((2, 32, 4)), format, batch=1)
    assert q.scale.tolist() == [1, 1]
    assert not np.any(dequantize(q))
    if format == "nvfp4":
        assert np.all(np.float32(q.block_scale) == 1)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [1e-38, 1e-35, 1e38, 3.4e38])
def test_no_scale_underflows_or_overflows(format, size):
    w = jnp.float32(size) * jnp.linspace(-1, 1, 32)[:, None]
    q = packed(w, format)
    assert float(q.scale) >= SMALLEST_SCALE
    assert np.all(np.isfinite(dequantize(q)))
    if size > 1e-36:
        assert np.abs(dequantize(q) / size - w / size).max() < 0.2


def test_a_quiet_block_beside_a_loud_one():
    """Its scale stops at the smallest E4M3 number; its values become zeros."""
    w = jnp.concatenate([jnp.full((16, 1), 1000.0), jnp.full((16, 1), 1e-6)])
    q = packed(w, "nvfp4")
    assert float(q.block_scale[1, 0]) == 2.0**-9
    assert np.all(dequantize(q)[:16] == 1000) and not np.any(dequantize(q)[16:])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(format, bad):
    w = drawn(64, 96).at[3, 1].set(bad)
    assert np.isnan(largest_magnitude(w)) and np.all(
        np.isnan(dequantize(packed(w, format)))
    )
    inherited = quantize(w, format, axis=-2, scale=jnp.float32(0.01))
    assert np.isnan(dequantize(inherited)[3, 1])


# ---------------------------------------------------------------- prefixes and members


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rule", BLOCK_SCALES)
@pytest.mark.parametrize("sizes", [(2, 3, 32, 5), (4, 1, 16, 1)])
def test_a_prefix_is_the_prefix_quantized(format, rule, sizes):
    w = drawn(4, 3, 48, 7)
    q = packed(w, format, batch=1, block_scale=rule)
    index = tuple(slice(n) for n in sizes)
    again = quantize(
        w[index], format, axis=-2, scale=q.scale[: sizes[0]], block_scale=rule
    )
    same_bits(q[index], again)
    assert np.array_equal(dequantize(q[index]), dequantize(q)[index])
    more = [(0, n - m) for n, m in zip(w.shape, sizes, strict=True)]
    assert np.array_equal(
        dequantize(q[index].padded(more)), jnp.pad(dequantize(q[index]), more)
    )


def test_members_of_a_stack():
    w = drawn(4, 32, 6)
    q = packed(w, "nvfp4", batch=1)
    same_bits(q[2], packed(w[2], "nvfp4"))
    same_bits(jax.jit(lambda q, e: q[e])(q, jnp.uint32(2)), q[2])
    _, each = jax.lax.scan(lambda c, member: (c, dequantize(member)), 0, q)
    assert np.array_equal(each, dequantize(q))


def test_what_cannot_be_cut_says_why():
    q = packed(drawn(32, 6), "nvfp4")
    with pytest.raises(ValueError, match=r"\(24, 6\) of \(32, 6\) would cut a block"):
        q[:24, :]
    with pytest.raises(ValueError, match="prefix"):
        q[:, 1:]
    with pytest.raises(ValueError, match="no stack"):
        q[0]
    with pytest.raises(ValueError, match="would cut a block"):
        q.padded([(0, 8), (0, 0)])
    with pytest.raises(ValueError, match="24 values along the contracted dimension"):
        packed(drawn(24, 6), "nvfp4")
    with pytest.raises(ValueError, match="format 'fp4'"):
        quantize(drawn(32, 6), "fp4", axis=-2, scale=jnp.float32(1))
    with pytest.raises(ValueError, match="axis -3 .* count it from the end"):
        quantize(drawn(32, 6), "fp8", axis=-3, scale=jnp.float32(1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_rounding_is_quantizing_and_back(format, dtype):
    x = drawn(3, 32, 5, dtype=dtype)
    scale = tensor_scale(0.5 * largest_magnitude(x), format)  # some saturate
    there = quantize(x, format, axis=-2, scale=scale)
    got = rounded(x, format, axis=-2, scale=scale)
    assert got.dtype == dtype and np.array_equal(got, dequantize(there, dtype))
    assert jnp.max(jnp.abs(got)) < jnp.max(jnp.abs(x))


@pytest.mark.parametrize("format", FORMATS)
def test_rounding_commutes_with_masks(format):
    """Channels that are off leave the others, and their block scales, alone."""
    x, scale = drawn(4, 64), jnp.float32(0.01)
    mask = jnp.arange(64) < 32
    masked = rounded(x * mask, format, axis=-1, scale=scale)
    sliced = rounded(x[:, :32], format, axis=-1, scale=scale)
    assert np.array_equal(masked[:, :32], sliced) and not masked[:, 32:].any()


# -------------------------------------------------------- an independent implementation


@pytest.fixture(scope="module")
def library():
    """compressed-tensors, and torch."""
    pytest.importorskip("compressed_tensors", reason="a test extra")
    torch = pytest.importorskip("torch")
    from compressed_tensors.compressors.nvfp4 import helpers

    return helpers, torch


def test_packed_here_unpacked_by_compressed_tensors(library):
    helpers, torch = library
    w = drawn(48, 10, seed=7)
    q = packed(w, "nvfp4")
    rows = torch.from_numpy(np.array(q.values).T.copy())  # [out, in / 2]
    numbers = helpers.unpack_fp4_from_uint8(rows, 10, 48, dtype=torch.float32).numpy()
    assert np.array_equal(numbers * spread_scales(q), dequantize(q).T)


def test_packed_by_compressed_tensors_unpacked_here(library):
    helpers, torch = library
    rng = np.random.default_rng(3)
    numbers = rng.choice(np.concatenate([E2M1, -E2M1]), (10, 48))
    rows = helpers.pack_fp4_to_uint8(torch.from_numpy(numbers).to(torch.bfloat16))
    ones = jnp.ones((3, 10), jnp.float8_e4m3fn)
    values = jnp.asarray(rows.numpy().T)
    q = QuantArray(values, jnp.float32(1), ones, None, -2, jnp.dtype(jnp.float32))
    assert np.array_equal(dequantize(q).T, numbers)
    assert np.array_equal(np.signbit(dequantize(q).T), np.signbit(numbers))
    scale = jnp.float32(1)
    again = quantize(jnp.asarray(numbers.T), "nvfp4", axis=-2, scale=scale)
    full = np.asarray(np.abs(numbers).reshape(10, 3, 16).max(-1) == 6).T
    same = np.asarray(again.values == values).reshape(3, 8, 10).all(1)
    assert full.any() and np.all(same[full])


def test_rounded_and_packed_by_compressed_tensors(library):
    """Their rounding, under our scales, gives our bytes."""
    helpers, torch = library
    w = drawn(48, 10, seed=8)
    q = packed(w, "nvfp4")
    scales = np.array(q.block_scale, np.float32).T.copy()
    rows = helpers.quantize_and_pack_fp4(
        torch.from_numpy(np.array(w).T.copy()),
        torch.from_numpy(scales),
        global_scale=torch.tensor([1 / float(q.scale)]),
        zero_point=None,
        group_size=BLOCK,
    )
    same = rows.numpy().T == np.asarray(q.values)
    # Their scale is the reciprocal: one rounding apart, seen at ties alone.
    assert same.mean() > 0.999


def spread_scales(q):
    """Scales of every value of a matrix, [out, in]."""
    scales = np.asarray(q.block_scale).astype(np.float32) * np.asarray(q.scale)
    return np.repeat(scales, BLOCK, axis=0).T
