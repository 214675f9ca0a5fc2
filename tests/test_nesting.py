"""Ranking, permuting, slicing and counting, against loops over units.

That the model computes the same before and after is the business of `test_laws.py`.
"""

import dataclasses
import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import axes, nesting
from elastic_jax.axes import AXES, blocks_with

CFG = ej.ModelConfig(
    pattern="ME*-EM",
    vocab=5,
    embed=48,
    ssm_groups=2,
    heads_per_group=3,
    ssm_head_dim=32,
    ssm_state=32,
    kv_heads=2,
    q_per_kv=3,
    head_dim=4,
    experts=6,
    expert_ffn=48,
    shared_ffn=32,
    ffn=56,
    top_k=2,
)
SPECS = ej.param_specs(CFG)
WIDTHS = [axis for axis in AXES if axis != "layers"]
SOME = {"embed": 32, "experts": (3, 5), "expert_ffn": (32, 16), "ffn": 48}


def numbered(specs=SPECS, cfg=CFG):
    """A tree in which every element is its own position."""
    shapes = {path: axes.shape(cfg, specs, path, spec) for path, spec in specs}
    return axes.nest(
        {path: np.arange(np.prod(s)).reshape(s) for path, s in shapes.items()}
    )


def scores(*which):
    rng = np.random.default_rng(0)
    drawn = {}
    for axis in which:
        shape = [getattr(CFG, dim) for dim in (*AXES[axis].owners, axis)]
        blocks = blocks_with(CFG.pattern, axis)
        each = [rng.random(shape).astype(np.float32) for _ in blocks or "x"]
        drawn[axis] = tuple(each) if blocks else each[0]
    return drawn


def test_rank_puts_the_best_first_and_keeps_ties_in_order():
    order = ej.rank({"embed": jnp.array([1.0, 3.0, 3.0, -jnp.inf, 2.0])})["embed"]
    assert order.tolist() == [1, 2, 4, 0, 3]
    assert order.dtype == jnp.int32


def test_rank_stays_inside_owners():
    drawn = scores("expert_ffn", "embed")
    ranks = ej.rank(drawn)
    assert jax.tree.structure(ranks) == jax.tree.structure(drawn)
    for score, order in zip(drawn["expert_ffn"], ranks["expert_ffn"], strict=True):
        for e in range(CFG.experts):
            assert (np.diff(score[e][order[e]]) <= 0).all()


@pytest.mark.parametrize("axis", WIDTHS)
def test_permuting_moves_whole_units(axis):
    params, ranks = numbered(), ej.rank(scores(axis))
    permuted = ej.permute_params(params, SPECS, ranks)
    moved = 0
    for path, spec in SPECS:
        before, after = axes.leaf(params, path), axes.leaf(permuted, path)
        if axis not in spec.dims:
            assert np.array_equal(before, after)
            continue
        moved += 1
        front = [spec.dims.index(d) for d in (*AXES[axis].owners, axis)]
        first = range(len(front))
        before, after = (np.moveaxis(a, front, first) for a in (before, after))
        order = np.asarray(axes.entry(SPECS, path, axis, ranks[axis]))
        for at in np.ndindex(order.shape):
            owners = at[:-1]
            assert np.array_equal(after[at], before[(*owners, order[at])])
    assert moved


def test_an_expert_takes_its_own_neuron_order_along():
    ranks = ej.rank(scores("experts", "expert_ffn"))
    params = numbered()
    permuted = ej.permute_params(params, SPECS, ranks)
    for block, layer in enumerate(blocks_with(CFG.pattern, "experts")):
        who, order = ranks["experts"][block], ranks["expert_ffn"][block]
        before, after = (p["layers"][layer]["up"] for p in (params, permuted))
        for e, original in enumerate(who):
            assert np.array_equal(after[e], before[original][:, order[original]])


def test_permuting_and_ranking_trace():
    every = scores(*WIDTHS)
    params = numbered()
    traced = jax.jit(lambda p, s: ej.permute_params(p, SPECS, ej.rank(s)))
    want = ej.permute_params(params, SPECS, ej.rank(every))
    for a, b in zip(*map(jax.tree.leaves, (want, traced(params, every))), strict=True):
        assert np.array_equal(a, b)


def test_depth_is_ranked_but_never_permuted():
    params = numbered()
    ranks = {"layers": jnp.arange(CFG.layers)[::-1]}
    same = ej.permute_params(params, SPECS, ranks)
    for a, b in zip(*map(jax.tree.leaves, (params, same)), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"embd": np.arange(48)}, "did you mean 'embed'"),
        ({"embed": np.arange(32)}, r"\(32,\), expected \(48,\) for embedding"),
        ({"embed": np.zeros(48, int)}, "embed: no permutation"),
        ({"experts": (np.arange(6),)}, "1 entries for 2 blocks"),
        ({"expert_ffn": (np.arange(48),) * 2}, r"expected \(6, 48\) for layers/1/up"),
    ],
)
def test_wrong_ranks_are_refused(ranks, message):
    with pytest.raises(ValueError, match=message):
        ej.permute_params(numbered(), SPECS, ranks)


def test_broken_scores_are_refused():
    broken = {"embed": np.array([1.0, np.nan]), "expert": np.ones(2)}
    with pytest.raises(ValueError, match="NaN") as error:
        ej.rank(broken)
    assert "did you mean 'experts'" in str(error.value)


def test_a_slice_is_a_prefix_of_the_kept_blocks():
    counts = ej.counts(CFG, **SOME, layers=(1, 0, 1, 1, 1, 0))
    params, small = numbered(), ej.slice_params(numbered(), SPECS, counts)
    kept = [0, 2, 3, 4]
    assert len(small["layers"]) == len(kept)
    for i, layer in enumerate(kept):
        for name, leaf in small["layers"][i].items():
            whole = params["layers"][layer][name]
            assert np.array_equal(leaf, whole[tuple(map(slice, leaf.shape))])
    assert small["embedding"].shape == (5, 32)
    assert small["layers"][3]["up"].shape == (5, 32, 16)  # the second MoE block
    assert small["layers"][2]["up"].shape == (32, 48)


def test_the_sliced_config_describes_the_slice():
    counts = ej.counts(CFG, **SOME, layers=(1, 1, 1, 0, 1, 0), heads_per_group=(1, 2))
    cfg = ej.slice_config(CFG, counts)
    assert (cfg.pattern, cfg.embed, cfg.experts) == ("ME*E", 32, (3, 5))
    assert cfg.heads_per_group == 1  # of the Mamba block that is left
    assert cfg.ffn == 56  # no block has it any more
    small = ej.slice_params(numbered(), SPECS, counts)
    expected = jax.tree.map(np.shape, numbered(ej.param_specs(cfg), cfg))
    assert jax.tree.map(np.shape, small) == expected


def test_full_counts_change_nothing():
    counts = nesting.full_counts(CFG)
    assert set(counts) == set(AXES)
    assert ej.slice_config(CFG, counts) == ej.slice_config(CFG, {}) == CFG
    small = ej.slice_params(numbered(), SPECS, counts)
    assert jax.tree.map(np.shape, small) == jax.tree.map(np.shape, numbered())


def test_cut_experts_are_one_group():
    grouped = dataclasses.replace(CFG, n_group=3, topk_group=3)
    cut = ej.slice_config(grouped, ej.counts(grouped, experts=5))
    assert (cut.experts, cut.n_group, cut.topk_group) == (5, 1, 1)
    assert ej.slice_config(grouped, ej.counts(grouped, embed=16)).n_group == 3

    limited = dataclasses.replace(CFG, n_group=3, topk_group=2)
    with pytest.raises(ValueError, match="topk_group 2 < n_group 3"):
        ej.counts(limited, experts=3)
    assert ej.counts(limited, experts=6)["experts"] == 6


def test_a_cache_is_cut_like_its_model():
    specs = ej.cache_specs(CFG)
    counts = ej.counts(CFG, heads_per_group=(2, 1), layers=(0, 1, 1, 1, 1, 1))
    cache = jax.eval_shape(lambda: ej.init_cache(CFG, 2, 7))
    cut = jax.eval_shape(lambda c: ej.slice_params(c, specs, counts), cache)
    small = jax.eval_shape(lambda: ej.init_cache(ej.slice_config(CFG, counts), 2, 7))
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, small)


def test_counts_of_another_model_are_refused():
    larger = ej.presets.tiny(pattern=CFG.pattern)
    with pytest.raises(ValueError, match="64 of embed asked, 48 held"):
        ej.slice_params(numbered(), SPECS, ej.counts(larger, embed=64))
    other = ej.presets.tiny(pattern="EEE")
    with pytest.raises(ValueError, match="experts: 3 entries for 2 blocks"):
        ej.slice_params(numbered(), SPECS, ej.counts(other, experts=(2, 3, 4)))
    with pytest.raises(ValueError, match="layers: 3 entries"):
        ej.slice_params(numbered(), SPECS, ej.counts(other, layers=(1, 0, 1)))


def test_counts_are_values():
    counts = ej.counts(CFG, ffn=np.int64(32), experts=[4, 4], embed=16)
    assert dict(counts) == {"experts": 4, "ffn": 32, "embed": 16}
    assert counts == ej.counts(CFG, embed=16, experts=4, ffn=32)
    assert hash(counts) == hash(ej.counts(CFG, embed=16, experts=4, ffn=32))
    assert type(counts["ffn"]) is int


def test_a_submodel_can_be_cut_again():
    middle = ej.slice_config(CFG, ej.counts(CFG, experts=(3, 5), embed=32))
    assert ej.counts(middle, experts=(2, 5))["experts"] == (2, 5)
    assert ej.slice_config(middle, ej.counts(middle, experts=3)).experts == 3
    with pytest.raises(ValueError, match="experts in layer 1: 4 is none of 2, 3"):
        ej.counts(middle, experts=4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"embed": 40}, "embed: 40 is none of 16, 32, 48"),
        ({"embed": 64}, "embed: 64 is none of"),
        ({"embed": 0}, "embed: 0 is none of"),
        ({"embed": -16}, "embed: -16 is none of"),
        ({"embed": 32.0}, "embed: expected an int, got 32.0"),
        ({"embed": True}, "embed: expected an int, got True"),
        ({"embed": None}, "embed: expected an int, got None"),
        ({"embed": "32"}, "embed: expected an int, got '32'"),
        ({"embed": (32,)}, "embed: one choice for the whole model"),
        ({"embd": 32}, "unknown axis 'embd'; did you mean 'embed'"),
        ({"kv_heads": 1}, "unknown axis 'kv_heads'"),
        ({"experts": 1}, "experts: 1 is none of 2, 3, 4, 5, 6"),
        ({"experts": (2, 7)}, "experts in layer 4: 7 is none of"),
        ({"experts": (2, 3.0)}, "experts in layer 4: expected an int, got 3.0"),
        ({"experts": (2, 3, 4)}, "experts: 3 counts for the 2 blocks .* layers 1, 4"),
        ({"layers": 3}, "layers: expected a 0 or 1 for each of the 6 .*keep_layers"),
        ({"layers": (1, 0)}, "layers: expected a 0 or 1 for each of the 6"),
        ({"layers": (1, 0, 1, 0, 1, 2)}, "layers: entries are 0 or 1"),
        ({"layers": (True,) * 6}, "layers: entries are 0 or 1"),
        ({"layers": (0,) * 6}, "layers: at least one block must stay"),
    ],
)
def test_wrong_counts_name_axis_layer_and_choices(wrong, message):
    with pytest.raises(ValueError, match=message):
        ej.counts(CFG, **wrong)


def test_a_wrong_count_of_very_many_is_refused_without_a_list_of_them():
    wide = dataclasses.replace(CFG, embed=2**24)
    tracemalloc.start()
    choices = "embed: 40 is none of 16, 32, 48, ..., 16777200, 16777216"
    with pytest.raises(ValueError, match=choices):
        ej.counts(wide, embed=40)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_wrong_counts_are_reported_together():
    with pytest.raises(ValueError) as error:
        ej.counts(CFG, embed=40, ffn=8, q_per_kv=(4,), head=2)
    lines = str(error.value).splitlines()[1:]
    found = {re.match(r"  (unknown axis 'head'|\w+)", line)[1] for line in lines}
    assert found == {"embed", "ffn", "q_per_kv", "unknown axis 'head'"}


def test_axes_that_no_block_has_are_refused():
    with pytest.raises(ValueError, match="ffn: no block of 'M\\*' has this axis"):
        ej.counts(ej.presets.tiny(pattern="M*"), ffn=16)


def test_a_full_size_need_not_be_a_multiple():
    assert CFG.ffn % AXES["ffn"].step
    assert ej.counts(CFG, ffn=56)["ffn"] == 56


def test_keep_layers_keeps_the_best():
    order = jnp.array([4, 0, 2, 5, 1, 3])
    assert ej.keep_layers(order, 3) == (1, 0, 1, 0, 1, 0)
    assert ej.keep_layers({"layers": order}, 6) == (1,) * 6
    assert ej.counts(CFG, layers=ej.keep_layers(order, 1))["layers"][4] == 1
    for n in (0, 7, 2.0):
        with pytest.raises(ValueError, match="expected 1 to 6 blocks"):
            ej.keep_layers(order, n)
    with pytest.raises(ValueError, match="no permutation"):
        ej.keep_layers(jnp.array([0, 0, 1]), 1)


def test_nested_compares_kept_blocks_only():
    large = ej.counts(CFG, embed=32, experts=(3, 5), layers=(1, 1, 1, 1, 1, 0))
    inside = ej.counts(CFG, embed=32, experts=(3, 6), layers=(1, 1, 1, 1, 0, 0))
    assert nesting.nested(CFG, inside, large)
    assert nesting.nested(CFG, large, nesting.full_counts(CFG))
    assert not nesting.nested(CFG, large, inside)
    wider = ej.counts(CFG, embed=48, layers=(1, 0, 0, 0, 0, 0))
    assert not nesting.nested(CFG, wider, large)
    deeper = ej.counts(CFG, embed=16, experts=2, layers=(1, 0, 0, 0, 0, 1))
    assert not nesting.nested(CFG, deeper, large)


def test_resolved_has_an_entry_per_block():
    counts = ej.counts(CFG, experts=(2, 4), embed=16)
    found = nesting.resolved(CFG, counts)
    assert found["experts"] == (2, 4)
    assert found["shared_ffn"] == (32, 32)
    assert found["embed"] == (16,)
    assert found["layers"] == (1,) * 6
