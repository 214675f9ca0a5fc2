"""Configurations: what is accepted, and that everything wrong is said at once."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import elastic_jax as ej
from elastic_jax.config import LARGEST_SIZE, LONGEST_PATTERN, did_you_mean

TINY = ej.presets.tiny()


@pytest.mark.parametrize(
    "cfg",
    [
        TINY,
        ej.presets.nemotron3_nano(),
        ej.presets.nemotron_nano_v2(),
        ej.slice_config(TINY, ej.counts(TINY, experts=(3, 5), embed=16)),
    ],
)
def test_configs_survive_json(cfg):
    again = ej.ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert again == cfg and hash(again) == hash(cfg)


def test_presets_are_the_released_models():
    nano, v2 = ej.presets.nemotron3_nano(), ej.presets.nemotron_nano_v2()
    assert [nano.pattern.count(k) for k in "ME*-"] == [23, 23, 6, 0]
    attention = [i for i, kind in enumerate(nano.pattern) if kind == "*"]
    assert attention == [5, 12, 19, 26, 33, 42]
    assert [v2.pattern.count(k) for k in "ME*-"] == [28, 0, 6, 28]
    assert (nano.layers, v2.layers) == (52, 62)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pattern": ""}, "pattern: expected letters"),
        ({"pattern": 3}, "pattern: expected letters"),
        ({"pattern": "MXE"}, r"pattern: unknown letters \['X'\]"),
        ({"pattern": "M" * (LONGEST_PATTERN + 1)}, "at most 1024"),
        ({"embed": 0}, "embed: expected an int in 1"),
        ({"embed": -96}, "embed: expected an int in 1"),
        ({"embed": LARGEST_SIZE + 1}, "embed: expected an int in 1"),
        ({"embed": 2**40}, "embed: expected an int in 1"),
        ({"embed": 96.0}, "embed: expected an int in 1.*got 96.0"),
        ({"embed": True}, "embed: expected an int in 1.*got True"),
        ({"embed": "96"}, "embed: expected an int in 1.*got '96'"),
        ({"embed": None}, "embed: expected an int in 1.*got None"),
        ({"embed": (96,)}, r"embed: expected one int, got \(96,\)"),
        ({"experts": (8,)}, "experts: 1 sizes for 2 blocks"),
        ({"experts": (8, 1)}, "experts 1 is smaller than top_k 2"),
        ({"expert_ffn": (16, 1.5)}, "expert_ffn: expected an int .*got 1.5"),
        ({"top_k": 9}, "experts 8 is smaller than top_k 9"),
        ({"top_k": 0}, "top_k: expected an int in 1"),
        ({"n_group": 3, "topk_group": 3}, "experts 8 is not a multiple of n_group 3"),
        ({"n_group": 8}, "fewer than 2 in each of n_group 8"),
        ({"n_group": 4, "topk_group": 1, "top_k": 3}, "hold fewer than top_k 3"),
        ({"n_group": 2, "topk_group": 4}, "topk_group 4 is larger than n_group 2"),
        ({"norm_eps": float("nan")}, "norm_eps: expected a positive finite number"),
        ({"norm_eps": 0.0}, "norm_eps: expected a positive finite number"),
        ({"norm_eps": "1e-5"}, "norm_eps: expected a positive finite number"),
        ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor: expected"),
    ],
)
def test_impossible_models_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **wrong)


def test_all_problems_come_together():
    with pytest.raises(ValueError) as error:
        dataclasses.replace(TINY, embed=0, ffn="wide", norm_eps=-1.0, top_k=99)
    for name in ("embed", "ffn", "norm_eps", "top_k 99"):
        assert name in str(error.value)


def test_unknown_and_missing_fields_are_named():
    values = TINY.to_dict()
    values["embeds"] = values.pop("embed")
    with pytest.raises(ValueError, match="unknown field 'embeds'") as error:
        ej.ModelConfig.from_dict(values)
    assert "did you mean 'embed'" in str(error.value)
    assert "missing field 'embed'" in str(error.value)


NAMES = [field.name for field in dataclasses.fields(TINY)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    st.dictionaries(
        st.sampled_from(NAMES) | st.text(max_size=4),
        JSON,
        min_size=1,
        max_size=3,
    )
)
def test_anything_else_is_a_value_error(changes):
    """Data from a file is a model, or one ValueError; never another exception."""
    try:
        cfg = ej.ModelConfig.from_dict(TINY.to_dict() | changes)
    except ValueError as error:
        assert str(error).startswith("invalid ModelConfig")
    else:
        assert hash(cfg) == hash(ej.ModelConfig.from_dict(cfg.to_dict()))


def test_did_you_mean_names_the_nearest_or_all():
    assert did_you_mean("embd", ["embed", "ffn"]) == "; did you mean 'embed'?"
    assert did_you_mean("zzz", ["embed", "ffn"]) == "; expected one of ['embed', 'ffn']"


def elastic(*choices, per_layer=()):
    return ej.ElasticConfig(choices=choices, per_layer=per_layer)


def test_choices_within_the_parent_are_accepted():
    elastic(
        ("embed", (96, 64, 32)),
        ("experts", (8, 5, 2)),
        ("heads_per_group", (4, 1)),
        ("layers", (6, 4)),
        per_layer=("experts",),
    ).validate(TINY)
    odd = dataclasses.replace(TINY, pattern="M-", ffn=100)
    elastic(("ffn", (100, 96))).validate(odd)


@pytest.mark.parametrize(
    ("choices", "per_layer", "message"),
    [
        ([("embd", (96,))], (), "unknown axis 'embd'; did you mean 'embed'"),
        ([("embed", (64, 32))], (), "embed: the first choice must be the full 96"),
        ([("embed", ())], (), "embed: the first choice must be the full 96"),
        ([("embed", (96, 32, 64))], (), "embed: choices must descend"),
        ([("embed", (96, 32, 32))], (), "embed: choices must descend"),
        ([("embed", (96, 40))], (), "embed: choice 40 must be a multiple of 16"),
        ([("embed", (96, 0))], (), "embed: choice 0 must be"),
        ([("embed", (96, -16))], (), "embed: choice -16 must be"),
        ([("embed", (96, 32.0))], (), r"embed: choices must be ints, got \[32.0\]"),
        ([("embed", (96, "32"))], (), r"embed: choices must be ints, got \['32'\]"),
        ([("embed", (96, True))], (), r"embed: choices must be ints, got \[True\]"),
        ([("experts", (8, 1))], (), "experts: choice 1 must be .* at least 2"),
        ([("ffn", (128, 64))], (), "ffn: no block of 'MEM\\*ME' has this axis"),
        ([("embed", (96,)), ("embed", (96,))], (), "'embed' is listed twice"),
        ([("embed", (96, 32))], ("embed",), "embed is one choice for the model"),
        ([("embed", (96, 32))], ("ffn",), "per_layer names 'ffn'"),
    ],
)
def test_wrong_choices_are_refused(choices, per_layer, message):
    with pytest.raises(ValueError, match=message):
        elastic(*choices, per_layer=per_layer).validate(TINY)


def test_experts_are_not_offered_where_groups_are_limited():
    limited = dataclasses.replace(TINY, n_group=4, topk_group=2)
    with pytest.raises(ValueError, match="topk_group 2 < n_group 4"):
        elastic(("experts", (8, 4))).validate(limited)
