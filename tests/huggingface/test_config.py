"""config.json of a stranger: a model, or everything that is wrong with it at once."""

import dataclasses
import json
import math
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import elastic_jax as ej
from elastic_jax.huggingface import read_config
from elastic_jax.huggingface.config import CARRIED, FIXED, from_json, to_json

PATTERN = "ME*-M"
CFG = dataclasses.replace(ej.presets.tiny(PATTERN), n_group=2, topk_group=1)
GOOD = to_json(CFG, "bfloat16", {})
# As transformers 5 saves it: other names, no letters, no depth.
NAMED = {
    k: v for k, v in GOOD.items() if k not in ("hybrid_override_pattern", "norm_eps")
}
NAMED |= {
    "layers_block_type": [
        "linear_attention",
        "moe",
        "full_attention",
        "mlp",
        "linear_attention",
    ],
    "time_step_limit": [0.0, {"__float__": "Infinity"}],
    "transformers_version": "5.23.0",
}
del NAMED["num_hidden_layers"]


def changed(**fields) -> dict:
    return {**GOOD, **fields}


def without(*names: str) -> dict:
    return {name: value for name, value in GOOD.items() if name not in names}


# ------------------------------------------------------------------- what is accepted

MODELS = {
    "mixed": CFG,
    "nano": ej.presets.nemotron3_nano(),
    "dense": ej.presets.nemotron_nano_v2(),
    "no mamba": ej.presets.tiny("*E-"),
    "no experts": ej.presets.tiny("M*-"),
    "mamba alone": ej.presets.tiny("M"),
    "other numbers": dataclasses.replace(CFG, norm_eps=1e-6, routed_scaling_factor=1.5),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back(name):
    """All that the blocks it has can tell: sizes of absent blocks have no meaning."""
    cfg = MODELS[name]
    back = from_json(json.loads(json.dumps(to_json(cfg, "bfloat16", {})))).cfg
    assert ej.param_specs(back) == ej.param_specs(cfg)
    named = {dim for _, spec in ej.param_specs(cfg) for dim in spec.dims}
    named |= {"pattern", "norm_eps"}
    if "E" in cfg.pattern:
        named |= {"top_k", "n_group", "topk_group", "routed_scaling_factor"}
        named |= {"expert_ffn", "shared_ffn"}
    for field in dataclasses.fields(cfg):
        if field.name in named:
            assert getattr(back, field.name) == getattr(cfg, field.name), field.name


def test_a_submodel_of_one_width_comes_back():
    cfg = ej.presets.tiny(PATTERN)
    small = ej.slice_config(cfg, ej.counts(cfg, embed=32, experts=4, ffn=48))
    back = from_json(to_json(small, "bfloat16", {})).cfg
    assert (back.embed, back.experts, back.ffn) == (32, 4, 48)


def test_both_spellings_of_the_pattern():
    assert from_json(NAMED).cfg == from_json(GOOD).cfg
    for field in ("layers_block_type", "layer_types"):
        old = {field: ["mamba", "moe", "attention", "mlp", "mamba"]}
        assert from_json({**without("hybrid_override_pattern"), **old}).cfg == CFG
        assert from_json(changed(**old)).cfg == CFG, "several may agree"
    assert from_json(changed(layers_block_type=None, layer_types=None)).cfg == CFG


def test_defaults_are_those_of_transformers():
    names = ("conv_kernel", "n_group", "topk_group", "routed_scaling_factor")
    cfg = from_json(without(*names, "layer_norm_epsilon", "norm_eps")).cfg
    assert (cfg.conv_width, cfg.n_group, cfg.topk_group) == (4, 1, 1)
    assert (cfg.routed_scaling_factor, cfg.norm_eps) == (1.0, 1e-5)
    assert from_json(without(*FIXED)).cfg == CFG
    assert from_json({**without(), **dict.fromkeys(FIXED)}).cfg == CFG
    for name in ("layer_norm_epsilon", "norm_eps", "rms_norm_eps"):
        given = {**without("layer_norm_epsilon", "norm_eps"), name: 1e-6}
        assert from_json(given).cfg.norm_eps == 1e-6


def test_what_matters_to_others_is_carried():
    given = {"bos_token_id": 7, "eos_token_id": [8, 9], "time_step_min": 0.01}
    given |= {"max_position_embeddings": 2**18, "mamba_ssm_cache_dtype": "float16"}
    described = from_json(changed(**given, unheard_of=[1, {"x": None}]))
    assert given.items() <= described.carried.items()
    assert described.carried.keys() <= CARRIED.keys()
    assert given.items() <= to_json(CFG, "bfloat16", described.carried).items()


ODD = {
    "bos_token_id": ["<s>", 1.5, True, [1], {}, 2**80],
    "eos_token_id": [["</s>"], [True], [[1]], [1] * 65, [2**80]],
    "mamba_ssm_cache_dtype": ["../x", "", "os.system", "x" * 10**6, "\ud800", 4],
    "time_step_min": [float("nan"), math.inf, "0.1", 10**400, None],
    "residual_in_fp32": [1, "true", None],
    "rope_theta": ["1e4", [], True],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_values_are_not_carried(name):
    for value in ODD[name]:
        described = from_json(changed(**{name: value}))
        assert name not in described.carried
        if value is not None:
            with pytest.raises(ValueError, match=name):
                to_json(CFG, "bfloat16", {name: value})


def test_a_stranger_cannot_carry_fields_past_us():
    for carried in ({"auto_map": {"AutoModel": "x.Y"}}, {"hidden_size": 3}, [1], "x"):
        with pytest.raises(ValueError, match="carried"):
            to_json(CFG, "bfloat16", carried)


# -------------------------------------------------------------------- what is refused

INT_FIELDS = {
    "vocab_size",
    "hidden_size",
    "n_groups",
    "mamba_num_heads",
    "mamba_head_dim",
    "ssm_state_size",
    "conv_kernel",
    "num_key_value_heads",
    "num_attention_heads",
    "head_dim",
    "n_routed_experts",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "intermediate_size",
}
NO_SIZES = [0, -1, -(2**40), 2**40, 2**70, 10**4000, 8.0, 1e300, math.inf, True, False]
NO_SIZES += ["8", "0x10", "", "8\x00", [8], [], {"value": 8}, {}]


@pytest.mark.parametrize("name", sorted(INT_FIELDS))
def test_no_sizes(name):
    for value in NO_SIZES:
        with pytest.raises(ValueError):
            from_json(changed(**{name: value}))


HOSTILE = {
    "pattern of 10^6 letters": changed(hybrid_override_pattern="M" * 10**6),
    "pattern and depth of 10^6": changed(
        hybrid_override_pattern="M" * 10**6, num_hidden_layers=10**6
    ),
    "pattern of 1025 letters": changed(
        hybrid_override_pattern="M" * 1025, num_hidden_layers=1025
    ),
    "unknown letters": changed(hybrid_override_pattern="ME*-X"),
    "small letters": changed(hybrid_override_pattern="me*-m"),
    "look-alike letters": changed(hybrid_override_pattern="\u041cE*-M"),
    "letters and NUL": changed(hybrid_override_pattern="ME*-\x00"),
    "empty pattern": changed(hybrid_override_pattern=""),
    "pattern is a list": changed(hybrid_override_pattern=[*PATTERN]),
    "pattern is a number": changed(hybrid_override_pattern=5),
    "no pattern": without("hybrid_override_pattern"),
    "pattern null": changed(hybrid_override_pattern=None),
    "patterns disagree": changed(layers_block_type=["mamba"] * 5),
    "names disagree": {
        **NAMED,
        "layer_types": ["mamba", "moe", "attention", "mlp", "mlp"],
    },
    "unknown kind of block": {**NAMED, "layers_block_type": ["mamba", "mamba3"]},
    "kinds are numbers": {**NAMED, "layers_block_type": [1, 2]},
    "kinds are lists": {**NAMED, "layers_block_type": [["mamba"]]},
    "kinds are text": {**NAMED, "layers_block_type": "mamba"},
    "no blocks": {**NAMED, "layers_block_type": []},
    "10^6 kinds": {**NAMED, "layers_block_type": ["mamba"] * 10**6},
    "depth disagrees": changed(num_hidden_layers=6),
    "depth is text": changed(num_hidden_layers="5"),
    "depth is a float": changed(num_hidden_layers=5.0),
    "depth is true": changed(hybrid_override_pattern="M", num_hidden_layers=True),
    "depth of 2^40": changed(num_hidden_layers=2**40),
    "mamba heads indivisible": changed(mamba_num_heads=7),
    "query heads indivisible": changed(num_attention_heads=5),
    "fewer query than key heads": changed(num_attention_heads=1),
    "more experts chosen than there are": changed(num_experts_per_tok=9),
    "expert groups indivisible": changed(n_group=3),
    "more groups than there are": changed(topk_group=3),
    "eps NaN": changed(norm_eps=math.nan, layer_norm_epsilon=math.nan),
    "eps infinite": changed(norm_eps=math.inf, layer_norm_epsilon=math.inf),
    "eps 0": changed(norm_eps=0, layer_norm_epsilon=0),
    "eps negative": changed(norm_eps=-1e-5, layer_norm_epsilon=-1e-5),
    "eps too small": changed(norm_eps=1e-60, layer_norm_epsilon=1e-60),
    "eps too large": changed(norm_eps=1e60, layer_norm_epsilon=1e60),
    "eps of 400 digits": changed(norm_eps=10**400, layer_norm_epsilon=10**400),
    "eps is text": changed(norm_eps="1e-5", layer_norm_epsilon="1e-5"),
    "eps is true": changed(norm_eps=True, layer_norm_epsilon=True),
    "eps is a list": changed(norm_eps=[1e-5], layer_norm_epsilon=[1e-5]),
    "eps differ": changed(norm_eps=1e-6),
    "factor NaN": changed(routed_scaling_factor=math.nan),
    "factor 0": changed(routed_scaling_factor=0),
    "factor null": changed(routed_scaling_factor=None),
    "factor of 400 digits": changed(routed_scaling_factor=10**400),
    "factor is text": changed(routed_scaling_factor="2.5"),
    "factor is long text": changed(routed_scaling_factor="2" * 10**6),
    "another model": changed(model_type="llama"),
    "model is a list": changed(model_type=["nemotron_h"]),
    "tied embeddings": changed(tie_word_embeddings=True),
    "tied by 1": changed(tie_word_embeddings=1),
    "attention bias": changed(attention_bias=True),
    "bias": changed(use_bias=True),
    "mamba bias": changed(mamba_proj_bias=True),
    "mlp bias": changed(mlp_bias=True),
    "no bias by 0": changed(mlp_bias=0),
    "no convolution bias": changed(use_conv_bias=False),
    "another activation": changed(mlp_hidden_act="silu"),
    "activation is code": changed(mlp_hidden_act="__import__('os').system('x')"),
    "another mamba activation": changed(mamba_hidden_act="gelu"),
    "gates not normalised": changed(norm_topk_prob=False),
    "latent experts": changed(moe_latent_size=1024),
    "quantized": changed(quantization_config={"quant_method": "fp8"}),
    "quantized, empty": changed(quantization_config={}),
    "compressed": changed(compression_config={"format": "nvfp4"}),
    "shared experts are text": changed(n_shared_experts="1"),
    "no shared expert": changed(n_shared_experts=0),
    "code elsewhere": changed(auto_map={"AutoModel": "evil/repository--model.Model"}),
    "code above": changed(auto_map={"AutoModel": "../model.Model"}),
    "code by address": changed(auto_map={"AutoModel": "https://evil.org/m.Model"}),
    "code is text": changed(auto_map="evil/repository--model.Model"),
    "code is a list": changed(auto_map={"AutoTokenizer": ["a.B", None]}),
    "address": changed(_name_or_path="https://example.org/model"),
    "address in an unknown field": changed(adapter="s3://bucket/adapter"),
    "address of a file": changed(tokenizer_class="file:///etc/passwd"),
    "a list": [GOOD],
    "text": json.dumps(GOOD),
    "null": None,
    "nothing": {},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_are_refused(name):
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(ValueError) as refused:
        from_json(HOSTILE[name])
    assert time.perf_counter() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert len(str(refused.value)) < 3000


@pytest.mark.parametrize("depth", [10, 700, 900, 10**5])
def test_depth_is_no_way_around(depth):
    for closing in (list, dict):
        deep = closing()
        for _ in range(depth):
            deep = [deep] if closing is list else {"a": deep}
        for name in [*INT_FIELDS, *FIXED, "norm_eps", "auto_map", "eos_token_id"]:
            given = changed(**{name: deep})
            if name == "eos_token_id":
                assert name not in from_json(given).carried
                continue
            with pytest.raises(ValueError, match=name):
                from_json(given)
        while deep:  # freed level by level
            deep = deep[0] if closing is list else deep["a"]


def test_all_problems_are_said_at_once():
    with pytest.raises(ValueError) as refused:
        from_json(
            changed(
                model_type="llama",
                tie_word_embeddings=True,
                moe_latent_size=64,
                quantization_config={"bits": 4},
                auto_map={"AutoModel": "a/b--c.D"},
                homepage="https://example.org",
                vocab_size=2**40,
                hidden_size="96",
                mamba_num_heads=7,
                num_attention_heads=5,
                n_routed_experts=None,
                topk_group=0,
                norm_eps=math.nan,
                layer_norm_epsilon=1e-5,
                routed_scaling_factor=-1,
            )
        )
    said = str(refused.value)
    for words in (
        "model_type: only 'nemotron_h' is known, got 'llama'",
        "tie_word_embeddings",
        "moe_latent_size",
        "quantization_config",
        "auto_map",
        "homepage",
        "vocab",
        "hidden_size: expected a positive int, got '96'",
        "mamba_num_heads 7 is not a multiple of n_groups 2",
        "num_attention_heads 5",
        "n_routed_experts: expected a positive int (mixture",
        "topk_group: expected a positive int",
        "epsilon",
        "routed_scaling_factor",
    ):
        assert words.split("(mixture")[0] in said, words


def test_a_missing_size_is_said_with_the_blocks_that_need_it():
    with pytest.raises(ValueError, match=r"ssm_state_size.*\(.*amba.*it is missing"):
        from_json(without("ssm_state_size"))
    dense = {**GOOD, "hybrid_override_pattern": "-*", "num_hidden_layers": 2}
    for name in ("ssm_state_size", "n_groups", "n_routed_experts", "mamba_num_heads"):
        del dense[name]
    assert from_json(dense).cfg.pattern == "-*"


def test_what_is_dropped_is_said():
    own = {"AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"}
    notes = from_json(
        changed(auto_map=own, num_nextn_predict_layers=2, time_step_limit=[0.01, 1.0])
    ).notes
    assert len(notes) == 3
    for note, words in zip(notes, ("auto_map", "multi-token", "limit"), strict=True):
        assert words in note
    assert not from_json(GOOD).notes and not from_json(NAMED).notes
    assert "auto_map" not in from_json(changed(auto_map=own)).carried


# -------------------------------------------------------------------- it is only data


def write(directory: Path, values) -> Path:
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def test_reading_does_nothing_but_read(tmp_path, watched):
    home = tmp_path / "model"
    home.mkdir()
    (home / "modeling_nemotron_h.py").write_text("raise SystemExit('code ran')")
    own = {"AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"}
    assert read_config(write(home, changed(auto_map=own))) == CFG  # imports are done
    with watched(home) as opened:
        assert read_config(home) == CFG
    assert opened == [home / "config.json"]
    for values in HOSTILE.values():
        write(home, values)
        with watched(home) as opened, pytest.raises(ValueError, match=r"config\.json"):
            read_config(home)
        assert {*opened} <= {home / "config.json"}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"[" * 10**5,
        b'{"a": ' * 10**5,
        b'{"norm_eps": NaN}',
        b'{"norm_eps": -Infinity}',
        b'{"model_type": "nemotron_h", "model_type": "nemotron_h"}',
        b'{"a": {"b": 1, "b": 2}}',
        b'{"vocab_size": ' + b"9" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
        b"{}" * 2,
        b'{"vocab_size": 0x40}',
        b"{'vocab_size': 64}",
        b" " * (2**23 + 1),
    ],
    ids=range(15),
)
def test_what_is_no_strict_json_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_config(tmp_path)


def test_config_json_is_a_file_of_its_folder(tmp_path, watched):
    home = tmp_path / "model"
    with pytest.raises(ValueError, match="no directory"):
        read_config(home)
    home.mkdir()
    write(tmp_path, GOOD)
    for target in ("../config.json", str(tmp_path / "config.json"), "config.json", "x"):
        (home / "config.json").symlink_to(target)
        with watched(home), pytest.raises(ValueError, match=r"config\.json"):
            read_config(home)
        (home / "config.json").unlink()
    (home / "config.json").mkdir()
    with pytest.raises(ValueError, match="no plain file"):
        read_config(home)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 300)
    | st.sampled_from([2**24, 2**24 + 1, 2**63, 10**400, -(10**400)])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["M", "ME*-M", "mamba", "nemotron_h", "a://b", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)
NAMES = sorted({*GOOD, *NAMED, *FIXED, *CARRIED, "layer_types", "auto_map"})
NAMES += ["quantization_config", "n_shared_experts", "num_nextn_predict_layers"]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([GOOD, NAMED]),
    st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), VALUES, max_size=4),
    st.sets(st.sampled_from(NAMES), max_size=2),
)
def test_any_values_give_a_model_or_a_value_error(base, new, dropped):
    given = {name: v for name, v in {**base, **new}.items() if name not in dropped}
    try:
        described = from_json(given)
    except ValueError as error:
        str(error).encode()
        return
    assert isinstance(described.cfg, ej.ModelConfig)
    ej.param_specs(described.cfg)
    again = to_json(described.cfg, "bfloat16", described.carried)
    assert from_json(json.loads(json.dumps(again, allow_nan=False))).cfg.pattern


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_any_value_at_all(value):
    try:
        from_json(value)
    except ValueError as error:
        str(error).encode()
