"""Against transformers: one model, two implementations, the same logits and tokens.

transformers clamps dt from below in its prefill (`time_step_min`), not in its decoding,
and NVIDIA's own code does neither; so here its limit is opened, or its full forward and
its cached one would already differ from each other. Everything is float32.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import convert
from elastic_jax.axes import AXES, blocks_with

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("golden", HERE / "test_golden.py")
golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden)
random_params = golden.params

BOUND = 2e-5  # of the largest logit

# name -> our configuration: patterns, groups and head counts of both generations.
TINY = ej.presets.tiny
MODELS = {
    "nano_v3": TINY("MEM*ME"),
    "mixed": TINY("ME-*M"),
    "dense_nano_v2": TINY("M-M*-"),
    "no_mamba": dataclasses.replace(TINY("*E*"), q_per_kv=4, kv_heads=1),
    "one_group": dataclasses.replace(TINY("M*E"), ssm_groups=1, heads_per_group=6),
    "many_groups": dataclasses.replace(TINY("M*ME"), ssm_groups=4, heads_per_group=2),
    "expert_groups": dataclasses.replace(
        TINY("E*E"), experts=12, n_group=4, topk_group=2, top_k=3
    ),
}


def loaded(directory):
    """transformers' model of a directory; fails on any key left over or missing."""
    model, report = transformers.NemotronHForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind], f"{kind}: {report[kind]}"
    for block in model.model.layers:
        if hasattr(block.mixer, "time_step_limit"):
            block.mixer.time_step_limit = (0.0, float("inf"))
    return model.eval()


def their_logits(model, tokens, mask=None) -> np.ndarray:
    with torch.no_grad():
        given = {} if mask is None else {"attention_mask": torch.tensor(mask)}
        tokens = torch.tensor(np.asarray(tokens), dtype=torch.long)
        return model(tokens, use_cache=False, **given).logits.numpy()


def assert_close(ours, theirs, bound=BOUND):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=bound * scale)


apply = functools.partial(jax.jit, static_argnums=2)(ej.apply)


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A model of ours, and transformers' of what we wrote."""
    cfg = MODELS[request.param]
    params = random_params(cfg, seed=len(request.param))
    directory = tmp_path_factory.mktemp("hf") / request.param
    ej.to_hf(directory, params, cfg)
    return params, cfg, loaded(directory)


def random_counts(cfg, draw):
    """Counts on every axis that this format can hold: one for all blocks of a kind."""
    given = {}
    for axis in AXES:
        has = axis == "embed" or blocks_with(cfg.pattern, axis)
        if axis == "layers" or not has or draw.random() < 0.2:
            continue
        full, step = getattr(cfg, axis), AXES[axis].step
        least = cfg.top_k if axis == "experts" else step
        given[axis] = int(draw.choice([*range(least, full, step), full]))
    return ej.counts(cfg, **given)


def some_tokens(cfg, shape, seed=0):
    return np.random.default_rng(seed).integers(3, cfg.vocab, shape).astype(np.int32)


def test_full_forward(pair):
    params, cfg, model = pair
    tokens = some_tokens(cfg, (2, 21))
    assert_close(apply(params, tokens, cfg), their_logits(model, tokens))


def test_their_left_padding_is_our_lengths(pair):
    params, cfg, model = pair
    tokens, lengths = some_tokens(cfg, (3, 17)), np.array([17, 9, 4])
    left, mask = np.zeros_like(tokens), np.zeros(tokens.shape, np.int64)
    for row, n in enumerate(lengths):
        left[row, 17 - n :], mask[row, 17 - n :] = tokens[row, :n], 1
    theirs = their_logits(model, left, mask)
    ours = np.asarray(apply(params, tokens, cfg, lengths=jnp.asarray(lengths)))
    for row, n in enumerate(lengths):
        assert_close(ours[row, :n], theirs[row, 17 - n :])


def test_cached_decoding(pair):
    """Prefill in one call, then token by token, on both sides with their own caches."""
    params, cfg, model = pair
    if "*" not in cfg.pattern:
        pytest.skip("transformers cannot cache a model without attention")
    tokens = some_tokens(cfg, (2, 12), seed=1)
    extend = jax.jit(ej.extend, static_argnums=3)
    cache = ej.init_cache(cfg, 2, 16)
    ours, cache = extend(params, tokens[:, :8], cache, cfg)
    given = torch.tensor(tokens, dtype=torch.long)
    with torch.no_grad():
        out = model(given[:, :8], use_cache=True)
        assert_close(ours, out.logits.numpy())
        for t in range(8, 12):
            ours, cache = extend(params, tokens[:, t : t + 1], cache, cfg)
            out = model(
                given[:, t : t + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            assert_close(ours, out.logits.numpy())


def test_greedy_generation_token_for_token(pair):
    params, cfg, model = pair
    tokens = some_tokens(cfg, (2, 6), seed=2)
    ours = ej.generate(params, tokens, cfg, max_new_tokens=12)
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.ones(2, 6, dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    np.testing.assert_array_equal(ours.tokens, theirs[:, 6:].numpy())


def test_what_transformers_saves_is_read(pair, tmp_path):
    """Their layouts: on disk, and as in memory; sharded and whole."""
    params, cfg, model = pair
    tokens = some_tokens(cfg, (1, 9))
    theirs = their_logits(model, tokens)
    for name, given in {
        "released": {},
        "memory": {"save_original_format": False},
        "sharded": {"max_shard_size": "200KB"},
    }.items():
        model.save_pretrained(tmp_path / name, **given)
        back, read = ej.from_hf(tmp_path / name)
        assert read.pattern == cfg.pattern
        jax.tree.map(np.testing.assert_array_equal, back, params)
        assert_close(apply(back, tokens, read), theirs)


@pytest.mark.parametrize("seed", range(4))
def test_a_submodel_through_every_door(seed, tmp_path):
    """Random counts: masked == sliced == exported from the nested checkpoint."""
    draw = np.random.default_rng(seed)
    cfg = TINY(["MEM*ME", "M*E", "ME-*M", "E*ME"][seed])
    params, counts = random_params(cfg, seed), random_counts(cfg, draw)
    ej.save_nested(tmp_path / "nested", params, cfg, budgets={"cut": counts})
    convert.export_hf(tmp_path / "nested", tmp_path / "hf", "cut")
    tokens = some_tokens(cfg, (2, 11), seed)
    theirs = their_logits(loaded(tmp_path / "hf"), tokens)

    small = ej.slice_params(params, ej.param_specs(cfg), counts)
    assert_close(apply(small, tokens, ej.slice_config(cfg, counts)), theirs)
    masks = ej.masks_from_counts(cfg, counts)
    masked = jax.jit(lambda p, t, m: ej.apply(p, t, cfg, masks=m))
    assert_close(masked(params, tokens, masks), theirs)


def test_depth_is_exported_as_fewer_blocks(tmp_path):
    cfg = TINY("MEM*ME")
    params, keep = random_params(cfg, 3), (1, 1, 0, 1, 0, 1)
    counts = ej.counts(cfg, layers=keep, embed=64)
    small = ej.slice_params(params, ej.param_specs(cfg), counts)
    small_cfg = ej.slice_config(cfg, counts)
    ej.to_hf(tmp_path / "hf", small, small_cfg)
    tokens = some_tokens(cfg, (1, 9))
    model = loaded(tmp_path / "hf")
    assert len(model.model.layers) == 4
    assert_close(apply(small, tokens, small_cfg), their_logits(model, tokens))


def test_widths_that_differ_are_filled_up_exactly(tmp_path):
    """Different counts in every block: padded with zeros, added experts masked off."""
    cfg = dataclasses.replace(TINY("E*-E*-"), n_group=2, topk_group=2)
    params = random_params(cfg, 5)
    counts = ej.counts(
        cfg,
        experts=(6, 4),
        expert_ffn=(16, 64),
        shared_ffn=(32, 16),
        ffn=(48, 112),
        q_per_kv=(1, 2),
    )
    small = ej.slice_params(params, ej.param_specs(cfg), counts)
    small_cfg = ej.slice_config(cfg, counts)
    with pytest.raises(ValueError, match="--uniform"):
        ej.to_hf(tmp_path / "hf", small, small_cfg)
    ej.to_hf(tmp_path / "hf", small, small_cfg, pad_to_uniform=True)
    tokens = some_tokens(cfg, (2, 13))
    theirs = their_logits(loaded(tmp_path / "hf"), tokens)
    assert_close(apply(small, tokens, small_cfg), theirs)
    back, back_cfg = ej.from_hf(tmp_path / "hf")  # masked experts are no dead ones
    assert_close(apply(back, tokens, back_cfg), theirs)


def test_golden_logits_are_those_of_transformers(tmp_path):
    """What `test_golden.py` compares with, where transformers is not installed.

    `WRITE_GOLDEN=1` writes the file anew.
    """
    fresh = {}
    for name, (cfg, seed, tokens) in golden.cases().items():
        ej.to_hf(tmp_path / name, golden.params(cfg, seed), cfg)
        fresh[name] = their_logits(loaded(tmp_path / name), tokens)
    if os.environ.get("WRITE_GOLDEN"):
        np.savez_compressed(golden.FILE, **fresh)
    stored = np.load(golden.FILE)
    assert set(stored) == set(fresh)
    for name, logits in fresh.items():
        assert_close(stored[name], logits, bound=1e-6)
