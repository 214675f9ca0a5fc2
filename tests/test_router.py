"""The router's masks are the model's masks, and its loss leads every budget home."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax import nesting, presets
from elastic_jax.axes import AXES, blocks_with
from elastic_jax.budget import Budget
from elastic_jax.budgets import ZONE, accept, feasible, relative_targets
from elastic_jax.config import ElasticConfig
from elastic_jax.cost import cost
from elastic_jax.masks import masks_from_counts
from elastic_jax.model import cache_specs, param_specs
from elastic_jax.router import (
    blend,
    budget_input,
    budget_loss,
    chosen_counts,
    cost_over_target,
    health,
    make_router,
    probabilities,
    schedule,
    soft_masks,
)

CFG = dataclasses.replace(presets.tiny("MEM*-E"), ssm_head_dim=16, ssm_state=16)
SPECS = param_specs(CFG)
DEPTH_RANKS = np.array([0, 5, 2, 1, 3, 4])

# Every axis of the table, at three counts each.
CHOICES = {
    "expert_ffn": (64, 32, 16),
    "experts": (8, 4, 2),
    "shared_ffn": (64, 32, 16),
    "ffn": (128, 64, 16),
    "q_per_kv": (2, 1),
    "ssm_head_dim": (16,),
    "ssm_state": (16,),
    "heads_per_group": (4, 2, 1),
    "embed": (96, 64, 48),
    "layers": (6, 5, 3),
}
ELASTIC = ElasticConfig(
    tuple((a, CHOICES[a]) for a in ("embed", "heads_per_group", "expert_ffn", "ffn"))
)


def three(kind="active_params", targets=(1.0, 0.78, 0.58), **options):
    names = ("full", "mid", "small")
    budgets = (Budget(t, kind, **options) for t in targets)
    return tuple(zip(names, budgets, strict=True))


def one_hot(elastic, chosen):
    """pi that chooses index `chosen(axis, block)` for sure."""

    def row(axis, n, block):
        return jax.nn.one_hot(chosen(axis, block) % n, n)

    pi = {}
    for axis, options in elastic.choices:
        blocks = range(len(blocks_with(CFG.pattern, axis)))
        each = [row(axis, len(options), i) for i in blocks]
        alone = row(axis, len(options), 0)
        pi[axis] = jnp.stack(each) if axis in elastic.per_layer else alone
    return pi


def test_every_axis_has_a_network_of_its_own():
    per_layer = ElasticConfig(ELASTIC.choices, per_layer=("heads_per_group", "ffn"))
    router = make_router(CFG, per_layer, 3)
    params = jax.jit(router.init)(jax.random.key(0), budget_input(0, 3))
    logits = router.apply(params, budget_input(1, 3))
    assert {a: z.shape for a, z in logits.items()} == {
        "embed": (3,),
        "heads_per_group": (2, 3),
        "expert_ffn": (3,),
        "ffn": (1, 3),
    }
    weights = jax.tree.leaves(params)
    assert len(weights) == 2 * 4  # two layers an axis, no biases
    flat = jnp.concatenate([w.ravel() for w in weights])
    assert abs(flat.std() - 0.1) < 0.01 and abs(flat.mean()) < 0.01

    first, second = (params["params"][f"embed_{i}"]["kernel"] for i in ("in", "out"))
    h = first[1]
    by_hand = jnp.where(h > 0, h, 0.1 * h) @ second
    np.testing.assert_allclose(logits["embed"], by_hand, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="each of 3 budgets"):
        router.apply(params, budget_input(0, 2))


@pytest.mark.parametrize(
    "axis, per_layer",
    [(a, False) for a in AXES] + [(a, True) for a in AXES if AXES[a].blocks],
)
def test_a_one_hot_choice_is_the_hard_mask(axis, per_layer):
    elastic = ElasticConfig(
        ((axis, CHOICES[axis]),), per_layer=(axis,) if per_layer else ()
    )
    for shift in range(3):
        pi = one_hot(elastic, lambda _, block, shift=shift: block + shift)
        soft = soft_masks(pi, elastic, CFG, depth_ranks=DEPTH_RANKS)
        counts = chosen_counts(pi, elastic, CFG, depth_ranks=DEPTH_RANKS)
        hard = masks_from_counts(CFG, counts)[axis]
        if per_layer and not isinstance(hard, tuple):  # counts that agree are one
            hard = (hard,) * len(soft[axis])
        jax.tree.map(np.testing.assert_array_equal, soft[axis], hard)


def test_a_soft_mask_mixes_prefixes():
    elastic = ElasticConfig((("heads_per_group", (4, 2, 1)), ("layers", (6, 5, 3))))
    pi = {k: jnp.array([0.5, 0.3, 0.2]) for k in ("heads_per_group", "layers")}
    masks = soft_masks(pi, elastic, CFG, depth_ranks=DEPTH_RANKS)
    np.testing.assert_allclose(masks["heads_per_group"], [1, 0.8, 0.5, 0.5])
    np.testing.assert_allclose(masks["layers"], [1, 0.8, 1, 0.8, 0.5, 1])
    with pytest.raises(ValueError, match="depth_ranks"):
        soft_masks(pi, elastic, CFG)


def test_noise_is_gumbel_and_differs_between_axes():
    logits = {axis: jnp.array([1.0, 0.0, -1.0]) for axis in ("embed", "ffn")}
    plain = probabilities(logits, 2.0, 0.5)
    np.testing.assert_allclose(plain["ffn"], jax.nn.softmax(logits["ffn"] * 4))

    draw = jax.jit(jax.vmap(lambda key: probabilities(logits, 1.0, 1.0, key)))
    pi = draw(jax.random.split(jax.random.key(0), 4000))
    assert jnp.abs(pi["embed"] - pi["ffn"]).max() > 0.5
    # The argmax of Gumbel-perturbed logits follows their softmax.
    wins = jax.nn.one_hot(pi["embed"].argmax(-1), 3).mean(0)
    np.testing.assert_allclose(wins, jax.nn.softmax(logits["embed"]), atol=0.03)
    alone = probabilities({"ffn": logits["ffn"]}, 1.0, 1.0, jax.random.key(3))
    both = probabilities(logits, 1.0, 1.0, jax.random.key(3))
    np.testing.assert_array_equal(alone["ffn"], both["ffn"])


def test_a_hard_sample_is_a_one_hot_with_the_soft_gradient():
    logits = {"embed": jnp.array([0.3, 0.5, -1.0])}

    def first(logits, hard):
        return probabilities(logits, 3.0, 0.7, jax.random.key(1), hard=hard)["embed"][1]

    assert first(logits, True) in (0.0, 1.0) and 0 < first(logits, False) < 1
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.grad(first)(logits, True),
        jax.grad(first)(logits, False),
    )


def test_the_schedule_ends_where_it_should_and_stays():
    for step, expected in ((0, (1, 1)), (50, (5.5, 0.05**0.5)), (100, (10, 0.05))):
        np.testing.assert_allclose(schedule(step, 100), expected, rtol=1e-6)
    np.testing.assert_array_equal(schedule(100, 100), schedule(2000, 100))


def test_budgets_in_between_are_linear_between_neighbours():
    targets = (1.0, 0.8, 0.5)
    for i, target in enumerate(targets):
        np.testing.assert_array_equal(blend(targets, target), budget_input(i, 3))
    np.testing.assert_allclose(blend(targets, 0.95), [0.75, 0.25, 0], atol=1e-6)
    np.testing.assert_allclose(blend(targets, 0.6), [0, 1 / 3, 2 / 3], atol=1e-6)
    np.testing.assert_allclose(blend(targets, 0.6) @ np.array(targets), 0.6, rtol=1e-6)
    for ratio in (0.49, 1.01):
        with pytest.raises(ValueError, match="outside the trained budgets"):
            blend(targets, ratio)


def loss_of(elastic, budgets, pi, index):
    given = {"budgets": budgets, "specs": SPECS, "cfg": CFG}
    masks = soft_masks(pi, elastic, CFG)
    return budget_loss(pi, masks, budget_input(index, len(budgets)), **given)


def test_the_budget_loss_is_zero_in_the_zone_and_steep_outside():
    pi = one_hot(ELASTIC, lambda *_: 1)
    counts = chosen_counts(pi, ELASTIC, CFG)
    share = cost(SPECS, CFG, counts=counts).active_params
    share /= cost(SPECS, CFG).active_params

    def loss_and_gradient(miss, targets=(1.0,)):
        budgets = three(targets=(*targets, share / miss, 0.1))
        return jax.value_and_grad(lambda p: loss_of(ELASTIC, budgets, p, 1))(pi)

    for miss in (0.951, 1.0, 1.049):
        loss, gradient = loss_and_gradient(miss)
        assert loss == 0 and not any(g.any() for g in gradient.values())
    for miss in (0.9, 0.949, 1.051, 1.3):
        loss, gradient = loss_and_gradient(miss)
        np.testing.assert_allclose(loss, abs(miss - 1), rtol=1e-4)
        for axis, g in gradient.items():  # more of the larger count costs more
            assert (jnp.sign(miss - 1) * jnp.diff(g) < 0).all(), axis


def test_the_full_budget_has_no_zone_and_pulls_every_axis_to_full():
    budgets = three()
    full = one_hot(ELASTIC, lambda *_: 0)
    assert loss_of(ELASTIC, budgets, full, 0) == 0
    for axis, _ in ELASTIC.choices:
        pi = full | {axis: jnp.array([0.9, 0.1, 0.0])}
        masks = soft_masks(pi, ELASTIC, CFG)
        ratio = cost_over_target(
            masks, budget_input(0, 3), budgets=budgets, specs=SPECS, cfg=CFG
        )
        assert ratio > 1 - ZONE  # a zone would have hidden it
        loss, gradient = jax.value_and_grad(
            lambda p: loss_of(ELASTIC, budgets, p, 0)
        )(pi)
        np.testing.assert_allclose(loss, 1 - ratio + 10 * 0.02 / 3, rtol=1e-4)
        assert gradient[axis][0] < 0 < gradient[axis][1]


def test_per_layer_choices_cost_what_their_mixture_costs():
    elastic = ElasticConfig(ELASTIC.choices, per_layer=("heads_per_group",))
    pi = one_hot(elastic, lambda _, block: block)
    counts = chosen_counts(pi, elastic, CFG)
    assert counts["heads_per_group"] == (4, 2)
    budgets = three()
    soft = cost_over_target(
        soft_masks(pi, elastic, CFG),
        budget_input(2, 3),
        budgets=budgets,
        specs=SPECS,
        cfg=CFG,
    )
    hard = budgets[2][1].ratio(SPECS, None, CFG, counts=counts)
    np.testing.assert_allclose(soft, hard, rtol=1e-5)


def test_one_compiled_step_serves_all_budgets():
    traces = []

    @jax.jit
    def loss(pi, budget):
        traces.append(budget)
        masks = soft_masks(pi, ELASTIC, CFG)
        return budget_loss(pi, masks, budget, budgets=three(), specs=SPECS, cfg=CFG)

    pi = one_hot(ELASTIC, lambda *_: 0)
    losses = [loss(pi, budget_input(i, 3)) for i in range(3)]
    assert len(traces) == 1
    np.testing.assert_allclose(losses, [0, 1 / 0.78 - 1, 1 / 0.58 - 1], 1e-5)


def train_alone(elastic, budgets, caches=None, steps=300):
    """Counts per budget of a router that saw nothing but its budget loss, by Adam."""
    n = len(budgets)
    router = make_router(CFG, elastic, n, hidden=64)
    given = {"budgets": budgets, "specs": SPECS, "cfg": CFG, "cache_specs": caches}

    def loss(params, step):
        def one(budget, key):
            logits = router.apply(params, budget)
            pi = probabilities(logits, *schedule(step, steps), key)
            masks = soft_masks(pi, elastic, CFG, depth_ranks=DEPTH_RANKS)
            return budget_loss(pi, masks, budget, **given)

        keys = jax.random.split(jax.random.key(step), n)
        return jnp.mean(jax.vmap(one)(jnp.eye(n), keys))

    def update(state, step):
        params, m, v = state
        g = jax.grad(loss)(params, step)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, v, g)
        params = jax.tree.map(
            lambda p, m, v: p - 3e-3 * m / (jnp.sqrt(v) + 1e-8), params, m, v
        )
        return (params, m, v), None

    @jax.jit
    def run(key):
        params = router.init(key, budget_input(0, n))
        nothing = jax.tree.map(jnp.zeros_like, params)
        start = (params, nothing, nothing)
        (params, _, _), _ = jax.lax.scan(update, start, jnp.arange(steps))
        return [router.apply(params, budget_input(i, n)) for i in range(n)]

    choose = functools.partial(chosen_counts, depth_ranks=DEPTH_RANKS)
    logits = run(jax.random.key(0))
    return {
        name: choose(z, elastic, CFG)
        for (name, _), z in zip(budgets, logits, strict=True)
    }


FINE = ElasticConfig(
    (
        ("embed", (96, 80, 64, 48)),
        ("experts", (8, 7, 6, 5, 4, 3, 2)),
        ("expert_ffn", (64, 48, 32, 16)),
        ("ffn", (128, 96, 64, 32)),
    )
)


def test_the_router_alone_meets_total_parameters_and_moves_experts():
    budgets = three("total_params")
    elastic, _ = feasible(FINE, SPECS, CFG, budgets)
    assert elastic == FINE  # under active parameters, experts would not be offered
    counts = train_alone(elastic, budgets)
    accept(counts, budgets, SPECS, CFG, elastic)
    assert nesting.resolved(CFG, counts["full"]) == nesting.resolved(CFG)
    assert counts["small"]["experts"] < counts["full"]["experts"]


def test_memory_depth_and_per_layer_choices_learn_too():
    elastic = ElasticConfig(
        (*FINE.choices, ("heads_per_group", (4, 3, 2, 1)), ("layers", (6, 5, 4))),
        per_layer=("heads_per_group", "expert_ffn"),
    )
    budgets = three("memory_bytes", precision="fp8", length=256)
    caches = cache_specs(CFG)
    counts = train_alone(elastic, budgets, caches)
    given = {"cache_specs": caches, "depth_ranks": DEPTH_RANKS}
    accept(counts, budgets, SPECS, CFG, elastic, **given)


def test_health_says_what_is_chosen_and_how_surely():
    elastic = ElasticConfig(ELASTIC.choices, per_layer=("heads_per_group",))
    logits = one_hot(elastic, lambda _, block: block + 1)
    pi = probabilities(logits, 2.0, 1.0)
    budget = three()[2][1]
    metrics = health("small", budget, logits, pi, elastic, SPECS, CFG)
    assert all(type(value) is float for value in metrics.values())
    assert metrics["small/embed/count"] == 64
    assert metrics["small/heads_per_group/1/count"] == 1
    shares = [metrics[f"small/embed/p/{n}"] for n in (96, 64, 48)]
    np.testing.assert_allclose(shares, pi["embed"], rtol=1e-6)
    entropy = -np.sum(np.array(shares) * np.log(shares))
    np.testing.assert_allclose(metrics["small/embed/entropy"], entropy)
    counts = chosen_counts(logits, elastic, CFG)
    ratio = budget.ratio(SPECS, None, CFG, counts=counts)
    assert metrics["small/cost_over_target"] == ratio

    sure = one_hot(elastic, lambda *_: 0)
    sure = health("x", budget, sure, sure, elastic, SPECS, CFG)
    assert sure["x/embed/entropy"] == 0


def test_absolute_and_relative_budgets_are_the_same_thing():
    full = cost(SPECS, CFG).active_params
    relative = three()
    absolute = (
        relative[0],
        ("mid", Budget(0.78 * full, relative=False)),
        ("small", Budget(0.58 * full, relative=False)),
    )
    targets = [relative_targets(b, SPECS, CFG) for b in (relative, absolute)]
    np.testing.assert_allclose(*targets, rtol=1e-12)
