"""Placement on eight virtual devices, and on a mesh that no machine here has."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import elastic_jax as ej
from elastic_jax.sharding import DEFAULT_RULES, batch_sharding

CFG = ej.presets.tiny(pattern="ME*-")
SPECS = ej.param_specs(CFG)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh(
        (2, 2, 2), ("data", "tensor", "expert"), axis_types=(AxisType.Auto,) * 3
    )


def abstract(**sizes):
    names, shape = tuple(sizes), tuple(sizes.values())
    return AbstractMesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def test_parameters_are_split_by_the_names_of_their_dimensions(mesh):
    placed = ej.param_shardings(CFG, SPECS, mesh)
    mamba, moe, attention, mlp = placed["layers"]
    assert placed["embedding"].spec == P("tensor", None)
    assert placed["final_norm"].spec == P(None)
    assert mamba["x"].spec == P(None, "tensor", None, None)
    assert mamba["A_log"].spec == P("tensor", None)
    assert moe["up"].spec == P("expert", None, "tensor")
    assert moe["router"].spec == P(None, "expert")
    assert attention["o"].spec == P("tensor", None, None, None)
    assert mlp["down"].spec == P("tensor", None)


def test_placed_parameters_are_whole_and_split(mesh):
    shapes = jax.eval_shape(lambda: ej.init_params(jax.random.key(0), CFG))
    params = jax.tree.map(lambda s: np.random.default_rng(0).random(s.shape), shapes)
    shardings = ej.param_shardings(CFG, SPECS, mesh)
    assert jax.tree.structure(params) == jax.tree.structure(shardings)
    placed = jax.device_put(params, shardings)
    for a, b in zip(*map(jax.tree.leaves, (params, placed)), strict=True):
        assert np.array_equal(a.astype(b.dtype), b)
    up = placed["layers"][1]["up"]
    assert up.shape == (8, 96, 64)
    assert up.addressable_shards[0].data.shape == (4, 96, 32)


@pytest.mark.parametrize(
    "counts", [{"heads_per_group": 1, "q_per_kv": 1}, {"embed": 16}]
)
def test_a_submodel_divides_like_its_parent(mesh, counts):
    """Groups own the elastic heads, so one head per group still fits two devices."""
    small = ej.slice_config(CFG, ej.counts(CFG, **counts))
    specs = ej.param_specs(small)
    parent = jax.tree.map(lambda s: s.spec, ej.param_shardings(CFG, SPECS, mesh))
    assert parent == jax.tree.map(
        lambda s: s.spec, ej.param_shardings(small, specs, mesh)
    )


def test_the_released_models_fit_eight_way_tensor_or_expert_meshes():
    for cfg, sizes in (
        (ej.presets.nemotron3_nano(), {"data": 2, "tensor": 2, "expert": 32}),
        (ej.presets.nemotron_nano_v2(), {"data": 4, "tensor": 8}),
    ):
        ej.param_shardings(cfg, ej.param_specs(cfg), abstract(**sizes))


def test_a_mesh_axis_that_does_not_exist_is_left_out():
    placed = ej.param_shardings(CFG, SPECS, abstract(data=8))
    specs = jax.tree.leaves(jax.tree.map(lambda s: s.spec, placed))
    assert all(axis is None for spec in specs for axis in spec)


def test_everything_that_does_not_divide_is_listed():
    cfg = dataclasses.replace(CFG, kv_heads=3, experts=7)
    with pytest.raises(ValueError) as error:
        ej.param_shardings(
            cfg, ej.param_specs(cfg), abstract(data=2, tensor=2, expert=2)
        )
    text = str(error.value)
    for name in ("layers/2/q", "layers/2/k", "layers/2/o", "layers/1/router", "1/up"):
        assert name in text
    assert "kv_heads 3 does not divide over the 2 devices of mesh axis 'tensor'" in text
    assert "experts 7 does not divide" in text
    assert "layers/0" not in text


def test_sizes_that_differ_per_block_are_checked_per_block():
    counts = ej.counts(ej.presets.tiny("EE"), experts=(4, 3))
    cfg = ej.slice_config(ej.presets.tiny("EE"), counts)
    with pytest.raises(ValueError, match="layers/1/up") as error:
        ej.param_shardings(cfg, ej.param_specs(cfg), abstract(expert=4))
    assert "layers/0" not in str(error.value)


def test_rules_can_be_replaced(mesh):
    rules = {**DEFAULT_RULES, "embed": "data", "vocab": None}
    placed = ej.param_shardings(CFG, SPECS, mesh, rules)
    assert placed["lm_head"].spec == P("data", None)
    assert placed["layers"][3]["up"].spec == P("data", "tensor")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"expert": "tensor"}, "unknown dimension 'expert'; did you mean 'experts'"),
        ({"embed": "tensor", "ffn": "tensor"}, "layers/3/up .*split 2 times"),
    ],
)
def test_wrong_rules_are_refused(mesh, rules, message):
    with pytest.raises(ValueError, match=message):
        ej.param_shardings(CFG, SPECS, mesh, rules)


def test_rows_are_split_over_the_data_axis(mesh):
    assert batch_sharding(mesh) == NamedSharding(mesh, P("data"))
    tokens = jax.device_put(np.zeros((4, 3), int), batch_sharding(mesh))
    assert tokens.addressable_shards[0].data.shape == (2, 3)
    assert batch_sharding(abstract(tensor=2)).spec == P(None)
