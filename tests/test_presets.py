"""The named models: their blocks, their published sizes, what can be cut of them."""

import math
import pathlib

import jax
import pytest

import elastic_jax as ej
from elastic_jax.axes import AXES, blocks_with
from elastic_jax.quantize import formats, table

PRESETS = {
    "tiny": ej.presets.tiny,
    "nemotron3_nano": ej.presets.nemotron3_nano,
    "nemotron_nano_v2": ej.presets.nemotron_nano_v2,
}


def held_params(cfg, path=()):
    """Elements of the arrays that `init_params` would make, none of which exist."""
    tree = jax.eval_shape(lambda: ej.init_params(jax.random.key(0), cfg))
    for step in path:
        tree = tree[step]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_nemotron3_nano_is_the_released_30b():
    """Counts of blocks and parameters, and widths of the tensors in the release."""
    cfg = ej.presets.nemotron3_nano()
    assert (cfg.layers, *map(cfg.pattern.count, "ME*-")) == (52, 23, 23, 6, 0)
    assert [i for i, k in enumerate(cfg.pattern) if k == "*"] == [5, 12, 19, 26, 33, 42]
    inner = cfg.ssm_groups * cfg.heads_per_group * cfg.ssm_head_dim
    conv = inner + 2 * cfg.ssm_groups * cfg.ssm_state
    assert (inner, conv) == (4096, 6144)
    assert inner + conv + cfg.ssm_groups * cfg.heads_per_group == 10304
    assert cfg.kv_heads * cfg.q_per_kv * cfg.head_dim == 4096
    assert cfg.kv_heads * cfg.head_dim == 256
    assert (cfg.experts, cfg.top_k, cfg.expert_ffn, cfg.shared_ffn) == (
        128, 6, 1856, 3712,
    )  # fmt: skip
    assert held_params(cfg) == 31_577_940_288
    by_kind = {k: held_params(cfg, ("layers", cfg.pattern.index(k))) for k in "ME*"}
    assert 23 * by_kind["M"] == 891_132_608
    assert 6 * by_kind["*"] == 140_394_240
    assert 23 * by_kind["E"] == 466_959_616 + 29_374_808_064


@pytest.mark.parametrize(
    ("kept", "total"),
    [
        ({"embed": 2016}, 23_683_657_248),
        ({"embed": 1920, "expert_ffn": 960}, 12_426_658_368),
    ],
)
def test_nemotron3_nano_has_the_released_submodels(kept, total):
    cfg = ej.presets.nemotron3_nano()
    assert held_params(ej.slice_config(cfg, ej.counts(cfg, **kept))) == total


def test_nemotron_nano_v2_is_the_released_12b():
    cfg = ej.presets.nemotron_nano_v2()
    assert (cfg.layers, *map(cfg.pattern.count, "M-*E")) == (62, 28, 28, 6, 0)
    assert cfg.ssm_groups * cfg.heads_per_group == 128
    assert cfg.kv_heads * cfg.q_per_kv == 40
    assert round(held_params(cfg) / 1e9, 2) == 12.31


def test_tiny_is_tiny_and_takes_any_pattern():
    assert held_params(ej.presets.tiny()) < 600_000
    assert set(ej.presets.tiny().pattern) == set("M*E")
    cfg = ej.presets.tiny("*-EM")
    assert cfg.pattern == "*-EM"
    assert {dim for _, spec in ej.param_specs(cfg) for dim in spec.dims} > set(AXES) - {
        "layers"
    }


@pytest.mark.parametrize("name", PRESETS)
def test_every_axis_has_a_size_that_can_be_cut(name):
    """Also the axes of blocks that the pattern does not have."""
    cfg = PRESETS[name]()
    assert cfg == PRESETS[name]() and hash(cfg) == hash(PRESETS[name]())
    for axis, row in AXES.items():
        size = getattr(cfg, axis)
        assert isinstance(size, int) and size >= row.step
        if axis != "layers" and (not row.blocks or blocks_with(cfg.pattern, axis)):
            least = max(row.step, cfg.top_k if axis == "experts" else 1)
            small = ej.slice_config(cfg, ej.counts(cfg, **{axis: least}))
            assert getattr(small, axis) == least


# ---------------------------------------------------------------- published accounting

SUBMODELS = {
    "30B": {},
    "23B": {"embed": 2016},
    "12B": {"embed": 1920, "expert_ffn": 960},
}


def left_in_bf16(cfg):
    """What NVIDIA's NVFP4 release of Nano does not quantize, as a test on paths.

    Embeddings, head, attention, norms, convolutions, the router, scalars per head, and
    the projections of the Mamba block before each attention block.
    """
    before = {i - 1 for i, kind in enumerate(cfg.pattern) if kind == "*"}

    def kept(path):
        if path[0] != "layers":
            return True
        _, block, name = path
        kind = cfg.pattern[block]
        experts = kind == "E" and name in ("up", "down", "shared_up", "shared_down")
        projections = kind == "M" and name in ("z", "x", "B", "C", "dt", "out")
        return not (experts or (projections and block not in before))

    return kept


def test_the_accounting_of_the_readme():
    """Parameters and GiB of Nano v3 and its submodels: what the README prints."""
    cfg = ej.presets.nemotron3_nano()
    specs, kept = ej.param_specs(cfg), left_in_bf16(cfg)
    whole = tuple(item for item in specs if kept(item[0]))
    blocks = tuple(item for item in specs if not kept(item[0]))
    chosen = formats(specs, cfg, ej.Recipe())
    assert set(chosen) == {path for path, _ in specs if not kept(path)}
    rows, separate = {}, 0
    for name, given in SUBMODELS.items():
        counts = ej.counts(cfg, **given)
        cost = ej.cost(specs, cfg, counts=counts)
        rest = ej.cost(whole, cfg, counts=counts).weight_bytes("bf16")
        mixed = {
            p: rest + ej.cost(blocks, cfg, counts=counts).weight_bytes(p)
            for p in ("fp8", "nvfp4")
        }
        for precision, n in mixed.items():  # the recipe that quantizes says the same
            priced = table(specs, cfg, ej.Recipe(precision), counts=counts)
            scales = sum(row["bytes"] for row in priced) - n
            assert 0 < scales < 30_000  # one of 4 bytes for each tensor
        gib = (n / 2**30 for n in (cost.weight_bytes("bf16"), *mixed.values()))
        rows[name] = (cost.total_params, cost.active_params, *(f"{g:.2f}" for g in gib))
        separate += cost.weight_bytes("bf16")
    assert rows == {
        "30B": (31_577_940_288, 3_580_076_352, "58.82", "30.42", "18.00"),
        "23B": (23_683_657_248, 2_685_259_296, "44.11", "22.82", "13.50"),
        "12B": (12_426_658_368, 2_082_619_968, "23.15", "12.30", "7.55"),
    }
    assert f"{separate / 2**30:.1f}" == "126.1"
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    for name, row in rows.items():
        assert f"| {name} | {row[0]:,} | {row[1]:,} | {' | '.join(row[2:])} |" in readme
