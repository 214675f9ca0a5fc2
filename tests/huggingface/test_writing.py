"""What is written: a config.json for every reader, dtypes, shards, files, a card."""

import importlib.util
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import elastic_jax as ej
from elastic_jax.huggingface.shards import INDEX, read_shards

spec = importlib.util.spec_from_file_location(
    "golden", pathlib.Path(__file__).with_name("test_golden.py")
)
golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden)

# What the converter of llama.cpp and vLLM's model read from a Nemotron-H config.json.
READ = {
    *("architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers"),
    *("hybrid_override_pattern", "layer_norm_epsilon", "norm_eps", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"),
    *("chunk_size", "use_bias", "use_conv_bias", "mlp_bias", "mlp_hidden_act"),
    *("attention_bias", "residual_in_fp32", "mamba_hidden_act", "torch_dtype"),
    *("tie_word_embeddings", "max_position_embeddings", "eos_token_id"),
}
READ_OF_EXPERTS = {
    *("num_experts_per_tok", "n_routed_experts", "n_shared_experts", "n_group"),
    *("moe_intermediate_size", "moe_shared_expert_intermediate_size", "topk_group"),
    *("norm_topk_prob", "routed_scaling_factor"),
}


def written(tmp_path, pattern="ME*", **options):
    cfg = ej.presets.tiny(pattern)
    ej.to_hf(tmp_path / "hf", golden.params(cfg, 0, jnp.bfloat16), cfg, **options)
    return tmp_path / "hf"


def config(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("pattern", ["ME*", "M-*"])
def test_a_config_for_every_reader(pattern, tmp_path):
    found = config(written(tmp_path, pattern))
    assert READ <= set(found)
    # That there are experts is how the converter tells the architectures apart.
    assert (READ_OF_EXPERTS <= set(found)) == ("E" in pattern)
    assert ("num_experts_per_tok" in found) == ("E" in pattern)
    assert found["hybrid_override_pattern"] == pattern
    assert found["num_hidden_layers"] == len(pattern)
    assert found["torch_dtype"] == "bfloat16"
    assert "time_step_limit" not in found  # its default holds an infinity


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
def test_dtypes(dtype, tmp_path):
    """One for all tensors, but the router's correction bias stays float32."""
    directory = written(tmp_path, dtype=dtype)
    expected = np.dtype(jnp.dtype(dtype or "bfloat16"))
    for name, tensor in read_shards(directory).items():
        bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (np.float32 if bias else expected), name
    assert config(directory)["torch_dtype"] == expected.name


@pytest.mark.parametrize("shard_bytes", [1, 50_000, 10**9])
def test_shards_hold_what_fits(shard_bytes, tmp_path):
    directory = written(tmp_path, shard_bytes=shard_bytes)
    files = sorted(directory.glob("*.safetensors"))
    index = directory / INDEX
    assert index.exists() == (len(files) > 1)
    sizes = []
    for file in files:
        with safe_open(file, "np") as shard:
            sizes.append(len(list(shard.keys())))
        assert file.stat().st_size < max(shard_bytes, 200_000) + 20_000
    assert sum(sizes) == len(read_shards(directory))
    if shard_bytes == 1:
        assert set(sizes) == {1}


def test_companions_and_card(tmp_path):
    given = {
        "tokenizer.json": b"\x00not looked into",
        "generation_config.json": b'{"temperature": 1.0}',
        "merges.txt": tmp_path / "merges",
    }
    (tmp_path / "merges").write_bytes(b"a b")
    directory = written(tmp_path, files=given, card="my card")
    assert (directory / "tokenizer.json").read_bytes() == given["tokenizer.json"]
    assert (directory / "merges.txt").read_bytes() == b"a b"
    assert json.loads((directory / "generation_config.json").read_text()) == {
        "temperature": 1.0
    }
    assert (directory / "README.md").read_text() == "my card"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "floating"),
        ({"files": {"../x": b""}}, r"'\.\./x'|\.\./x"),
        ({"files": {"model.bin": b""}}, "model.bin"),
        ({"carried": {"auto_map": {}}}, "auto_map"),
        ({"carried": {"chunk_size": "128"}}, "chunk_size"),
    ],
)
def test_options_that_cannot_be_written_are_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        written(tmp_path, **options)
    assert not (tmp_path / "hf").exists()
