"""Quantized checkpoints both ways: layouts, metadata, bits, and what is refused."""

import dataclasses
import fnmatch
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import elastic_jax as ej
from elastic_jax import axes, convert
from elastic_jax.__main__ import main
from elastic_jax.huggingface import open_hf
from elastic_jax.huggingface.names import Layout, weights
from elastic_jax.huggingface.shards import SINGLE, read_shards
from elastic_jax.quantize import formats
from elastic_kernels import FakeQuant, QuantArray

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], "f4")
CFG = dataclasses.replace(
    ej.presets.tiny("MEM*-"),
    vocab=32,
    embed=48,
    heads_per_group=2,
    ssm_head_dim=16,
    ssm_state=16,
    head_dim=16,
    experts=4,
    expert_ffn=32,
    shared_ffn=48,
    ffn=64,
)
SPECS = ej.param_specs(CFG)
# Name -> recipe, and whether the inputs of its FP8 and of its NVFP4 weights are known.
RECIPES = {
    "fp8": (ej.Recipe("fp8"), True, True),
    "nvfp4": (ej.Recipe("nvfp4"), True, True),
    "weight_only": (ej.Recipe("nvfp4"), False, False),
    "mixed": (
        ej.Recipe(
            "nvfp4",
            (
                *((f"mamba/{name}", "fp8") for name in ("z", "x", "B", "C", "dt")),
                *((f"attention/{name}", "fp8") for name in "qkv"),
                ("attention/o", "nvfp4"),
                ("mlp/down", "keep"),
                ("model/lm_head", "fp8"),
            ),
        ),
        True,
        False,
    ),
}


def random_params(dtype="bfloat16"):
    draw = np.random.default_rng(0)

    def leaf(path, spec):
        value = draw.normal(size=axes.shape(CFG, SPECS, path, spec))
        bias = path[-1] == "router_bias"
        return jnp.asarray(value, jnp.float32 if bias else dtype)

    return axes.map_specs(leaf, SPECS)


def quantized(name, params=None):
    """Parameters in a recipe, with inputs that are larger for each next expert."""
    recipe, *known = RECIPES[name]
    known = dict(zip(("fp8", "nvfp4"), known, strict=True))
    specs = dict(SPECS)
    met = {}
    for path, format in formats(SPECS, CFG, recipe).items():
        if known[format]:
            shape = [getattr(CFG, dim) for dim in specs[path].batch]
            met[path] = 3 + np.arange(np.prod(shape, dtype=int)).reshape(shape)
    params = random_params() if params is None else params
    return ej.quantize(params, SPECS, CFG, recipe, input_largest=met)


@pytest.fixture(scope="module")
def trees():
    return {name: quantized(name) for name in RECIPES}


@pytest.fixture(scope="module")
def homes(trees, tmp_path_factory):
    """Every recipe in both layouts."""
    found = {}
    for name, params in trees.items():
        for scheme in ("modelopt", "compressed-tensors"):
            home = tmp_path_factory.mktemp(name) / scheme
            ej.to_hf(home, params, CFG, format=scheme, shard_bytes=40_000)
            found[name, scheme] = home
    return found


@pytest.fixture
def home(tmp_path, trees):
    """A directory in one file, to be broken."""
    ej.to_hf(tmp_path / "hf", trees["mixed"], CFG)
    return tmp_path / "hf"


def assert_same(have, want):
    """Structure, with format, axis and dtype of quantized leaves; and bits."""
    assert jax.tree.structure(have) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def loaded(home) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in read_shards(home).items()}


def config(home, name="config.json"):
    return json.loads((home / name).read_text())


def rewrite(home, change, file=SINGLE):
    """Changes the tensors, or what a file of JSON says."""
    if file == SINGLE:
        tensors = loaded(home)
        change(tensors)
        tensors = {name: np.asarray(value) for name, value in tensors.items()}
        safetensors.numpy.save_file(tensors, home / SINGLE)
        return
    said = config(home, file)
    change(said)
    (home / file).write_text(json.dumps(said))


# ----------------------------------------------------------------------- both ways


@pytest.mark.parametrize("scheme", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("name", RECIPES)
def test_round_trip(homes, trees, name, scheme):
    """To the bit, but for scales that compressed-tensors stores as reciprocals."""
    params, cfg = ej.from_hf(homes[name, scheme])
    assert cfg == CFG
    if scheme == "modelopt" or name == "fp8":
        assert_same(params, trees[name])
        return
    assert jax.tree.structure(params) == jax.tree.structure(trees[name])
    for have, want in zip(*map(packed, (params, trees[name])), strict=True):
        for part in ("values", "block_scale"):
            assert_same(getattr(have, part), getattr(want, part))
        np.testing.assert_allclose(have.scale, want.scale, rtol=2**-23)


def packed(tree) -> list[QuantArray]:
    is_packed = lambda leaf: isinstance(leaf, QuantArray)
    return [w for w in jax.tree.leaves(tree, is_leaf=is_packed) if is_packed(w)]


@pytest.mark.parametrize("name", RECIPES)
def test_export_of_import_is_the_directory(homes, tmp_path, name):
    """Through a nested checkpoint: every shard, byte for byte, and the metadata."""
    home = homes[name, "modelopt"]
    assert convert.import_hf(home, tmp_path / "nested") == ()
    opened = ej.open_nested(tmp_path / "nested")
    assert opened.formats
    ej.to_hf(
        tmp_path / "back",
        opened.lazy()[0],
        opened.cfg,
        carried=opened.provenance["huggingface"],
        shard_bytes=40_000,
    )
    files = sorted(file.name for file in home.iterdir() if file.name != "README.md")
    assert len([name for name in files if name.endswith(".safetensors")]) > 2
    for file in files:
        assert (tmp_path / "back" / file).read_bytes() == (home / file).read_bytes()


def test_a_submodel_is_cut_from_the_quantized_parent(homes, trees, tmp_path):
    """A released parent is imported and sliced as it is: nothing is rounded again."""
    counts = {"embed": 32, "expert_ffn": 16, "experts": 3, "ffn": 32}
    nested, cut = tmp_path / "nested", tmp_path / "cut"
    convert.import_hf(homes["mixed", "modelopt"], nested, budgets={"small": counts})
    convert.slice_nested(nested, cut, "small")
    small = ej.slice_params(trees["mixed"], SPECS, ej.counts(CFG, **counts))
    assert_same(ej.open_nested(cut).restore()[0], small)
    convert.export_hf(cut, tmp_path / "out")
    found, found_cfg = ej.from_hf(tmp_path / "out")
    assert found_cfg.embed == 32
    assert_same(found, small)
    assert (
        "quantized in the nested checkpoint: fp8, nvfp4"
        in (tmp_path / "out" / "README.md").read_text()
    )


# ------------------------------------------------------------------------- layouts


def by_hand(tensors, module) -> np.ndarray:
    """The weight [out, in] in float32, from ModelOpt's layout, read off its text."""
    values, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    if values.dtype == E4M3:
        return values.astype("f4") * scale
    codes = np.stack([values & 15, values >> 4], -1).reshape(len(values), -1)
    weight = np.where(codes & 8, -1, 1) * E2M1[codes & 7]
    blocks = np.repeat(scale.astype("f4") * tensors[f"{module}.weight_scale_2"], 16, 1)
    return (weight * blocks).astype("f4")


@pytest.mark.parametrize("name", RECIPES)
def test_modelopt_tensors_mean_what_the_weights_are(homes, trees, name):
    tensors, seen = loaded(homes[name, "modelopt"]), 0
    whole = ej.dequantize(jax.tree.map(lambda w: w, as_float(trees[name])))
    layout = Layout("backbone.", stacked=False)
    for weight, paths in weights(CFG, layout).items():
        leaves = [axes.leaf(trees[name], path) for path in paths]
        if not isinstance(leaves[0], QuantArray):
            continue
        seen += 1
        module = weight.removesuffix(".weight")
        rows = [rows_of(whole, path) for path in paths]
        if "{expert}" not in module:
            np.testing.assert_array_equal(
                by_hand(tensors, module), np.concatenate(rows)
            )
            continue
        for e in range(CFG.experts):
            one = module.format(expert=e)
            np.testing.assert_array_equal(by_hand(tensors, one), rows[0][e])
            if leaves[0].input_scale is not None:
                scale = tensors[f"{one}.input_scale"]
                largest = 448 if leaves[0].format == "fp8" else 448 * 6
                assert scale == np.float32(3 + e) / np.float32(largest)
                assert (scale.shape, scale.dtype) == ((), np.float32)
    assert seen >= 8


def as_float(tree):
    return jax.tree.map(
        lambda w: (
            dataclasses.replace(w, dtype=jnp.dtype("float32"))
            if isinstance(w, QuantArray)
            else w
        ),
        tree,
        is_leaf=lambda w: isinstance(w, QuantArray),
    )


def rows_of(tree, path) -> np.ndarray:
    """A parameter with produced dimensions first, both sides flattened."""
    spec, value = dict(SPECS)[path], np.asarray(axes.leaf(tree, path))
    batch, produced = len(spec.batch), len(spec.produced)
    inputs = int(np.prod(value.shape[batch : value.ndim - produced]))
    return value.reshape(*value.shape[:batch], inputs, -1).swapaxes(-1, -2)


def test_names_dtypes_and_shapes(homes):
    """As in what NVIDIA releases; and as compressed-tensors has them."""
    block = "backbone.layers.{}.mixer."
    inside = 2 * CFG.ssm_groups * (CFG.heads_per_group * CFG.ssm_head_dim)
    rows = inside + CFG.ssm_groups * (2 * CFG.ssm_state + CFG.heads_per_group)
    found = {
        scheme: {
            name: (tensor.dtype.name, tensor.shape)
            for name, tensor in read_shards(homes["mixed", scheme]).items()
        }
        for scheme in ("modelopt", "compressed-tensors")
    }
    fp8 = {
        "weight": ("float8_e4m3fn", (rows, 48)),
        "weight_scale": ("float32", ()),
        "input_scale": ("float32", ()),
    }
    nvfp4 = {
        "weight": ("uint8", (32, 24)),
        "weight_scale": ("float8_e4m3fn", (32, 3)),
        "weight_scale_2": ("float32", ()),
    }
    packed_names = {
        "weight_packed": nvfp4["weight"],
        "weight_scale": nvfp4["weight_scale"],
        "weight_global_scale": ("float32", (1,)),
    }
    fp8_there = {n: (d, s or (1,)) for n, (d, s) in fp8.items()}
    for scheme, module, expected in (
        ("modelopt", block.format(0) + "in_proj.", fp8),
        ("modelopt", block.format(1) + "experts.3.up_proj.", nvfp4),
        ("compressed-tensors", block.format(0) + "in_proj.", fp8_there),
        ("compressed-tensors", block.format(1) + "experts.3.up_proj.", packed_names),
    ):
        tensors = found[scheme]
        assert {
            name.removeprefix(module): what
            for name, what in tensors.items()
            if name.startswith(module)
        } == expected
    kept = block.format(2) + "in_proj.weight"  # before attention
    assert found["modelopt"][kept] == ("bfloat16", (rows, 48))


def excluded(module: str, patterns: list[str]) -> bool:
    """As vLLM decides it: by name, by a part of the name, by a wildcard."""
    split = [
        q for p in patterns for q in ([p[:-1], p[:-1] + ".*"] if p[-1] == "*" else [p])
    ]
    return any(p in module or fnmatch.fnmatch(module, p) for p in split)


@pytest.mark.parametrize("name", RECIPES)
def test_every_module_is_quantized_or_excluded_never_both(homes, trees, name):
    home = homes[name, "modelopt"]
    said, apart = (
        config(home)["quantization_config"],
        config(home, "hf_quant_config.json"),
    )
    inner = apart["quantization"]
    # What vLLM refuses to be without.
    assert (
        apart["producer"]["name"] == "modelopt" and said["quant_method"] == "modelopt"
    )
    assert {"quant_algo", "kv_cache_quant_algo", "exclude_modules"} <= set(inner)
    assert inner["kv_cache_quant_algo"] is None
    algorithm = {
        "fp8": "FP8",
        "nvfp4": "NVFP4",
        "weight_only": "W4A16_NVFP4",
        "mixed": "MIXED_PRECISION",
    }[name]
    assert said["quant_algo"] == inner["quant_algo"] == algorithm
    assert said["ignore"] == inner["exclude_modules"]
    assert ("group_size" in inner) == (name != "fp8")
    tensors = read_shards(home)
    for tensor in tensors:
        module = tensor.removesuffix(".weight")
        if not tensor.endswith(".weight") or "norm" in module or "embeddings" in module:
            continue
        is_packed = f"{module}.weight_scale" in tensors
        # In vLLM the trunk is called `model`, and experts of a block are one module.
        there = module.replace("backbone.", "model.").partition(".experts.")
        there = there[0] + there[1].removesuffix(".")
        patterns = [p.replace("backbone.", "model.") for p in inner["exclude_modules"]]
        assert excluded(there, patterns) != is_packed, module
        if algorithm == "MIXED_PRECISION":
            layers = inner["quantized_layers"]
            assert layers == said["quantized_layers"]
            assert (module in layers) == is_packed
            if is_packed:
                four = tensors[tensor].dtype == np.uint8
                expected = (
                    {"quant_algo": "W4A16_NVFP4", "group_size": 16}
                    if four
                    else {"quant_algo": "FP8"}
                )
                assert layers[module] == expected
    if algorithm == "MIXED_PRECISION":
        targets = [g["targets"] for g in said["config_groups"].values()]
        assert sorted(sum(targets, [])) == sorted(inner["quantized_layers"])


def test_sizes_on_disk(homes, trees):
    for name, params in trees.items():
        arrays = sum(w.size * w.dtype.itemsize for w in jax.tree.leaves(params))
        files = homes[name, "modelopt"].glob("*.safetensors")
        tensors = read_shards(homes[name, "modelopt"])
        stored = sum(tensor.nbytes for tensor in tensors.values())
        assert stored <= arrays  # parts of one tensor hold copies of its scales
        headers = 300 * len(tensors)
        assert sum(file.stat().st_size for file in files) < arrays + headers


# --------------------------------------------------------------- weights without inputs


def test_what_engines_need_is_said(trees, tmp_path):
    bare = jax.tree.map(
        lambda w: (
            dataclasses.replace(w, input_scale=None) if isinstance(w, QuantArray) else w
        ),
        trees["fp8"],
        is_leaf=lambda w: isinstance(w, QuantArray),
    )
    (note,) = ej.to_hf(tmp_path / "a", bare, CFG)
    assert "input scales" in note and "vLLM" in note
    assert ej.to_hf(tmp_path / "b", bare, CFG, format="compressed-tensors") == ()
    groups = config(tmp_path / "b")["quantization_config"]["config_groups"]
    assert [group["input_activations"] for group in groups.values()] == [None]
    assert ej.to_hf(tmp_path / "c", trees["fp8"], CFG) == ()
    (note,) = ej.to_hf(tmp_path / "d", trees["nvfp4"], CFG, format="compressed-tensors")
    assert "transformers" in note and "--dequantize" in note


def test_what_engines_hold_as_one_module_is_in_one_format(tmp_path):
    rules = (("moe/up", "fp8"), ("attention/q", "fp8"))
    recipe = ej.Recipe("nvfp4", rules)
    params = ej.quantize(random_params(), SPECS, CFG, recipe)
    for scheme in ("modelopt", "compressed-tensors"):
        said = ej.to_hf(tmp_path / scheme, params, CFG, format=scheme)
        assert any("up_proj, down_proj" in s and "layers.1.mixer" in s for s in said)
        assert any("q_proj, k_proj, v_proj" in s and "layers.3" in s for s in said)
        assert_same(ej.from_hf(tmp_path / scheme)[0]["layers"][1]["up"].values,
                    params["layers"][1]["up"].values)  # fmt: skip


# ------------------------------------------------------------- plain, and other readers


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_plain_export_is_what_dequantizing_gives(trees, tmp_path, dtype):
    for name, params in trees.items():
        ej.to_hf(tmp_path / name, params, CFG, format="plain", dtype=dtype)
        found, _ = ej.from_hf(tmp_path / name)
        whole = ej.dequantize(as_float(params) if dtype else params)
        want = jax.tree.map(lambda w: w.astype(dtype or w.dtype), whole)
        assert_same(found, want)
        assert "quantization_config" not in config(tmp_path / name)
        assert not (tmp_path / name / "hf_quant_config.json").exists()
        assert config(tmp_path / name)["torch_dtype"] == dtype or "bfloat16"


def test_a_dtype_casts_what_is_not_quantized(homes, trees, tmp_path):
    ej.to_hf(tmp_path / "hf", trees["mixed"], CFG, dtype="float32")
    before = read_shards(homes["mixed", "modelopt"])
    after = read_shards(tmp_path / "hf")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        cast = tensor.dtype.name == "bfloat16"
        assert after[name].dtype == (np.float32 if cast else tensor.dtype), name
        np.testing.assert_array_equal(after[name].read(), tensor.read().astype("f4"))
    found, _ = ej.from_hf(tmp_path / "hf")
    assert found["layers"][0]["z"].dtype == np.float32
    assert config(tmp_path / "hf")["torch_dtype"] == "float32"


def test_heads_that_cross_blocks_are_refused(home):
    """Their blocks run along all heads; ours lie within one."""

    def narrow(said):
        said |= {"mamba_head_dim": 8, "mamba_num_heads": 2 * said["mamba_num_heads"]}

    rewrite(home, narrow, "config.json")
    words = r"hf does not fit .*out_proj.weight: ssm_head_dim 8 would cut a block of 16"
    with pytest.raises(ValueError, match=words):
        open_hf(home)


@pytest.mark.parametrize("powers", [True, False])
def test_compressed_tensors_decompresses_to_our_weights(trees, tmp_path, powers):
    """To the bit; but where a scale has no exact reciprocal, to one rounding of it."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file

    def rounded(leaf):
        if not powers or not isinstance(leaf, QuantArray):
            return leaf
        return dataclasses.replace(leaf, scale=2.0 ** jnp.round(jnp.log2(leaf.scale)))

    params = jax.tree.map(
        rounded, trees["mixed"], is_leaf=lambda w: isinstance(w, QuantArray)
    )
    ej.to_hf(tmp_path / "hf", params, CFG, format="compressed-tensors")
    ej.to_hf(tmp_path / "plain", params, CFG, format="plain")
    tensors = load_file(tmp_path / "hf" / SINGLE)
    plain = load_file(tmp_path / "plain" / SINGLE)
    said = config(tmp_path / "hf")["quantization_config"]
    by_format = {
        group["format"]: QuantizationScheme.model_validate(group)
        for group in said["config_groups"].values()
    }
    assert set(by_format) == {"nvfp4-pack-quantized", "float-quantized"}
    modules = [
        n.removesuffix(".weight_scale") for n in tensors if n.endswith("t_scale")
    ]
    modules = [m for m in modules if f"{m}.weight_scale" in tensors]
    assert len(modules) > 10
    for module in modules:
        parts = {
            name.removeprefix(f"{module}."): value
            for name, value in tensors.items()
            if name.startswith(f"{module}.")
        }
        four = "weight_packed" in parts
        format = "nvfp4-pack-quantized" if four else "float-quantized"
        codec = BaseCompressor.get_value_from_registry(format)
        found = codec.decompress(parts, by_format[format])["weight"].to(torch.bfloat16)
        want = plain[f"{module}.weight"]
        if powers or not four:
            assert torch.equal(found, want), module
        else:
            assert (found == want).float().mean() > 0.999
            torch.testing.assert_close(found, want, rtol=2**-7, atol=0)


def their_model(directory, dtype="float32"):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    model, report = transformers.NemotronHForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind], f"{kind}: {report[kind]}"
    for block in model.model.layers:
        if hasattr(block.mixer, "time_step_limit"):
            block.mixer.time_step_limit = (0.0, float("inf"))
    return model.eval()


def gentle():
    """A parent whose logits are tame, in float32."""
    small = jax.tree.map(lambda w: 0.15 * w.astype(jnp.float32), random_params())
    keep = ("router_bias", "A_log", "dt_bias", "D")
    return axes.map_specs(
        lambda p, s, w: w + (s.init == "ones") if p[-1] not in keep else w, SPECS, small
    )


@pytest.mark.parametrize("format, recipe", [("plain", "nvfp4"), ("plain", "mixed"),
                                            ("compressed-tensors", "fp8")])  # fmt: skip
def test_transformers_computes_what_the_dequantized_model_does(
    tmp_path, format, recipe
):
    torch = pytest.importorskip("torch")
    params = quantized(recipe, gentle())
    if format != "plain":  # or it would round its inputs too
        pytest.importorskip("compressed_tensors")
        params = jax.tree.map(
            lambda w: (
                dataclasses.replace(w, input_scale=None)
                if isinstance(w, QuantArray)
                else w
            ),
            params,
            is_leaf=lambda w: isinstance(w, QuantArray),
        )
    ej.to_hf(tmp_path / "hf", params, CFG, format=format)
    model = their_model(tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(3, CFG.vocab, (2, 11)).astype(np.int32)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens, dtype=torch.long), use_cache=False)
    ours = jax.jit(ej.apply, static_argnums=2)(ej.dequantize(params), tokens, CFG)
    theirs = theirs.logits.numpy()
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5 * scale)


# ------------------------------------------------------- heterogeneous and impossible


def test_padded_widths_of_packed_weights_compute_the_same(trees, tmp_path):
    cfg = dataclasses.replace(CFG, pattern="EE*--")
    specs = ej.param_specs(cfg)
    draw = np.random.default_rng(0)
    params = axes.map_specs(
        lambda path, spec: jnp.asarray(
            draw.normal(size=axes.shape(cfg, specs, path, spec)) * 0.2, jnp.float32
        ),
        specs,
    )
    recipe = ej.Recipe("nvfp4", (("mlp/up", "fp8"), ("mlp/down", "fp8")))
    params = ej.quantize(params, specs, cfg, recipe)
    counts = ej.counts(cfg, expert_ffn=(16, 32), experts=(4, 3), ffn=(32, 64))
    small = ej.slice_params(params, specs, counts)
    small_cfg = ej.slice_config(cfg, counts)
    with pytest.raises(ValueError, match="--uniform"):
        ej.to_hf(tmp_path / "hf", small, small_cfg)
    ej.to_hf(tmp_path / "hf", small, small_cfg, pad_to_uniform=True)
    found, wide = ej.from_hf(tmp_path / "hf")
    up = found["layers"][0]["up"]
    assert (wide.expert_ffn, wide.experts, wide.ffn) == (32, 4, 64)
    assert up.format == "nvfp4" and up.shape == (4, 48, 32)
    tokens = draw.integers(3, cfg.vocab, (2, 7)).astype(np.int32)
    apply = jax.jit(ej.apply, static_argnums=2)
    np.testing.assert_allclose(
        apply(found, tokens, wide), apply(small, tokens, small_cfg), atol=2e-5
    )


def replaced(params, path, **changes):
    leaf = axes.leaf(params, path)
    changed = dataclasses.replace(leaf, **changes)
    return axes.map_specs(lambda p, _, w: changed if p == path else w, SPECS, params)


def test_parts_of_one_tensor_that_disagree_are_refused(trees, tmp_path):
    params, path = trees["mixed"], ("layers", 0, "B")
    leaf = axes.leaf(params, path)
    whole = ej.dequantize(params)
    for wrong, words in (
        (
            {"scale": leaf.scale * 2},
            r"in_proj.weight is one tensor with one scale.*/B ",
        ),
        ({"input_scale": leaf.input_scale * 2}, "with one input_scale.*layers/0/B"),
        ({"input_scale": None}, "in_proj.weight is one tensor, but: .*layers/0/z FP8"),
    ):
        with pytest.raises(ValueError, match=words):
            ej.to_hf(tmp_path / "hf", replaced(params, path, **wrong), CFG)
    plain = axes.map_specs(
        lambda p, _, w: axes.leaf(whole, p) if p == path else w, SPECS, params
    )
    with pytest.raises(ValueError, match="layers/0/B not quantized"):
        ej.to_hf(tmp_path / "hf", plain, CFG)
    training = axes.map_specs(
        lambda p, _, w: FakeQuant(axes.leaf(whole, p), w) if p == path else w,
        SPECS,
        params,
    )
    with pytest.raises(ValueError, match="layers/0/B is a weight in training"):
        ej.to_hf(tmp_path / "hf", training, CFG)
    with pytest.raises(ValueError, match="'modelop'.*did you mean 'modelopt'"):
        ej.to_hf(tmp_path / "hf", params, CFG, format="modelop")
    assert not [*tmp_path.iterdir()]


# ------------------------------------------------------------------ hostile directories


UP = "backbone.layers.1.mixer.experts.2.up_proj"
IN = "backbone.layers.0.mixer.in_proj"


def _tensor(name, value):
    return lambda tensors: tensors.update({name: value(tensors.get(name))})


def _byte(code):
    def change(scales):
        codes = scales.copy().view(np.uint8)
        codes[-1, -1] = code
        return codes.view(E4M3)

    return change


BROKEN = {
    "zero block scale": (_tensor(f"{UP}.weight_scale", _byte(0)), "1 of 96 scales"),
    "NaN block scale": (_tensor(f"{UP}.weight_scale", _byte(0x7F)), "1 of 96 scales"),
    "negative block scale": (_tensor(f"{UP}.weight_scale", _byte(0x88)), "1 of 96"),
    "NaN scale": (
        _tensor(f"{UP}.weight_scale_2", lambda s: s * np.nan),
        "1 of 1 scales",
    ),
    "zero scale": (
        _tensor(f"{IN}.weight_scale", lambda s: s * 0),
        "in_proj.weight_scale",
    ),
    "infinite input": (
        _tensor(f"{IN}.input_scale", lambda s: s + np.inf),
        "input_scale",
    ),
    "negative input": (
        _tensor(f"{IN}.input_scale", lambda s: -s),
        "in_proj.input_scale",
    ),
    "NaN among FP8": (
        _tensor(f"{IN}.weight", lambda w: np.full(w.shape, 0x7F, "u1").view(E4M3)),
        "in_proj.weight: .* not finite",
    ),
    "a dead expert": (
        _tensor(f"{UP}.weight", lambda w: np.full_like(w, 0x80)),
        "up_proj.weight: zero throughout",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_values_of_no_quantized_model_are_listed(home, name):
    change, words = BROKEN[name]
    rewrite(home, change)
    with pytest.raises(ValueError, match=words):
        open_hf(home)
    taken, _ = ej.from_hf(home, allow_nonfinite=True)
    assert isinstance(taken["layers"][1]["up"], QuantArray)


MISFITS = {
    "too few block scales": (
        _tensor(f"{UP}.weight_scale", lambda s: s[:, :-1].copy()),
        r"shape \[32, 2\], expected \[32, 3\]",
    ),
    "too narrow": (_tensor(f"{UP}.weight", lambda w: w[:, :-1].copy()), r"\[32, 23\]"),
    "scales of another dtype": (
        _tensor(f"{UP}.weight_scale", lambda s: s.astype("f4")),
        "float32, expected float8_e4m3fn",
    ),
    "scales of channels": (
        _tensor(f"{IN}.weight_scale", lambda s: np.ones(7, "f4")),
        r"weight_scale: shape \[7\], expected \[\]",
    ),
    "no second scale": (
        lambda tensors: tensors.pop(f"{UP}.weight_scale_2"),
        "up_proj.weight_scale_2: missing",
    ),
    "a scale of what has none": (
        _tensor("lm_head.pre_quant_scale", lambda _: np.ones(4, "f4")),
        "pre_quant_scale': unexpected",
    ),
    "one expert in FP8": (
        _tensor(f"{UP}.weight", lambda w: np.ones((32, 48), E4M3)),
        r"shape \[32, 48\], expected \[32, 24\]",
    ),
    "integers": (
        _tensor("backbone.layers.4.mixer.down_proj.weight", lambda w: w.astype("i1")),
        "int8; quantized weights cannot be taken over",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_tensors_that_do_not_fit_are_listed(home, name):
    change, words = MISFITS[name]
    rewrite(home, change)
    with pytest.raises(ValueError, match=words):
        open_hf(home, allow_nonfinite=True)


def _said(**changes):
    return lambda config: config["quantization_config"].update(changes)


LIES = {
    "another method": (_said(quant_method="gptq"), "quant_method 'gptq', known"),
    "another algorithm": (
        _said(quant_algo="FP8_PB_WO"),
        "quant_algo 'FP8_PB_WO', known",
    ),
    "no algorithm": (_said(quant_algo=None), "quant_algo None"),
    "all in FP8": (_said(quant_algo="FP8"), "stored in nvfp4, but said to be fp8"),
    "one in FP8": (
        _said(quantized_layers={IN: {"quant_algo": "NVFP4"}}),
        "in_proj.weight: stored in fp8, but said to be nvfp4",
    ),
    "blocks of 32": (_said(group_size=32), "group_size 32, only 16"),
    "blocks of text": (_said(group_size="16"), "group_size '16'"),
    "layers are a list": (_said(quantized_layers=[1]), "quantized_layers is"),
    "layers are numbers": (_said(quantized_layers={"x": 1}), "expected objects"),
    "a number": (
        lambda config: config.update(quantization_config=3),
        "expected an obj",
    ),
    "compressed otherwise": (
        _said(quant_method="compressed-tensors"),
        "quantization_con",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_what_is_said_must_agree_with_the_tensors(home, name):
    change, words = LIES[name]
    rewrite(home, change, "config.json")
    with pytest.raises(ValueError, match=words):
        open_hf(home)


def test_nothing_said_is_refused_and_either_file_will_do(home, trees):
    drop = lambda config: config.pop("quantization_config")
    rewrite(home, drop, "config.json")
    assert_same(ej.from_hf(home)[0], trees["mixed"])
    (home / "hf_quant_config.json").write_text('{"quantization": 3}')
    with pytest.raises(ValueError, match=r"hf_quant_config\.json: expected an object"):
        open_hf(home)
    (home / "hf_quant_config.json").unlink()
    (home / "hf_quant_config.json").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="leads outside"):
        open_hf(home)
    (home / "hf_quant_config.json").unlink()
    with pytest.raises(ValueError, match="are quantized; nothing says how"):
        open_hf(home)


def test_what_says_to_be_quantized_is(tmp_path, home):
    ej.to_hf(tmp_path / "plain", random_params(), CFG)
    said = config(home)["quantization_config"]
    rewrite(
        tmp_path / "plain", lambda c: c.update(quantization_config=said), "config.json"
    )
    with pytest.raises(ValueError, match="said to be quantized, but no weight is"):
        open_hf(tmp_path / "plain")


def test_as_nvidia_releases_it(home, trees):
    """Scales of the KV cache, numbers in a dimension of their own, experts as one."""

    def change(tensors):
        for name in [n for n in tensors if n.endswith("_scale_2")]:
            tensors[name] = tensors[name].reshape(1)
        for part in "kv":
            name = f"backbone.layers.3.mixer.{part}_proj.{part}_scale"
            tensors[name] = np.float32(0.5) * np.ones((), "f4")

    def say(config):
        said = config["quantization_config"]
        said["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
        layers = said["quantized_layers"]
        experts = [name for name in layers if ".experts." in name]
        for name in experts:
            said_once = layers.pop(name)
        layers["backbone.layers.1.mixer.experts"] = said_once

    rewrite(home, change)
    rewrite(home, say, "config.json")
    opened = open_hf(home)
    assert any("2 scales of the KV cache" in note for note in opened.notes)
    assert any("quantization of the KV cache" in note for note in opened.notes)
    with pytest.warns(UserWarning, match="KV cache"):
        assert_same(ej.from_hf(home)[0], trees["mixed"])


# --------------------------------------------------------------------- the command line


def test_commands_move_quantized_checkpoints(homes, tmp_path, capsys):
    nested = tmp_path / "nested"
    source = homes["mixed", "compressed-tensors"]
    assert main(["import", str(source), str(nested)]) == 0
    assert main(["inspect", str(nested)]) == 0
    said = capsys.readouterr().out
    assert "nvfp4, 4." in said and "bits a weight" in said
    for flags, scheme in (
        ((), "modelopt"),
        (("--format", "compressed-tensors"), "compressed-tensors"),
        (("--dequantize",), None),
    ):
        out = tmp_path / "out"
        assert main(["export", str(nested), str(out), "--force", *flags]) == 0
        said = config(out).get("quantization_config", {}).get("quant_method")
        assert said == scheme
        capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["export", str(nested), str(out), "--dequantize", "--format", "modelopt"])
