"""Recipes, joint scales, bytes, and models that compute from packed weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import axes, nesting
from elastic_jax.axes import AXES
from elastic_jax.quantize import Recipe, fake, formats, size_bytes, table
from elastic_kernels import FakeQuant, QuantArray
from elastic_kernels.quant_array import BLOCK

# Everything that can be quantized, in both formats.
ALL = (
    ("attention/[qkv]", "nvfp4"),
    ("attention/o", "nvfp4"),
    ("mamba*/out", "nvfp4"),
    ("mamba*/[zxBC]", "fp8"),
    ("mamba*/dt", "fp8"),
    ("moe/router", "fp8"),
    ("model/lm_head", "nvfp4"),
)


def parent(cfg, seed=0, dtype=np.float32):
    specs, rng = ej.param_specs(cfg), np.random.default_rng(seed)

    def draw(path, spec):
        noise = rng.standard_normal(axes.shape(cfg, specs, path, spec))
        if spec.contracted:
            fan = np.prod(noise.shape[len(spec.batch) : -len(spec.produced)])
            return jnp.asarray(noise / np.sqrt(fan), dtype)
        return jnp.asarray((spec.init in ("ones", "A_log")) + 0.2 * noise, dtype)

    return axes.map_specs(draw, specs)


def stored_in(tree, specs):
    """Path -> format of the leaves of a tree."""
    leaves = {path: axes.leaf(tree, path) for path, _ in specs}
    return {p: w.format for p, w in leaves.items() if isinstance(w, QuantArray)}


# -------------------------------------------------------------------------- recipes


def test_the_recipe_of_nano_v3():
    """As in the released checkpoints; the README's accounting test ties the bytes."""
    cfg = ej.presets.nemotron3_nano()
    chosen = formats(ej.param_specs(cfg), cfg, Recipe("nvfp4"))
    kinds = {}
    for _, block, name in chosen:
        kinds.setdefault(cfg.pattern[block], {}).setdefault(name, []).append(block)
    before_attention = {4, 11, 18, 25, 32, 41}
    mamba = [i for i, kind in enumerate(cfg.pattern) if kind == "M"]
    mamba = [i for i in mamba if i not in before_attention]
    assert len(mamba) == 17
    assert kinds["M"] == dict.fromkeys(("z", "x", "B", "C", "dt", "out"), mamba)
    moe = [i for i, kind in enumerate(cfg.pattern) if kind == "E"]
    names = ("up", "down", "shared_up", "shared_down")
    assert kinds == {"M": kinds["M"], "E": dict.fromkeys(names, moe)}
    assert set(chosen.values()) == {"nvfp4"}


def test_the_last_rule_that_matches_holds():
    cfg = ej.presets.tiny("MEM*-")
    specs = ej.param_specs(cfg)
    chosen = functools.partial(formats, specs, cfg)
    rules = (("attention/*", "keep"), ("attention/[qkv]", "fp8"), ("moe/up", "keep"))
    mixed = chosen(Recipe("nvfp4", rules))
    assert mixed["layers", 3, "q"] == "fp8" and ("layers", 3, "o") not in mixed
    assert ("layers", 1, "up") not in mixed
    assert mixed["layers", 4, "up"] == mixed["layers", 0, "z"] == "nvfp4"
    assert ("layers", 2, "z") not in mixed
    before = (("mamba_before_attention/out", "nvfp4"),)
    assert chosen(Recipe("fp8", before))["layers", 2, "out"] == "nvfp4"
    assert chosen(Recipe("fp8", (("*", "keep"), ("mlp/up", "fp8")))) == {
        ("layers", 4, "up"): "fp8"
    }


@pytest.mark.parametrize(
    "given, message",
    [
        ({"format": "nvfp"}, "format 'nvfp'; did you mean 'nvfp4'"),
        ({"block_scale": "mx"}, "block_scale 'mx'; did you mean 'max'"),
        ({"rules": (("moe/up", "bf16"),)}, "rule 'moe/up': format 'bf16'"),
        ({"rules": (("mambo/z", "fp8"),)}, "'mambo/z': no such .* mean 'mamba'"),
    ],
)
def test_what_a_recipe_cannot_say(given, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**given)


@pytest.mark.parametrize(
    "rule, message",
    [
        (("moe/uq", "fp8"), "rule 'moe/uq' matches no parameter; did you mean"),
        (("mamba/z", "keep"), r"layers/0/z, layers/0/x.*formats \['keep', 'nvfp4'\]"),
        (("model/embedding", "fp8"), "model/embedding enter no product"),
        (("moe/norm", "fp8"), "moe/norm enter no product"),
        (("mamba/conv_*", "nvfp4"), "mamba/conv_B, mamba/conv_B_bias, .* enter no"),
    ],
)
def test_what_does_not_fit_a_model(rule, message):
    cfg = ej.presets.tiny("MEM*-")
    with pytest.raises(ValueError, match=message):
        formats(ej.param_specs(cfg), cfg, Recipe("nvfp4", (rule,)))


def test_a_rule_for_blocks_that_a_model_lacks_is_no_mistake():
    cfg = ej.presets.tiny("M-")
    assert formats(ej.param_specs(cfg), cfg, Recipe(rules=ALL))


# ---------------------------------------------------------------------- refused early


def test_no_width_on_offer_cuts_a_block():
    """Whatever `counts` lets through keeps the blocks of a quantized tree whole."""
    specs = ej.param_specs(ej.presets.tiny("ME*-"))
    last = {spec.contracted[-1] for _, spec in specs if spec.decays}
    assert {"embed", "ssm_head_dim", "expert_ffn", "shared_ffn", "ffn"} <= last
    assert all(AXES[dim].step % BLOCK == 0 for dim in last & set(AXES))


def test_heads_that_hold_no_whole_blocks_are_refused_before_any_work():
    sizes = ej.presets.tiny("M*").to_dict() | {"ssm_head_dim": 24, "head_dim": 8}
    cfg = ej.ModelConfig.from_dict(sizes)
    specs = ej.param_specs(cfg)
    recipe = Recipe("nvfp4", (("attention/o", "nvfp4"), ("mamba*/out", "nvfp4")))
    with pytest.raises(ValueError) as error:
        ej.quantize({}, specs, cfg, recipe)
    for part in ("layers/0/out", "ssm_head_dim is 24", "layers/1/o ", "head_dim is 8"):
        assert part in str(error.value)
    assert formats(specs, cfg, Recipe("fp8", (("attention/o", "fp8"),)))


def test_unchecked_counts_cannot_cut_a_block():
    cfg = ej.presets.tiny("-")
    specs = ej.param_specs(cfg)
    params = ej.quantize(parent(cfg), specs, cfg, Recipe())
    with pytest.raises(ValueError, match="counts do not fit"):
        ej.counts(cfg, ffn=24)
    with pytest.raises(ValueError, match="layers/0/down: 24 of ffn would cut a block"):
        ej.slice_params(params, specs, ej.Counts({"ffn": 24}))
    with pytest.raises(ValueError, match="144 of ffn asked, 128 held"):
        ej.slice_params(params, specs, ej.Counts({"ffn": 144}))


def test_permuting_comes_before_quantizing():
    cfg = ej.presets.tiny("-")
    specs = ej.param_specs(cfg)
    params = ej.quantize(parent(cfg), specs, cfg, Recipe())
    ranks = ej.rank({"ffn": (jnp.arange(128.0),)})
    with pytest.raises(ValueError, match="layers/0/up is quantized.*permute first"):
        ej.permute_params(params, specs, ranks)


def test_what_is_not_finite_is_named():
    cfg = ej.presets.tiny("-E")
    specs = ej.param_specs(cfg)
    params = parent(cfg)
    params["layers"][0]["up"] = params["layers"][0]["up"].at[3, 4].set(np.nan)
    params["layers"][1]["down"] = params["layers"][1]["down"].at[2, 0, 1].set(np.inf)
    with pytest.raises(ValueError) as error:
        ej.quantize(params, specs, cfg, Recipe())
    for name in ("layers/0/up", "layers/1/down"):
        assert f"{name}: NaN or infinity among its weights" in str(error.value)


def test_a_tree_is_quantized_once():
    cfg = ej.presets.tiny("-")
    specs = ej.param_specs(cfg)
    params = ej.quantize(parent(cfg), specs, cfg, Recipe())
    with pytest.raises(ValueError, match="layers/0/up is quantized already"):
        ej.quantize(params, specs, cfg, Recipe())
    again = ej.quantize(ej.dequantize(params), specs, cfg, Recipe(), like=params)
    assert_same_bits(again, params)


# --------------------------------------------------------------------------- scales


@pytest.mark.parametrize("format, most", [("fp8", 448), ("nvfp4", 2688)])
def test_one_scale_for_each_exported_tensor(format, most):
    cfg = ej.presets.tiny("ME")
    specs = ej.param_specs(cfg)
    params = parent(cfg)
    params["layers"][0]["dt"] = params["layers"][0]["dt"] * 50
    params["layers"][1]["up"] = params["layers"][1]["up"].at[2].set(0)
    q = ej.quantize(params, specs, cfg, Recipe(format))["layers"]
    loudest = np.float32(np.abs(params["layers"][0]["dt"]).max()) / np.float32(most)
    for name in ("z", "x", "B", "C", "dt"):
        assert q[0][name].scale.shape == () and float(q[0][name].scale) == loudest
    out = np.abs(params["layers"][0]["out"]).max() / np.float32(most)
    assert float(q[0]["out"].scale) == out
    each = np.abs(params["layers"][1]["up"]).max((1, 2)) / np.float32(most)
    each[2] = 1
    assert np.array_equal(q[1]["up"].scale, each)


def test_input_scales():
    """Joint like those of the weights; an expert that saw nothing borrows one."""
    cfg = ej.presets.tiny("ME")
    specs = ej.param_specs(cfg)
    seen = np.arange(8, dtype=np.float32)
    given = {
        ("layers", 0, "z"): 3.0,
        ("layers", 0, "B"): np.float32(5),
        ("layers", 1, "up"): seen,
        ("layers", 1, "router"): 9.0,  # stays as it is
    }
    quantized = functools.partial(ej.quantize, parent(cfg), specs, cfg, Recipe("fp8"))
    params = quantized(input_largest=given)["layers"]
    for name in ("z", "x", "B", "C", "dt"):
        assert float(params[0][name].input_scale) == np.float32(5) / np.float32(448)
    assert params[0]["out"].input_scale is None
    seen[0] = 7
    assert np.array_equal(params[1]["up"].input_scale, seen / np.float32(448))
    for wrong, message in (
        ({("layers", 1, "up"): 2.0}, r"layers/1/up has shape \(\), not \(8,\)"),
        ({("layers", 0, "D"): 2.0}, "input_largest: no product has layers/0/D"),
        ({("layers", 0, "z"): np.nan}, "layers/0/z: NaN or infinity among its activ"),
    ):
        with pytest.raises(ValueError, match=message):
            quantized(input_largest=wrong)
    small = ej.slice_params(
        quantized(input_largest=given), specs, ej.counts(cfg, experts=3)
    )
    assert small["layers"][1]["up"].input_scale.shape == (3,)


# ---------------------------------------------------------------------------- bytes


def test_packed_arrays_take_what_the_table_says():
    """Real arrays in the widths of Nano v3, at reduced depth and few experts."""
    full = ej.presets.nemotron3_nano().to_dict()
    cfg = ej.ModelConfig.from_dict(
        full | {"pattern": "MEM*", "vocab": 64, "experts": 6, "heads_per_group": 2}
    )
    specs = ej.param_specs(cfg)
    params = axes.map_specs(
        lambda path, spec: np.zeros(axes.shape(cfg, specs, path, spec), jnp.bfloat16),
        specs,
    )
    recipe = Recipe("nvfp4", (("moe/shared_*", "fp8"),))
    quantized = ej.quantize(params, specs, cfg, recipe)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))
    assert held == sum(row["bytes"] for row in table(specs, cfg, recipe))
    assert held == size_bytes(quantized)
    assert stored_in(quantized, specs) == formats(specs, cfg, recipe)


@pytest.mark.parametrize("format, gib", [("nvfp4", 18.00), ("fp8", 30.42)])
def test_the_bytes_of_the_30b(format, gib):
    """Storage of every array at full size, without allocating one."""
    cfg, recipe = ej.presets.nemotron3_nano(), Recipe(format)
    specs = ej.param_specs(cfg)
    init = lambda: ej.init_params(jax.random.key(0), cfg, dtype=jnp.bfloat16)
    quantized = jax.eval_shape(lambda: ej.quantize(init(), specs, cfg, recipe))
    rows = table(specs, cfg, recipe)
    assert size_bytes(quantized) == sum(row["bytes"] for row in rows)
    assert sum(row["parameters"] for row in rows) == 31_577_940_288
    assert round(size_bytes(quantized) / 2**30, 2) == gib
    packed = {f for *_, f in (tuple(r.values())[:3] for r in rows)}
    assert packed == {format, "bf16"}
    counts = ej.counts(cfg, embed=1920, expert_ffn=960)
    small = jax.eval_shape(lambda p: ej.slice_params(p, specs, counts), quantized)
    priced = table(specs, cfg, recipe, counts=counts)
    assert size_bytes(small) == sum(row["bytes"] for row in priced)


def test_the_table_of_a_submodel_counts_its_blocks():
    cfg = ej.presets.tiny("EME*")
    specs, recipe = ej.param_specs(cfg), Recipe("nvfp4", (("attention/*", "keep"),))
    counts = ej.counts(
        cfg, expert_ffn=(16, 48), experts=(3, 5), embed=48, layers=(0, 1, 1, 1)
    )
    small = ej.slice_params(
        ej.quantize(parent(cfg, dtype=jnp.bfloat16), specs, cfg, recipe), specs, counts
    )
    rows = table(specs, cfg, recipe, counts=counts)
    assert size_bytes(small) == sum(row["bytes"] for row in rows)
    (row,) = (row for row in rows if (row["kind"], row["parameter"]) == ("moe", "up"))
    assert row == {
        "kind": "moe",
        "parameter": "up",
        "format": "nvfp4",
        "parameters": 5 * 48 * 48,
        "bytes": 5 * 48 * 48 * 9 // 16 + 5 * 4,
    }


# -------------------------------------------------------------------------- running


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


CFG = ej.presets.tiny("ME*-")
SPECS = ej.param_specs(CFG)
TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, CFG.vocab, (2, 7)))
COUNTS = ej.counts(
    CFG,
    **dict(embed=48, heads_per_group=2, ssm_head_dim=16, q_per_kv=1, experts=5),
    **dict(expert_ffn=32, shared_ffn=32, ffn=48, ssm_state=16),
)


@pytest.fixture(scope="module")
def quantized():
    """A tiny tree with every kind of block and all that can be quantized."""
    tree = ej.quantize(parent(CFG), SPECS, CFG, Recipe("nvfp4", ALL))
    assert {path[1] for path in stored_in(tree, SPECS) if path[0] == "layers"} == {
        *range(4)
    }
    return tree


@pytest.mark.parametrize("counts", [None, COUNTS], ids=["whole", "sliced"])
def test_a_model_computes_from_packed_weights(counts, quantized):
    """Logits, decoding and gradients of activations are the dequantized tree's."""
    cfg, params = CFG, quantized
    if counts is not None:
        params, cfg = (
            ej.slice_params(params, SPECS, counts),
            ej.slice_config(CFG, counts),
        )

    @jax.jit
    def run(params, shift):
        def f(shift):
            rows = params | {"embedding": params["embedding"] + shift}
            logits = ej.apply(rows, TOKENS, cfg)
            return jnp.sum(jnp.sin(logits)), logits

        if counts is None:
            return jax.grad(f, has_aux=True)(shift)
        cache = ej.init_cache(cfg, 2, 7)
        return ej.extend(params, TOKENS, cache, cfg)[0], f(shift)[1]

    shift = jnp.zeros(cfg.embed)
    got, want = (run(p, shift) for p in (params, ej.dequantize(params)))
    for a, b in zip(got, want, strict=True):
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, atol=2e-5 * scale)


def test_quantizing_and_slicing_trace(quantized):
    """`jit` of both gives the bits of neither; `eval_shape` and `tree.map` work."""
    recipe = Recipe("nvfp4", ALL)
    compiled = jax.jit(lambda p: ej.quantize(p, SPECS, CFG, recipe))(parent(CFG))
    assert_same_bits(compiled, quantized)
    small = ej.slice_params(quantized, SPECS, COUNTS)
    sliced = jax.jit(ej.slice_params, static_argnums=(1, 2))(quantized, SPECS, COUNTS)
    assert_same_bits(sliced, small)
    assert_same_bits(jax.tree.map(lambda a: a, quantized), quantized)
    shapes = jax.eval_shape(lambda: quantized)
    assert size_bytes(shapes) == size_bytes(quantized)


def test_a_small_tree_fills_up_with_zeros(quantized):
    def both(quantized):
        small = ej.slice_params(quantized, SPECS, COUNTS)
        filled = nesting.resized(small, quantized)
        plain = nesting.resized(ej.dequantize(small), ej.dequantize(quantized))
        return ej.dequantize(filled), plain

    got, want = jax.jit(both)(quantized)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert np.array_equal(a, b)


# ---------------------------------------------------------------------------- faking


def test_fake_weights_compute_what_quantized_ones_will():
    """Same logits; the gradient is that at the rounded weights, straight through."""
    cfg, recipe = ej.presets.tiny("E*"), Recipe("nvfp4", ALL)
    specs, params = ej.param_specs(cfg), parent(cfg)
    counts = ej.counts(cfg, embed=48, expert_ffn=32, q_per_kv=1)
    small_cfg = ej.slice_config(cfg, counts)

    @jax.jit
    def trained(params, make):
        def f(params):
            small = ej.slice_params(make(params), specs, counts)
            logits = ej.apply(small, TOKENS, small_cfg)
            return jnp.sum(jnp.sin(logits)), logits

        return jax.value_and_grad(f, has_aux=True)(params)

    packed = ej.quantize(params, specs, cfg, recipe)
    as_if = jax.tree_util.Partial(lambda q, p: fake(p, q, specs), packed)
    (_, got), gradient = trained(params, as_if)
    rounded = ej.dequantize(packed)
    (_, want), expected = trained(rounded, jax.tree_util.Partial(lambda p: p))
    np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.max(jnp.abs(want))))
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(expected))
    for a, b in zip(*map(jax.tree.leaves, (gradient, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * largest)


def test_scales_are_searched_anew_or_inherited():
    cfg = ej.presets.tiny("-")
    specs, recipe = ej.param_specs(cfg), Recipe("fp8")
    params = parent(cfg)
    like = ej.quantize(params, specs, cfg, recipe)
    halved = jax.tree.map(lambda w: w / 2, params)
    again = ej.quantize(halved, specs, cfg, recipe)
    under = ej.quantize(halved, specs, cfg, recipe, like=like)
    anew, frozen = (fake(halved, q, specs)["layers"][0]["up"] for q in (again, under))
    assert isinstance(anew, FakeQuant)
    before = like["layers"][0]["up"].scale
    assert float(frozen.quantized.scale) == float(before)
    assert float(anew.quantized.scale) == float(before) / 2
    assert anew.dtype == jnp.float32 and anew.shape == (cfg.embed, cfg.ffn)


def test_scales_of_blocks_freeze_with_the_rest():
    """What was searched for stays: the values alone follow the weights."""
    cfg, recipe = ej.presets.tiny("E"), Recipe("nvfp4", block_scale="four_over_six")
    specs, params = ej.param_specs(cfg), parent(cfg)
    like = ej.quantize(params, specs, cfg, recipe)
    less = jax.tree.map(lambda w: w / 3, params)
    for name, moved in (("same", params), ("less", less)):
        got = ej.quantize(moved, specs, cfg, recipe, like=like, frozen=True)
        want, up = like["layers"][0]["up"], got["layers"][0]["up"]
        assert np.array_equal(up.block_scale, want.block_scale)
        assert np.array_equal(up.values, want.values) == (name == "same")
        step = jnp.repeat(want.block_scale.astype(jnp.float32), 16, axis=1)
        step = step * want.scale[:, None, None]
        off = jnp.abs(up.astype(jnp.float32) - moved["layers"][0]["up"])
        assert jnp.all(off <= 1.001 * step)  # half of the largest step, 4 to 6
    with pytest.raises(ValueError, match="give a quantized tree"):
        ej.quantize(params, specs, cfg, recipe, frozen=True)


# ----------------------------------------------------------------------------- memory


@pytest.mark.parametrize("writes", [False, True], ids=["reads", "writes"])
def test_never_is_the_whole_model_an_array(writes):
    """Temporaries of a few matrices, also in the loop that writes a text."""
    cfg = dataclasses.replace(ej.presets.tiny("-" * 12), embed=256, ffn=1024)
    specs, recipe = ej.param_specs(cfg), Recipe("nvfp4", (("*", "nvfp4"),))

    def init(key, pack):
        params = ej.init_params(key, cfg)
        return ej.quantize(params, specs, cfg, recipe) if pack else params

    shapes = [
        jax.eval_shape(functools.partial(init, pack=pack), jax.random.key(0))
        for pack in (True, False)
    ]

    def run(params, token):
        if not writes:
            return ej.apply(params, token, cfg)
        step = lambda _, t: jnp.argmax(ej.apply(params, t, cfg), -1).astype(jnp.int32)
        return jax.lax.fori_loop(0, 3, step, token)

    packed, arrays = (
        jax.jit(run)
        .lower(params, jax.ShapeDtypeStruct((1, 1), jnp.int32))
        .compile()
        .memory_analysis()
        for params in shapes
    )
    whole, largest = arrays.argument_size_in_bytes, 4 * cfg.embed * cfg.ffn
    assert whole > 24 * largest > 6 * packed.argument_size_in_bytes
    assert packed.temp_size_in_bytes < arrays.temp_size_in_bytes + 8 * largest
