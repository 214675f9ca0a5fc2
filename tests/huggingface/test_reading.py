"""Weights of strangers: all there, all of the right shape and sane, or refused by name.

What `to_hf` writes is what is broken here, tensor by tensor, with the real library.
"""

import contextlib
import dataclasses
import json
import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import elastic_jax as ej
from elastic_jax import axes
from elastic_jax.huggingface import open_hf
from elastic_jax.huggingface.names import Layout, Table
from elastic_jax.huggingface.shards import INDEX, SINGLE, read_shards

BF16 = np.dtype(ml_dtypes.bfloat16)
HALVES = {"bfloat16": BF16, "float16": np.dtype("f2"), "float32": np.dtype("f4")}
CFG = dataclasses.replace(
    ej.presets.tiny("ME*-"),
    vocab=16,
    embed=16,
    heads_per_group=2,
    ssm_head_dim=4,
    ssm_state=4,
    head_dim=4,
    experts=4,
    expert_ffn=16,
    shared_ffn=16,
    ffn=16,
)
GATE = "backbone.layers.1.mixer.gate.e_score_correction_bias"
EXPERT = "backbone.layers.1.mixer.experts.2.up_proj.weight"


def random_params(cfg, dtype=np.float32, seed: int = 0):
    """Arrays of `dtype`; the correction bias is float32, as it always is."""
    draw, specs = np.random.default_rng(seed), ej.param_specs(cfg)

    def leaf(path, spec):
        value = draw.normal(size=axes.shape(cfg, specs, path, spec))
        return value.astype("f4" if path[-1] == "router_bias" else dtype)

    return axes.map_specs(leaf, specs)


def assert_same(have, want):
    """The same tree to the bit."""
    assert jax.tree.structure(have) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def params():
    return random_params(CFG)


@pytest.fixture(scope="module")
def tensors(params, tmp_path_factory) -> dict[str, np.ndarray]:
    """All tensors of the model by their names on disk."""
    home = tmp_path_factory.mktemp("tensors") / "model"
    ej.to_hf(home, params, CFG)
    return safetensors.numpy.load_file(home / SINGLE)


@pytest.fixture
def home(tmp_path, params) -> Path:
    ej.to_hf(tmp_path / "model", params, CFG)
    return tmp_path / "model"


@contextlib.contextmanager
def refused(home: Path, *words: str, **options):
    """Whatever is written within, `from_hf` refuses, with these words."""
    yield
    with pytest.raises(ValueError) as error:
        ej.from_hf(home, **options)
    assert str(home) in str(error.value)
    for word in words:
        assert word in str(error.value)


def write(home: Path, tensors: dict[str, np.ndarray], *, shards: int = 1) -> None:
    """Weights by the real library, in one file or in shards."""
    for file in home.glob("model*"):
        file.unlink()
    if shards == 1:
        safetensors.numpy.save_file(tensors, home / SINGLE)
        return
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict([*tensors.items()][i::shards])
        safetensors.numpy.save_file(part, home / file)
        where |= dict.fromkeys(part, file)
    (home / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


# ------------------------------------------------------------------------- exactly

PATTERNS = ["M", "*", "E", "-", "ME*-", "EM-*EM", "*-*-", "MMEE"]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_was_written_is_read_to_the_bit(pattern, dtype, tmp_path):
    cfg = dataclasses.replace(CFG, pattern=pattern)
    params = random_params(cfg, HALVES[dtype], seed=len(pattern))
    ej.to_hf(tmp_path / "model", params, cfg, shard_bytes=1000)
    assert (tmp_path / "model" / INDEX).exists()
    back, read = ej.from_hf(tmp_path / "model")
    assert_same(back, params)
    assert read.pattern == pattern and ej.param_specs(read) == ej.param_specs(cfg)
    said = json.loads((tmp_path / "model" / "config.json").read_bytes())
    assert said["torch_dtype"] == dtype


def test_every_bit_pattern_survives(home, tensors):
    """All values of 16 bits that are finite, negative zero and subnormal ones too."""
    for dtype in (BF16, np.dtype("f2")):
        bits = np.arange(2**16, dtype=np.uint16)
        exponent = np.uint16(0x7F80 if dtype == BF16 else 0x7C00)
        each = bits[bits & exponent != exponent].view(dtype)
        cfg = dataclasses.replace(CFG, vocab=len(each) // 16)
        params = random_params(cfg, dtype)
        params["embedding"] = each[: cfg.vocab * 16].reshape(cfg.vocab, 16)
        ej.to_hf(home, params, cfg, overwrite=True)
        assert_same(ej.from_hf(home)[0], params)


def test_mixed_dtypes_are_kept(home, tensors, params):
    """Experts are one array here: of the dtype that holds them all."""
    mixed = dict(tensors)
    mixed["backbone.embeddings.weight"] = tensors["backbone.embeddings.weight"].astype(
        BF16
    )
    mixed["lm_head.weight"] = tensors["lm_head.weight"].astype("f2")
    mixed[EXPERT] = tensors[EXPERT].astype(BF16)
    write(home, mixed, shards=3)
    back, _ = ej.from_hf(home)
    assert (back["embedding"].dtype, back["lm_head"].dtype) == (BF16, np.float16)
    want = np.array(params["layers"][1]["up"])
    want[2] = want[2].astype(BF16)
    np.testing.assert_array_equal(back["layers"][1]["up"], want)

    for name in tensors:
        if ".experts.0." in name:
            mixed[name] = tensors[name].astype("f2")
        elif ".experts." in name:
            mixed[name] = tensors[name].astype(BF16)
    write(home, mixed)
    back, _ = ej.from_hf(home)
    assert back["layers"][1]["up"].dtype == np.float32
    for i, kind in enumerate(["f2", BF16, BF16, BF16]):
        want = params["layers"][1]["up"][i].astype(kind).astype("f4")
        np.testing.assert_array_equal(back["layers"][1]["up"][i], want)


def test_parameters_that_share_a_tensor_are_not_narrowed(tmp_path, params):
    block = params["layers"][0]
    mixed = {**block, "z": block["z"].astype(BF16), "x": block["x"].astype("f2")}
    ej.to_hf(tmp_path / "m", {**params, "layers": (mixed, *params["layers"][1:])}, CFG)
    back, _ = ej.from_hf(tmp_path / "m")
    for name, value in mixed.items():
        have = np.asarray(back["layers"][0][name])
        np.testing.assert_array_equal(have, value.astype("f4"))


def test_float64_is_not_narrowed_silently(home, tensors):
    wide = {**tensors, "lm_head.weight": tensors["lm_head.weight"].astype("f8")}
    write(home, wide)
    with pytest.raises(ValueError, match="lm_head is float64.*jax_enable_x64"):
        ej.from_hf(home)
    assert open_hf(home).params["lm_head"].read().dtype == np.float64


def in_memory(tensors: dict[str, np.ndarray], *, stacked=True) -> dict[str, np.ndarray]:
    """The names that transformers 5 has in memory: experts of a block as one tensor."""
    found, experts = {}, {}
    for name, value in tensors.items():
        name = name.replace("backbone.", "model.")
        head, among, tail = name.partition(".experts.")
        if among and stacked:
            number, _, kind = tail.partition(".")
            kind = kind.removesuffix(".weight")
            experts.setdefault(f"{head}.experts.{kind}", {})[int(number)] = value
        else:
            found[name] = value
    return found | {
        name: np.stack([each[i] for i in sorted(each)])
        for name, each in experts.items()
    }


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("stacked", [True, False])
def test_the_layout_in_memory_of_transformers(home, tensors, params, shards, stacked):
    write(home, in_memory(tensors, stacked=stacked), shards=shards)
    back, cfg = ej.from_hf(home)
    assert_same(back, params)


def test_layouts_do_not_mix(home, tensors):
    mixed = dict(tensors)
    mixed["model.norm_f.weight"] = mixed.pop("backbone.norm_f.weight")
    with refused(home, "backbone.layers.0.norm.weight': unexpected", "model.layers.0"):
        write(home, mixed)
    both = tensors | in_memory(tensors)
    with refused(home, "unexpected"):
        write(home, both)


# ------------------------------------------------------------------ what is not there


def test_every_tensor_is_missed(home, tensors):
    for name in tensors:
        left = {n: value for n, value in tensors.items() if n != name}
        with refused(home, f"{name}: missing, expected shape {[*tensors[name].shape]}"):
            write(home, left)


def test_every_tensor_that_is_doubled_is_named(home, tensors):
    """In two shards; the index can place it in one only."""
    write(home, tensors, shards=2)
    first, second = sorted(home.glob("*.safetensors"))
    one, two = (safetensors.numpy.load_file(file) for file in (first, second))
    for name in tensors:
        if name in one:
            with refused(home, f"{name!r} is in {second.name} and in another shard"):
                safetensors.numpy.save_file({**two, name: one[name]}, second)


def test_every_tensor_of_another_shape_is_named(home, tensors):
    for name, value in tensors.items():
        longer = np.concatenate([value, value[:1]])
        with refused(home, f"{name}: shape {[*longer.shape]}, expected"):
            write(home, {**tensors, name: longer})
        other = value.T if value.ndim == 2 and len({*value.shape}) > 1 else value[None]
        with refused(home, f"{name}: shape {[*other.shape]}, expected"):
            write(home, {**tensors, name: np.ascontiguousarray(other)})


STRANGE = {
    "a parent": "backbone.layers.4.norm.weight",
    "an expert": "backbone.layers.1.mixer.experts.4.up_proj.weight",
    "a bias": "backbone.layers.2.mixer.q_proj.bias",
    "a scale": "backbone.layers.2.mixer.q_proj.weight_scale",
    "slashes": "../../etc/passwd",
    "dots": "backbone/../lm_head.weight",
    "nothing": "",
    "a dot": ".",
    "NUL": "lm_head.weight\x00",
    "newline": "lm_head.weight\n",
    "space": "lm_head.weight ",
    "capitals": "LM_head.weight",
    "look-alikes": "lm_h\u0435ad.weight",
    "a joiner": "lm_\u200dhead.weight",
    "right to left": "\u202elm_head.weight",
    "a megabyte": "x" * 10**6,
    "braces": "backbone.layers.1.mixer.experts.{expert}.up_proj.weight",
    "a format": "{0.__class__}",
    "zeros in front": "backbone.layers.01.norm.weight",
    "other digits": "backbone.layers.\u0661.norm.weight",
    "minus": "backbone.layers.-1.norm.weight",
    "mtp without a dot": "mtp_layers.0.weight",
}


@pytest.mark.parametrize("name", STRANGE)
def test_names_that_the_config_has_no_place_for(name, home, tensors):
    strange = STRANGE[name]
    with refused(home, "unexpected; the config has no place for it"):
        write(home, {**tensors, strange: np.ones(2, "f4")})
    kept = {n: value for n, value in tensors.items() if n != "lm_head.weight"}
    with refused(home, "lm_head.weight: missing", ": unexpected"):
        write(home, {**kept, strange: tensors["lm_head.weight"]})
    with pytest.raises(ValueError) as error:
        ej.from_hf(home)
    assert len(str(error.value)) < 1000


def test_everything_that_does_not_fit_is_listed_together(home, tensors):
    broken = dict(tensors)
    broken["backbone.norm_f.bias"] = broken.pop("backbone.norm_f.weight")
    broken["lm_head.weight"] = np.ones((3, 3), "f4")
    broken[EXPERT] = tensors[EXPERT].astype(np.int8)
    with refused(
        home,
        "backbone.norm_f.weight: missing, expected shape [16]",
        "'backbone.norm_f.bias': unexpected",
        "lm_head.weight: shape [3, 3], expected [16, 16]",
        f"{EXPERT}: int8; quantized weights cannot be taken over",
    ):
        write(home, broken, shards=2)
    with refused(home, "and 3 more"):
        write(home, {f"x{i}": np.ones(1, "f4") for i in range(53 - len(tensors))})


def test_a_config_that_asks_for_billions_of_tensors(home):
    """Refused by their number: naming them would take memory and minutes."""
    file = home / "config.json"
    said = json.loads(file.read_bytes())
    pattern = "E" * 1024
    said |= {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    with refused(home, "tensors; there are"):
        file.write_text(json.dumps(said | {"n_routed_experts": 2**24}))


QUANTIZED = ["int8", "uint8", "int32", "float8_e4m3fn", "float8_e5m2", "bool"]


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_quantized_weights_are_refused(dtype, home, tensors):
    for name in (EXPERT, "lm_head.weight", GATE):
        with refused(home, f"{name}: {dtype}; quantized", allow_nonfinite=True):
            write(home, {**tensors, name: np.ones_like(tensors[name]).astype(dtype)})


def test_multi_token_prediction_is_skipped_and_said(home, tensors, params):
    more = {f"mtp.layers.{i}.weight": np.full(2, np.nan, "f4") for i in range(3)}
    more["mtp.scale"] = np.ones(1, np.int8)
    write(home, tensors | more, shards=2)
    with pytest.warns(UserWarning, match="4 tensors of multi-token prediction"):
        back, _ = ej.from_hf(home)
    assert_same(back, params)
    write(home, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ej.from_hf(home)


# ---------------------------------------------------------- values of no trained model


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", HALVES)
def test_values_that_are_not_finite_are_listed_and_may_be_taken(
    dtype, bad, home, tensors
):
    broken = {name: value.astype(HALVES[dtype]) for name, value in tensors.items()}
    broken["lm_head.weight"][3, 1:3] = bad
    broken[EXPERT][0, 0] = bad
    broken[GATE][1] = bad
    words = (
        f"lm_head.weight: 2 of {tensors['lm_head.weight'].size} values are not finite",
        f"{EXPERT}: 1 of",
        f"{GATE}: 1 of 4",
        "allow",
    )
    with refused(home, *words):
        write(home, broken, shards=2)
    with pytest.raises(ValueError) as error:
        ej.from_hf(home)
    assert str(error.value).count("not finite") == 3
    back, _ = ej.from_hf(home, allow_nonfinite=True)
    have = np.asarray(back["lm_head"])[1:3, 3].astype("f4")
    np.testing.assert_array_equal(have, np.full(2, bad, "f4"))


def test_every_tensor_is_looked_at(home, tensors):
    for name, value in tensors.items():
        broken = value.copy()
        broken.reshape(-1)[-1] = np.nan
        with refused(home, f"{name}: 1 of {value.size} values are not finite"):
            write(home, {**tensors, name: broken})


@pytest.mark.parametrize("memory", [False, True])
def test_dead_experts_are_listed_unless_none_may_choose_them(memory, home, tensors):
    dead = dict(tensors)
    for kind in ("up_proj", "down_proj"):
        name = f"backbone.layers.1.mixer.experts.2.{kind}.weight"
        dead[name] = np.zeros_like(tensors[name])
    kept = in_memory if memory else dict
    words = [f"{EXPERT}: zero throughout", "experts.2.down_proj.weight: zero"]
    if memory:
        words = ["experts.up_proj: experts [2] are zero", "experts.down_proj: experts"]
    with refused(home, *words):
        write(home, kept(dead))
    ej.from_hf(home, allow_nonfinite=True)

    for bias, accepted in [(-1e9, True), (-1e8, True), (-9e7, False), (1e9, False)]:
        off = tensors[GATE].copy()
        off[2] = bias
        write(home, kept({**dead, GATE: off}))
        if accepted:
            assert not np.asarray(ej.from_hf(home)[0]["layers"][1]["up"][2]).any()
        else:
            with pytest.raises(ValueError, match="zero"):
                ej.from_hf(home)
        off = np.roll(off, 1)  # another expert is masked, not the dead one
        with refused(home, "zero"):
            write(home, kept({**dead, GATE: off}))


def test_zeros_elsewhere_are_no_fault(home, tensors):
    zero = {
        name: value if ".experts." in name else np.zeros_like(value)
        for name, value in tensors.items()
    }
    write(home, zero)
    ej.from_hf(home)


# ------------------------------------------------------------------------ the folder


def test_nothing_outside_the_folder_is_opened(home, params, watched):
    ej.from_hf(home)  # imports are done
    with watched(home) as opened:
        back, _ = ej.from_hf(home)
    assert {file.name for file in opened} == {"config.json", SINGLE}
    assert_same(back, params)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_files_beside_are_handed_on_unread_and_stay_within(name, home, watched):
    (home / name).write_text("{% for x in range(10**9) %}{% endfor %}")
    with watched(home) as opened:
        files = open_hf(home).files
    assert files[name] == home / name and home / name not in opened
    for target in ("/etc/passwd", "../x", name, "gone"):
        (home / name).unlink()
        (home / name).symlink_to(target)
        with pytest.raises(ValueError, match=name):
            open_hf(home)
    for make in (os.mkfifo, os.mkdir):
        (home / name).unlink(missing_ok=True)
        make(home / name)
        with pytest.raises(ValueError, match="no plain file"):
            open_hf(home)
    (home / name).rmdir()
    (home / name).touch()
    os.truncate(home / name, 2**40)
    with pytest.raises(ValueError, match="at most"):
        open_hf(home)


def test_the_folder_itself(tmp_path, home):
    for path in (tmp_path / "nowhere", home / "config.json"):
        with pytest.raises(ValueError, match="no directory"):
            ej.from_hf(path)
    (tmp_path / "link").symlink_to(home)
    ej.from_hf(tmp_path / "link")  # the user named it
    for name in ("config.json", SINGLE):
        kept = (home / name).read_bytes()
        (home / name).unlink()
        with refused(home, name):
            pass
        (home / name).write_bytes(kept)


def test_weights_that_are_cut_short_after_they_were_checked(home):
    opened = open_hf(home)
    os.truncate(home / SINGLE, (home / SINGLE).stat().st_size - 4)
    with pytest.raises(ValueError, match="cut short"):
        jax.tree.map(np.asarray, opened.params)


def test_names_are_those_of_the_table(tensors):
    """Every tensor is expected once, and its shape agrees with what is on disk."""
    expected = Table(CFG, Layout("backbone.", stacked=False)).expected()
    assert expected == {name: value.shape for name, value in tensors.items()}


def test_reading_shows_what_the_library_shows(home, tensors):
    for name, tensor in read_shards(home).items():
        np.testing.assert_array_equal(tensor.read(), tensors[name])
        assert jnp.dtype(tensor.dtype) == tensors[name].dtype
