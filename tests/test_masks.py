"""Budget masks: what they select, where they act, and what they leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax.masks import (
    elastic,
    extent,
    layer_masks,
    live,
    masks_from_counts,
    prefix_mask,
    stacked_masks,
    switched,
    varies_along_time,
    written,
)

CFG = ej.presets.tiny(pattern="ME*-EM")


def test_a_prefix_mask_keeps_the_first():
    mask = prefix_mask(2, 5)
    assert mask.tolist() == [1, 1, 0, 0, 0]
    assert mask.dtype == jnp.float32


def test_masks_have_the_parents_sizes():
    counts = ej.counts(
        CFG, embed=32, experts=(3, 5), ffn=64, layers=(1, 0, 1, 1, 1, 1)
    )
    masks = masks_from_counts(CFG, counts)
    assert set(masks) == {"embed", "experts", "ffn", "layers"}
    assert masks["embed"].shape == (96,) and masks["embed"].sum() == 32
    assert [(m.shape, int(m.sum())) for m in masks["experts"]] == [((8,), 3), ((8,), 5)]
    assert masks["ffn"].shape == (128,) and masks["ffn"].sum() == 64
    assert masks["layers"].tolist() == [1, 0, 1, 1, 1, 1]
    assert masks_from_counts(CFG) == masks_from_counts(CFG, ej.counts(CFG)) == {}


def test_masks_of_a_submodel_follow_its_sizes():
    small = ej.slice_config(CFG, ej.counts(CFG, experts=(3, 5)))
    masks = masks_from_counts(small, ej.counts(small, experts=2))
    assert [m.tolist() for m in masks["experts"]] == [[1, 1, 0], [1, 1, 0, 0, 0]]


def test_a_block_sees_embed_and_its_own_axes():
    counts = ej.counts(CFG, embed=32, experts=(3, 5), ffn=64, heads_per_group=(1, 2))
    masks = masks_from_counts(CFG, counts) | {"q_per_kv": None}
    seen = [layer_masks(masks, CFG.pattern, i) for i in range(CFG.layers)]
    assert [set(m) for m in seen] == [
        {"embed", "heads_per_group"},
        {"embed", "experts"},
        {"embed"},
        {"embed", "ffn"},
        {"embed", "experts"},
        {"embed", "heads_per_group"},
    ]
    assert [int(seen[i]["experts"].sum()) for i in (1, 4)] == [3, 5]
    assert [int(seen[i]["heads_per_group"].sum()) for i in (0, 5)] == [1, 2]
    assert layer_masks(None, CFG.pattern, 0) == {}


def test_depth_is_no_mask_inside_a_block():
    masks = {"layers": jnp.ones(6), "embed": jnp.ones(96)}
    assert set(layer_masks(masks, CFG.pattern, 0)) == {"embed"}


def test_elastic_multiplies_along_one_dimension():
    value = jnp.ones((2, 3, 4, 5))
    mask = jnp.array([1.0, 0.5, 0.0, 0.0])
    got = elastic(value, {"q_per_kv": mask}, "q_per_kv", dim=-2)
    np.testing.assert_array_equal(got, value * mask[None, None, :, None])
    assert elastic(value, {}, "q_per_kv", dim=-2) is value
    assert elastic(value, {"q_per_kv": None}, "q_per_kv", dim=-2) is value


def test_elastic_keeps_the_dtype_of_activations():
    value = jnp.ones((2, 3, 4), jnp.bfloat16)
    masked = elastic(value, {"ffn": prefix_mask(2, 4)}, "ffn", dim=-1)
    assert masked.dtype == value.dtype


def test_a_mask_may_vary_along_time():
    mask = jnp.stack([jnp.stack([prefix_mask(n, 4) for n in row])
                      for row in ((1, 2, 3), (4, 3, 2))])
    value = jnp.ones((2, 3, 4, 5))
    got = elastic(value, {"q_per_kv": mask}, "q_per_kv", dim=-2)
    np.testing.assert_array_equal(got.sum((-2, -1)), [[5, 10, 15], [20, 15, 10]])
    assert varies_along_time({"q_per_kv": mask})
    assert not varies_along_time({"q_per_kv": mask[0, 0]})
    np.testing.assert_array_equal(
        live({"q_per_kv": mask}, "q_per_kv", 4), [[1, 2, 3], [4, 3, 2]]
    )


def test_masks_of_submodels_are_chosen_along_time():
    """Axes that one leaves whole, and another counts per block, in one tree."""
    budgets = [
        ej.counts(CFG),
        ej.counts(CFG, embed=32, experts=(3, 5)),
        ej.counts(CFG, experts=4, ffn=64, layers=(1, 0, 1, 1, 1, 1)),
    ]
    stacked = stacked_masks(CFG, budgets)
    assert set(stacked) == {"embed", "experts", "ffn", "layers"}
    assert {len(m) for m in (*stacked["experts"], stacked["embed"])} == {3}
    later = jnp.array([[False, True, True], [False, False, True]])
    full = {axis: getattr(CFG, axis) for axis in ("embed", "experts", "ffn")}
    full["layers"] = (1,) * CFG.layers
    for first in range(3):
        for second in range(3):
            masks = switched(stacked, first, second, later)
            for row, column in np.ndindex(later.shape):
                place = second if later[row, column] else first
                now = jax.tree.map(lambda m: m[row, column], masks)  # noqa: B023
                kept = ej.counts(CFG, **full | dict(budgets[place]))
                expected = masks_from_counts(CFG, kept)
                for i in range(CFG.layers):
                    seen, want = (
                        layer_masks(m, CFG.pattern, i) for m in (now, expected)
                    )
                    assert set(seen) == set(want)
                    for axis in seen:
                        np.testing.assert_array_equal(seen[axis], want[axis])
                np.testing.assert_array_equal(now["layers"], expected["layers"])
    assert stacked_masks(CFG, budgets[:1]) == {}


def test_live_counts_soft_units():
    masks = {"embed": jnp.array([1.0, 0.5, 0.25, 0.0])}
    assert float(live(masks, "embed", 4)) == 1.75
    assert live({}, "embed", 4) == 4
    assert live({"embed": None}, "embed", 4) == 4


def test_written_selects_and_never_scales():
    mask = jnp.array([1.0, 0.3, 0.0])
    value = jnp.array([[2.0, 2.0, jnp.nan]])
    np.testing.assert_array_equal(
        written(value, {"ssm_state": mask}, "ssm_state", dim=-1), [[2.0, 2.0, 0.0]]
    )
    assert written(value, {}, "ssm_state", dim=-1) is value


def test_a_tap_sees_the_value_before_the_mask():
    seen = {}
    value = jnp.ones((1, 1, 4))
    elastic(value, {"ffn": prefix_mask(1, 4)}, "ffn", dim=-1, tap=seen.__setitem__)
    assert seen["ffn"] is value
    elastic(value, {}, "ffn", dim=-1, tap=seen.__setitem__)
    assert seen["ffn"] is value


@pytest.mark.parametrize("apply", [elastic, written])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_mask_of_the_wrong_size_does_not_broadcast(apply, size):
    with pytest.raises(ValueError, match=f"mask of ffn has {size} entries for 4 units"):
        apply(jnp.ones((1, 1, 4)), {"ffn": jnp.ones(size)}, "ffn", dim=-1)


def test_the_extent_ends_with_the_last_unit_that_matters():
    assert extent({}, "ffn") is None
    for mask, want in ([1, 1, 0, 0], 2), ([0, 0.5, 0, 0], 2), ([0, 0, 0, 0], 1):
        assert int(extent({"ffn": jnp.array(mask, float)}, "ffn")) == want
    along_time = jnp.array([[[1.0, 0, 0], [1, 1, 0]]])
    assert int(jax.jit(extent, static_argnums=1)({"ffn": along_time}, "ffn")) == 2


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_mask_that_learns_has_the_extent_of_all_units(wrap):
    """Also through a straight-through estimate, whose values are a hard prefix."""
    w, mask = jnp.ones(4), jnp.array([1.0, 1, 0, 0])

    @wrap
    def run(w, mask):
        n = extent({"ffn": mask}, "ffn")
        return jnp.sum(w * mask) * n, n

    grad = lambda f, i: jax.grad(f, argnums=i, has_aux=True)
    assert int(grad(run, 0)(w, mask)[1]) == 2
    dmask, n = grad(run, 1)(w, mask)
    assert int(n) == 4 and dmask.tolist() == [4, 4, 4, 4]

    def straight_through(logits):
        soft = jax.nn.sigmoid(logits)
        return run(w, mask + soft - jax.lax.stop_gradient(soft))

    assert int(grad(straight_through, 0)(jnp.zeros(4))[1]) == 4
