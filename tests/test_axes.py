"""Arrows, paths and the one tree walk."""

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import elastic_jax as ej
from elastic_jax import axes
from elastic_jax.axes import AXES, CacheSpec, Counts, ParamSpec

SPECS = (
    (("embedding",), ParamSpec("vocab -> embed", init="embedding")),
    (("layers", 0, "up"), ParamSpec("embed -> ffn")),
    (("layers", 1, "up"), ParamSpec("experts : embed -> expert_ffn")),
    (("layers", 1, "bias"), ParamSpec("-> experts", init="zeros")),
    (("layers", 2, "up"), ParamSpec("embed -> ffn")),
)


def test_an_arrow_has_three_parts():
    spec = ParamSpec("experts : embed -> kv_heads head_dim")
    assert spec.batch == ("experts",)
    assert spec.contracted == ("embed",)
    assert spec.produced == ("kv_heads", "head_dim")
    assert spec.dims == ("experts", "embed", "kv_heads", "head_dim")
    assert ParamSpec("-> embed").dims == ("embed",)
    assert CacheSpec("batch length").dims == ("batch", "length")


def test_only_what_multiplies_activations_decays():
    decays = {path: spec.decays for path, spec in SPECS}
    assert decays == {
        ("embedding",): False,
        ("layers", 0, "up"): True,
        ("layers", 1, "up"): True,
        ("layers", 1, "bias"): False,
        ("layers", 2, "up"): True,
    }


def test_specs_stay_hashable_after_their_parts_were_read():
    spec = ParamSpec("embed -> ffn")
    before = hash(spec)
    assert spec.dims and hash(spec) == before
    assert spec == ParamSpec("embed -> ffn") != ParamSpec("embed -> ffn", init="ones")


def test_inner_axes_stand_before_their_owners():
    order = list(AXES)
    for name, axis in AXES.items():
        assert name == axis.name
        for owner in set(axis.owners) & set(AXES):
            assert order.index(name) < order.index(owner)


def test_every_axis_is_a_size_of_the_model_config():
    cfg = ej.presets.tiny()
    assert all(isinstance(getattr(cfg, axis), int) for axis in AXES)
    assert [a for a in AXES if not axes.is_per_layer(a)] == ["embed", "layers"]
    assert not axes.is_per_layer("vocab")


def test_blocks_and_layers_agree():
    assert axes.blocks_with("M*-E-", "ffn") == (2, 4)
    assert axes.blocks_with("M*-E-", "embed") == ()
    assert axes.layers_with(SPECS, "ffn") == (0, 2)
    assert axes.layers_with(SPECS, "experts") == (1,)
    assert axes.layers_with(SPECS, "embed") == (0, 1, 2)
    assert axes.layers_with(SPECS, "vocab") == ()


def test_a_size_may_differ_per_block():
    assert axes.entry(SPECS, ("layers", 2, "up"), "ffn", (8, 4)) == 4
    assert axes.entry(SPECS, ("layers", 2, "up"), "ffn", 8) == 8
    with pytest.raises(ValueError):
        axes.entry(SPECS, ("layers", 1, "up"), "ffn", (8, 4))


def test_shapes_follow_the_arrows():
    cfg = ej.slice_config(
        ej.presets.tiny("-E-"), ej.counts(ej.presets.tiny("-E-"), ffn=(64, 32))
    )
    shapes = {path: axes.shape(cfg, SPECS, path, spec) for path, spec in SPECS}
    assert shapes[("layers", 0, "up")] == (96, 64)
    assert shapes[("layers", 1, "up")] == (8, 96, 64)
    assert shapes[("layers", 2, "up")] == (96, 32)
    cache = CacheSpec("batch length kv_heads")
    assert axes.shape(cfg, (), (), cache, batch=3, length=7) == (3, 7, 2)


def test_nest_keeps_the_index_of_every_block():
    tree = axes.nest({("a",): 1, ("layers", 2, "w"): 3, ("layers", 0, "w"): 2})
    assert tree == {"a": 1, "layers": ({"w": 2}, {}, {"w": 3})}
    assert axes.leaf(tree, ("layers", 2, "w")) == 3
    assert axes.nest({}) == {}


NAMES = st.sampled_from("abc")


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    st.dictionaries(
        st.one_of(
            st.tuples(NAMES),
            st.tuples(st.just("layers"), st.integers(0, 4), NAMES),
        ),
        st.integers(),
    )
)
def test_every_leaf_is_found_where_it_was_put(items):
    tree = axes.nest(items)
    assert {path: axes.leaf(tree, path) for path in items} == items
    assert len(jax.tree.leaves(tree)) == len(items)


def test_the_walk_visits_every_spec_of_several_trees():
    ones = axes.map_specs(lambda path, spec: len(spec.dims), SPECS)
    assert ones["layers"][1] == {"up": 3, "bias": 1}
    twice = axes.map_specs(lambda path, spec, a, b: a + b, SPECS, ones, ones)
    assert twice == jax.tree.map(lambda n: 2 * n, ones)


def test_counts_are_immutable_hashable_and_in_table_order():
    counts = Counts({"embed": 32, "ffn": (16, 32)})
    assert list(counts) == ["ffn", "embed"]
    assert counts == Counts({"ffn": (16, 32), "embed": 32})
    assert counts != Counts({"embed": 32}) and counts != {"embed": 32, "ffn": (16, 32)}
    assert len({counts, Counts({"ffn": (16, 32), "embed": 32})}) == 1
    assert repr(counts) == "Counts(ffn=(16, 32), embed=32)"
    with pytest.raises(TypeError):
        counts["embed"] = 16
    with pytest.raises(KeyError):
        counts["experts"]
    with pytest.raises(ValueError, match="unknown axes .'embd'."):
        Counts({"embd": 32})
