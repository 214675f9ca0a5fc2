"""Mixture of experts: who is chosen, with what weight, and what a mask does to both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax.layers.moe as moe_layer
from elastic_jax.layers.moe import SPECS, moe, route
from elastic_jax.masks import prefix_mask

SIZES = {"embed": 6, "experts": 8, "expert_ffn": 5, "shared_ffn": 7}
TIGHT = {"rtol": 1e-11, "atol": 1e-13}
GROUPS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)]


@pytest.fixture
def params(weights):
    return weights(SPECS, SIZES)


def random(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


@functools.partial(jax.jit, static_argnames=("top_k", "n_group", "topk_group"))
def choose(params, x, mask=None, top_k=2, n_group=1, topk_group=1):
    return route(params, x, mask, top_k, n_group, topk_group)


@functools.partial(jax.jit, static_argnames=("factor", "n_group", "topk_group"))
def run(params, x, masks=None, factor=2.5, n_group=1, topk_group=1):
    y, cache = moe(
        params,
        x,
        masks or {},
        top_k=2,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=factor,
    )
    assert cache is None
    return y


def plain_route(params, x, n_group=1, topk_group=1):
    """Experts by descending score + bias, and their gates, for one token [d]."""
    score = 1 / (1 + np.exp(-np.asarray(x) @ np.asarray(params["router"])))
    choice = score + np.asarray(params["router_bias"])
    members = np.arange(8).reshape(n_group, -1)
    worth = [sum(sorted(choice[group])[-2:]) for group in members]
    best = sorted(range(n_group), key=lambda g: -worth[g])[:topk_group]
    allowed = [e for g in best for e in members[g]]
    chosen = sorted(allowed, key=lambda e: -choice[e])[:2]
    return chosen, score[chosen] / score[chosen].sum()


def plain(params, x, factor=2.5, **groups):
    """The update of one token [d], expert by expert."""
    w = {name: np.asarray(value) for name, value in params.items()}
    mlp = lambda up, down: np.maximum(np.asarray(x) @ up, 0) ** 2 @ down
    y = mlp(w["shared_up"], w["shared_down"])
    for e, gate in zip(*plain_route(params, x, **groups), strict=True):
        y += factor * gate * mlp(w["up"][e], w["down"][e])
    return y


def frequency(experts):
    return np.bincount(np.ravel(experts), minlength=8) / (experts.size / 2)


@pytest.mark.parametrize("n_group, topk_group", GROUPS)
def test_the_choice_is_limited_to_the_best_groups(params, n_group, topk_group):
    groups = {"n_group": n_group, "topk_group": topk_group}
    x = random(2, 50, 6)
    experts, gates = choose(params, x, **groups)
    tokens = list(zip(*(np.reshape(a, (100, -1)) for a in (x, experts, gates)),
                      strict=True))
    for token, chosen, weights in tokens:
        want, shares = plain_route(params, token, **groups)
        assert list(chosen) == want
        np.testing.assert_allclose(weights, shares, **TIGHT)
    if topk_group == 1 < n_group:
        size = 8 // n_group
        assert (experts[..., 0] // size == experts[..., 1] // size).all()
    if topk_group < n_group:
        assert (experts != choose(params, x)[0]).any()  # The limit binds.


@pytest.mark.parametrize("n_group, topk_group", [(1, 1), (4, 2)])
def test_the_update_is_the_gated_sum_of_the_chosen(params, n_group, topk_group):
    groups = {"n_group": n_group, "topk_group": topk_group}
    x = random(2, 9, 6)
    want = [[plain(params, token, **groups) for token in row] for row in x]
    np.testing.assert_allclose(run(params, x, **groups), want, **TIGHT)


def test_gates_sum_to_one_over_distinct_experts(params):
    experts, gates = choose(params, 3 * random(2, 50, 6), top_k=5)
    np.testing.assert_allclose(gates.sum(-1), 1, rtol=1e-12)
    assert (gates > 0).all()
    assert (jnp.diff(jnp.sort(experts), axis=-1) > 0).all()


def test_gates_survive_hopeless_scores(params):
    """Scores that underflow give finite gates: zeros at worst, never NaN."""
    hopeless = params | {"router": jnp.full((6, 8), -200.0)}
    assert np.isfinite(choose(hopeless, jnp.ones((2, 50, 6)))[1]).all()


def test_the_bias_steers_the_choice_and_nothing_else(params):
    x = random(2, 50, 6)
    pushed = params | {"router_bias": params["router_bias"].at[3].set(10)}
    experts, gates = choose(pushed, x)
    assert (experts[..., 0] == 3).all()
    score = jax.nn.sigmoid(x @ params["router"])
    chosen = jnp.take_along_axis(score, experts, -1)
    np.testing.assert_allclose(gates, chosen / chosen.sum(-1, keepdims=True), **TIGHT)

    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(choose(p, x)[1]))))(pushed)
    assert not gradient["router_bias"].any() and gradient["router"].any()


def test_the_shared_expert_is_not_scaled(params):
    x = random(1, 5, 6)
    y = [run(params, x, factor=f) for f in (1.0, 2.0, 3.0)]
    np.testing.assert_allclose(y[2] - y[1], y[1] - y[0], **TIGHT)
    shared = jax.nn.relu(x @ params["shared_up"]) ** 2 @ params["shared_down"]
    np.testing.assert_allclose(2 * y[0] - y[1], shared, **TIGHT)


def test_no_token_sees_another(params):
    x = random(2, 5, 6)

    @jax.jit
    @jax.grad
    def gradient(x):
        return jnp.sum(jnp.sin(run(params, x)[0, 2]))

    seen = gradient(x)
    assert seen[0, 2].all() and not seen.at[0, 2].set(0).any()
    order = jnp.array([3, 0, 4, 1, 2])
    shuffled = run(params, x[:, order])
    np.testing.assert_allclose(shuffled, run(params, x)[:, order], **TIGHT)


@pytest.mark.parametrize("shift", [0.0, -5.0, 5.0])
def test_a_softer_mask_makes_an_expert_less_likely(params, shift):
    """Also where every bias is negative, and the mask alone would attract tokens."""
    params = params | {"router_bias": 0.2 * params["router_bias"] + shift}
    x = random(4, 100, 6)
    for e in range(8):
        seen = []
        for soft in (1.0, 0.7, 0.4, 0.1, 0.0):
            experts, gates = choose(params, x, jnp.ones(8).at[e].set(soft))
            np.testing.assert_allclose(gates.sum(-1), 1, rtol=1e-12)
            seen.append(frequency(experts)[e])
        assert seen == sorted(seen, reverse=True)
        assert seen[0] > seen[2] and seen[-1] == 0


@pytest.mark.parametrize("shift", [0.0, -5.0])
@pytest.mark.parametrize("n_group, topk_group", [(1, 1), (4, 2)])
def test_a_mask_of_ones_changes_no_choice(params, shift, n_group, topk_group):
    params = params | {"router_bias": params["router_bias"] + shift}
    groups = {"n_group": n_group, "topk_group": topk_group}
    x = random(2, 50, 6)
    (experts, gates), (want, shares) = (
        choose(params, x, mask, **groups) for mask in (jnp.ones(8), None)
    )
    np.testing.assert_array_equal(experts, want)
    np.testing.assert_array_equal(gates, shares)


def test_masked_experts_are_never_chosen(params):
    """Whatever their bias, and also when only top_k are left."""
    loud = params | {"router_bias": -jnp.arange(8.0).at[2:].multiply(-100)}
    mask = jnp.zeros(8).at[jnp.array([0, 5])].set(jnp.array([1.0, 1e-3]))
    experts, gates = choose(loud, random(2, 50, 6), mask)
    assert set(np.ravel(experts)) == {0, 5}
    np.testing.assert_allclose(gates.sum(-1), 1, rtol=1e-12)


def test_the_mask_learns_through_the_gates(params):
    """Its gradient is the finite difference wherever no choice flips."""
    x, mask = random(1, 6, 6), jnp.linspace(0.9, 0.5, 8)
    direction = random(8, seed=5)

    @jax.jit
    def loss(mask):
        return jnp.sum(jnp.sin(run(params, x, {"experts": mask})))

    step = 1e-6 * direction
    chosen = [choose(params, x, m)[0] for m in (mask - step, mask, mask + step)]
    assert (chosen[0] == chosen[1]).all() and (chosen[1] == chosen[2]).all()
    slope = (loss(mask + step) - loss(mask - step)) / 2e-6
    gradient = jax.jit(jax.grad(loss))(mask)
    np.testing.assert_allclose(gradient @ direction, slope, rtol=1e-6)
    assert (gradient != 0).tolist() == [e in np.unique(chosen[1]) for e in range(8)]


def test_masks_may_differ_per_token(params):
    x, soft = random(2, 5, 6), np.random.default_rng(4)
    masks = {a: jnp.asarray(soft.random((2, 5, SIZES[a])))
             for a in ("experts", "expert_ffn", "shared_ffn")}
    y = run(params, x, masks)
    for b in range(2):
        for t in range(5):
            alone = {axis: mask[b, t] for axis, mask in masks.items()}
            want = run(params, x[b : b + 1, t : t + 1], alone)
            np.testing.assert_allclose(y[b : b + 1, t : t + 1], want, **TIGHT)


def test_a_tap_changes_nothing_and_sees_every_choice(params):
    x, seen = random(2, 5, 6), {}
    masks = {"expert_ffn": jnp.linspace(1, 0, 5), "experts": jnp.linspace(1, 0.5, 8)}

    @jax.jit
    def tapped(x):
        seen = {}
        options = {"top_k": 2, "n_group": 1, "topk_group": 1}
        y, _ = moe(params, x, masks, routed_scaling_factor=2.5, **options,
                   tap=seen.__setitem__)
        return y, seen

    y, seen = tapped(x)
    np.testing.assert_allclose(y, run(params, x, masks), **TIGHT)
    assert set(seen) == {"expert_ffn", "experts", "shared_ffn"}
    experts, gates, outputs = seen["experts"]
    np.testing.assert_array_equal(experts, choose(params, x, masks["experts"])[0])
    up, down = params["up"][experts], params["down"][experts]
    hidden = jax.nn.relu(jnp.einsum("btd,btcdf->btcf", x, up)) ** 2
    np.testing.assert_allclose(seen["expert_ffn"], hidden, **TIGHT)
    each = jnp.einsum("btcf,btcfd->btcd", hidden * masks["expert_ffn"], down)
    np.testing.assert_allclose(outputs, each, **TIGHT)
    shared = jax.nn.relu(x @ params["shared_up"]) ** 2
    np.testing.assert_allclose(seen["shared_ffn"], shared, **TIGHT)
    routed = 2.5 * jnp.sum(gates[..., None] * outputs, axis=2)
    np.testing.assert_allclose(y, routed + shared @ params["shared_down"], **TIGHT)


def test_what_a_given_mask_switches_off_is_no_part_of_the_products(params, monkeypatch):
    """Kernels are told how wide it is; a mask that learns is computed whole."""
    told = []
    original = moe_layer.expert_mlp

    def listening(*arguments, active, **options):
        jax.debug.callback(lambda *n: told.append(tuple(map(int, n))), *active)
        return original(*arguments, active=active, **options)

    monkeypatch.setattr(moe_layer, "expert_mlp", listening)
    x = random(2, 4, 6) * prefix_mask(4, 6)
    masks = {"expert_ffn": prefix_mask(3, 5), "embed": prefix_mask(4, 6)}

    def loss(params, masks):
        update = run.__wrapped__(params, x, masks)
        return jnp.sum(jnp.sin(update * masks["embed"]))

    given = jax.grad(loss)(params, masks)
    learnt = jax.grad(loss, argnums=(0, 1))(params, masks)
    jax.effects_barrier()
    assert told == [(3, 4), (5, 6)]
    assert learnt[1]["expert_ffn"][3:].all()
    np.testing.assert_allclose(given["up"][:, :4], learnt[0]["up"][:, :4], **TIGHT)
    np.testing.assert_array_equal(given["up"][..., 3:], 0)
