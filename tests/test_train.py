"""A step is the gradient of what it says, however it is cut, sliced or laid out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import elastic_jax as ej
from elastic_jax import axes, objectives, train
from elastic_jax.budgets import ZONE
from elastic_jax.curriculum import Stage
from elastic_jax.elastic import Elastic, router_health, settled_counts
from elastic_jax.router import budget_input, make_router

NAMES = ("full", "mid", "small")


def small(pattern):
    return dataclasses.replace(
        ej.presets.tiny(pattern), vocab=16, embed=32, ffn=64, heads_per_group=2,
        ssm_head_dim=8, ssm_state=8, head_dim=8, experts=4, expert_ffn=32, shared_ffn=32
    )


def random_params(cfg):
    """Drawn by NumPy, which compiles nothing."""
    rng, specs = np.random.default_rng(0), ej.param_specs(cfg)

    def leaf(path, spec):
        drawn = 0.2 * rng.normal(size=axes.shape(cfg, specs, path, spec))
        return jnp.asarray(drawn + (spec.init == "ones"), jnp.float32)

    return axes.map_specs(leaf, specs)


def make_elastic(pattern, targets, **choices):
    """A parent with a router that is already fitted to its budgets."""
    cfg = small(pattern)
    offered = ej.ElasticConfig(tuple(choices.items()))
    budgets = tuple((n, ej.Budget(t)) for n, t in zip(NAMES, targets, strict=True))
    router = make_router(cfg, offered, len(budgets), hidden=16)
    return Elastic(cfg, random_params(cfg), router, budgets)


def fresh_router(elastic):
    return elastic.router.init(jax.random.key(1), budget_input(0, len(elastic.budgets)))


def make_batch(stage, seed=0):
    """Random rows of two documents each; some tokens count more, some not at all."""
    rng, shape = np.random.default_rng(seed), (stage.batch, stage.context)
    documents = np.arange(stage.context) // (stage.context // 2)
    weights = rng.random(shape) * (rng.random(shape) < 0.7)
    return {
        "tokens": rng.integers(0, 16, shape, np.int32),
        "targets": rng.integers(0, 16, shape, np.int32),
        "segment_ids": np.broadcast_to(documents, shape).astype(np.int32),
        "weights": weights.astype(np.float32),
    }


STAGE = Stage("a", context=8, batch=6, micro_batch=2, learning_rate=1e-2, steps=9)
SMALLEST = dataclasses.replace(STAGE, sampling=(0.0, 0.0, 1.0))


@pytest.fixture(scope="module")
def elastic():
    return make_elastic("-", (1.0, 0.8, 0.4), embed=(32, 16), ffn=(64, 48, 32, 16))


@pytest.fixture(scope="module")
def fitted(elastic):
    return train.fit_router(elastic, fresh_router(elastic))


@pytest.fixture(scope="module")
def counts(elastic, fitted):
    return settled_counts(elastic, fitted)


@pytest.fixture(scope="module")
def optimizer(elastic):
    return train.optimizer(elastic.specs)


@pytest.fixture
def state(elastic, fitted, optimizer):
    return train.init_state(elastic.teacher, optimizer, fitted)


RATES = {"rate/params": 1e-3, "rate/router": 1e-2}
FROZEN = {"rate/params": 1e-3, "rate/router": 0.0}


def close(got, expected, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, expected
    )


def same_bits(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def on_host(tree):
    """A copy that donation does not reach."""
    return jax.tree.map(np.array, tree)


def size(tree):
    return sum(float(np.sum(np.abs(leaf))) for leaf in jax.tree.leaves(tree))


# --------------------------------------------------------------------- objectives


@pytest.mark.parametrize("micro_batch", [6, 2])
def test_language_gradients_are_those_of_the_whole_batch(elastic, state, micro_batch):
    """Chunks and micro-batches change nothing, though their weights are not equal."""
    stage = dataclasses.replace(STAGE, micro_batch=micro_batch)
    batch = make_batch(stage)

    def plain(params):
        logits = ej.apply(
            params, batch["tokens"], elastic.cfg, segment_ids=batch["segment_ids"]
        )
        log_p = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
        return -jnp.sum(batch["weights"] * chosen) / jnp.sum(batch["weights"])

    objective = objectives.language_objective(elastic.cfg, stage, chunk=5)
    gradients, losses = objective.gradients(state, batch, 0)
    loss, expected = jax.jit(jax.value_and_grad(plain))(state.params)
    close(gradients["params"], expected, rtol=1e-4, atol=1e-6)
    assert size(gradients["router"]) == 0
    assert [name for name, _ in losses] == ["full"] * stage.micro_batches
    if micro_batch == 6:
        np.testing.assert_allclose(losses[0][1], loss, rtol=1e-5)


def test_a_batch_in_which_nothing_counts_has_no_gradient(elastic, state):
    batch = make_batch(STAGE) | {"weights": np.zeros((6, 8), np.float32)}
    objective = objectives.language_objective(elastic.cfg, STAGE, chunk=5)
    gradients, losses = objective.gradients(state, batch, 0)
    assert size(gradients) == 0 and losses == [("full", 0.0)] * 3


def test_executables(elastic, state, optimizer, counts):
    """One masked gradient a context, one sliced a budget and context, one update."""
    for jitted in (train.accumulate, train.update):
        jitted.clear_cache()  # other tests use the same functions, and optimizer
    gradients, seen = train.accumulate._cache_size, set()

    def steps(make, stage, rates, n=3):
        nonlocal state
        objective = make(stage)
        for step in range(n):
            total, losses = objective.gradients(state, make_batch(stage, step), step)
            state, _ = train.update(optimizer, state, total, rates, True)
            seen.update(name for name, _ in losses)
        assert seen == set(NAMES)
        return gradients()

    masked = lambda stage: objectives.masked_objective(elastic, stage)
    sliced = lambda stage: objectives.sliced_objective(elastic, stage, counts)
    other = dataclasses.replace(
        STAGE, steps=5, learning_rate=1e-3, budget_loss_weight=1.0, batch=4
    )
    longer = dataclasses.replace(STAGE, context=10, steps=7)
    assert steps(masked, STAGE, RATES) == 1
    assert steps(masked, other, RATES) == 1
    assert steps(sliced, STAGE, FROZEN) == 1 + 3
    assert steps(sliced, other, FROZEN) == 1 + 3
    assert steps(sliced, longer, FROZEN) == 1 + 2 * 3
    assert train.update._cache_size() == 1


def test_a_certain_router_masks_what_the_sliced_step_slices(elastic, state, counts):
    """Same loss and gradient; outside of the prefix it is exactly zero."""
    sure = jax.tree.map(lambda w: 100 * w, state.router)
    state, batch = state._replace(router=sure), make_batch(STAGE)
    masked = objectives.masked_objective(elastic, SMALLEST)
    sliced = objectives.sliced_objective(elastic, SMALLEST, counts)
    expected, masked_losses = masked.gradients(state, batch, SMALLEST.total_steps)
    gradients, losses = sliced.gradients(state, batch, 0)
    assert [name for name, _ in losses] == ["small"] * 3
    close(losses[0][1], masked_losses[0][1], rtol=1e-4)
    close(gradients["params"], expected["params"], rtol=1e-3, atol=1e-6)
    assert size(gradients["router"]) == 0

    def kept(params):
        small = ej.slice_params(params, elastic.specs, counts["small"])
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(small))

    inside = jax.grad(kept)(state.params)
    beyond = jax.tree.map(lambda g, w: g * (1 - w), gradients["params"], inside)
    assert size(beyond) == 0 < size(gradients["params"])
    assert size(inside) < size(jax.tree.map(jnp.ones_like, inside))


def test_the_router_hears_the_distillation_loss_too(elastic, state):
    batch = make_batch(STAGE)

    def gradients(weight):
        stage = dataclasses.replace(STAGE, budget_loss_weight=weight)
        objective = objectives.masked_objective(elastic, stage)
        return on_host(objective.gradients(state, batch, 2))

    (alone, losses), (both, same) = gradients(0.0), gradients(10.0)
    assert size(alone["router"]) > 0
    assert size(jax.tree.map(jnp.subtract, both["router"], alone["router"])) > 0
    same_bits(alone["params"], both["params"])
    assert losses == same  # what is reported is the divergence


def test_noise_and_budgets_follow_the_step_alone(elastic, state):
    batch, objective = make_batch(STAGE), objectives.masked_objective(elastic, STAGE)
    once, again = (on_host(objective.gradients(state, batch, 2)) for _ in range(2))
    same_bits(once[0], again[0])
    assert once[1] == again[1]
    later = state._replace(step=state.step + 1)
    assert objective.gradients(later, batch, 2)[1] != once[1]


def test_a_batch_that_does_not_fit_its_stage_is_refused(elastic, state):
    batch = make_batch(dataclasses.replace(STAGE, batch=4, micro_batch=4))
    with pytest.raises(ValueError, match=r"'a'.*\(6, 8\).*'tokens': \(4, 8\)"):
        objectives.language_objective(elastic.cfg, STAGE).gradients(state, batch, 0)


def test_divergence_of_the_parent_from_itself_is_zero(elastic, counts):
    teacher, cfg = elastic.teacher, elastic.cfg
    itself, slice_of_it = (
        objectives.divergence(
            teacher,
            ej.slice_params(teacher, elastic.specs, counts[name]),
            ej.slice_config(cfg, counts[name]),
            [make_batch(STAGE)],
            teacher_cfg=cfg,
        )
        for name in ("full", "small")
    )
    assert abs(itself) < 1e-6 < 1e-2 < slice_of_it


# ------------------------------------------------------------------------- update


def random_gradients(state, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32),
        {"params": state.params, "router": state.router},
    )


def test_a_frozen_router_keeps_every_bit(optimizer, state):
    before = on_host(state.router)
    state, _ = train.update(optimizer, state, random_gradients(state), RATES, True)
    learned = on_host(state.router)
    assert size(jax.tree.map(np.subtract, learned, before)) > 0
    weights = on_host(state.params)
    for _ in range(2):  # its moments would still move it
        nothing = random_gradients(state) | {
            "router": jax.tree.map(jnp.zeros_like, state.router)
        }
        state, _ = train.update(optimizer, state, nothing, FROZEN, True)
    same_bits(state.router, learned)
    assert size(jax.tree.map(np.subtract, on_host(state.params), weights)) > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, None])
@pytest.mark.parametrize("group", ["params", "router"])
def test_a_refused_update_changes_no_bit(optimizer, state, group, bad):
    state, _ = train.update(optimizer, state, random_gradients(state), RATES, True)
    before, gradients = on_host(state), random_gradients(state, 1)
    if bad is not None:
        leaves, structure = jax.tree.flatten(gradients[group])
        leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].set(bad)
        gradients[group] = jax.tree.unflatten(structure, leaves)
    state, norms = train.update(optimizer, state, gradients, RATES, bad is not None)
    same_bits(state._replace(step=0), before._replace(step=0))
    assert state.step == before.step + 1
    assert np.isfinite(norms[f"norm/{group}"]) == (bad is None)


def test_weights_and_router_are_clipped_on_their_own(optimizer, state):
    gradients = random_gradients(state)
    norms = {"params": 50.0, "router": 0.5}
    for group, norm in norms.items():
        scale = norm / float(jnp.sqrt(sum(
            jnp.sum(g**2) for g in jax.tree.leaves(gradients[group])
        )))
        gradients[group] = jax.tree.map(lambda g, s=scale: g * s, gradients[group])
    state, reported = train.update(optimizer, state, gradients, RATES, True)
    for group, clipped in {"params": 1.0, "router": 0.5}.items():
        np.testing.assert_allclose(reported[f"norm/{group}"], norms[group], rtol=1e-4)
        mean = state.moments.inner_states[group].inner_state[1].mu[group]
        seen = np.sqrt(sum(np.sum(np.square(m)) for m in jax.tree.leaves(mean)))
        np.testing.assert_allclose(seen, 0.1 * clipped, rtol=1e-4)  # 1 - b1


def test_weights_decay_where_something_is_contracted(elastic, fitted):
    decaying = train.optimizer(elastic.specs, weight_decay=0.5)
    state = train.init_state(elastic.teacher, decaying, fitted)
    nothing = jax.tree.map(jnp.zeros_like, random_gradients(state))
    rates = {"rate/params": 0.1, "rate/router": 0.1}
    state, _ = train.update(decaying, state, nothing, rates, True)
    same_bits(state.router, fitted)
    decays = {path: spec.decays for path, spec in elastic.specs}
    assert not decays["embedding",] and not decays["final_norm",]
    assert decays["layers", 0, "up"] and decays["lm_head",]
    for path, expected in decays.items():
        old, new = (axes.leaf(t, path) for t in (elastic.teacher, state.params))
        np.testing.assert_allclose(new, old * (0.95 if expected else 1), rtol=1e-6)


def test_moments_of_bfloat16_weights_are_float32(elastic, optimizer):
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), elastic.teacher)
    state = train.init_state(half, optimizer)
    kinds = jax.tree.map(lambda x: x.dtype, state)
    assert jnp.bfloat16 not in jax.tree.leaves(kinds.moments)
    state, _ = train.update(optimizer, state, random_gradients(state), RATES, True)
    assert jax.tree.map(lambda x: x.dtype, state) == kinds


# ------------------------------------------------------------------- router alone


def test_the_fitted_router_is_inside_every_zone(elastic, fitted, counts):
    assert set(counts) == set(NAMES)
    metrics = router_health(elastic, fitted, 9, 9)
    for name, budget in elastic.budgets:
        ratio = budget.ratio(elastic.specs, None, elastic.cfg, counts=counts[name])
        assert abs(ratio - 1) <= ZONE
        assert metrics[f"{name}/cost_over_target"] == float(ratio)
        assert metrics[f"{name}/ffn/count"] == counts[name].get("ffn", 64)
    assert 0.9 < metrics["certainty"] <= 1
    early = router_health(elastic, fresh_router(elastic), 0, 9)
    assert early["certainty"] < 0.9


def test_a_router_that_missed_is_refused(elastic, fitted):
    backwards = jax.tree.map_with_path(
        lambda path, w: -w if "_out" in str(path) else w, fitted
    )
    with pytest.raises(ValueError, match="the router missed its budgets"):
        settled_counts(elastic, backwards)


def test_depth_ranks_may_be_an_array(elastic):
    """Whatever holds them, they are static in the compiled step."""
    ranked = dataclasses.replace(elastic, teacher=None, depth_ranks=np.array([1, 0]))
    assert ranked.depth_ranks == (1, 0)
    hash(ranked)


# --------------------------------------------------------------------------- mesh


MESHED = {  # kind of step -> a pattern, and choices that it has
    "masked": ("*E", {"embed": (32, 16), "expert_ffn": (32, 16)}),
    "sliced": ("M", {"embed": (32, 16), "heads_per_group": (2, 1)}),
}


@pytest.mark.parametrize("kind", MESHED)
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(kind):
    """data 2, tensor 2, expert 2; an update leaves everything where it was."""
    pattern, choices = MESHED[kind]
    elastic = make_elastic(pattern, (1.0, 0.8, 0.43), **choices)
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "tensor", "expert"), axis_types=(AxisType.Auto,) * 3
    )
    stage = dataclasses.replace(SMALLEST, batch=4, micro_batch=4)
    kept = ej.counts(elastic.cfg, **{axis: n for axis, (_, n) in choices.items()})
    optimizer = train.optimizer(elastic.specs)
    batch, learned = make_batch(stage), fresh_router(elastic)

    def make(elastic):
        if kind == "masked":
            return objectives.masked_objective(elastic, stage)
        return objectives.sliced_objective(elastic, stage, dict.fromkeys(NAMES, kept))

    alone = train.init_state(elastic.teacher, optimizer, learned)
    expected, losses = make(elastic).gradients(alone, batch, 3)

    params = train.shard_params(elastic.teacher, elastic.cfg, mesh)
    spread = dataclasses.replace(elastic, teacher=params, mesh=mesh)
    state = train.init_state(params, optimizer, learned)
    gradients, spread_losses = make(spread).gradients(state, batch, 3)
    np.testing.assert_allclose(spread_losses[0][1], losses[0][1], rtol=1e-4)
    for got, want in zip(*map(jax.tree.leaves, (gradients, expected)), strict=True):
        scale = np.abs(want).max() + 1e-12
        np.testing.assert_allclose(got / scale, want / scale, atol=1e-4)
    assert size(gradients["router"]) > 0 or kind == "sliced"

    lie_alike = lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim)
    trained = {"params": state.params, "router": state.router}
    assert all(jax.tree.leaves(jax.tree.map(lie_alike, gradients, trained)))
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(state))
    if kind == "masked":
        (up,) = (block["up"] for block in state.params["layers"] if "up" in block)
        assert up.addressable_shards[0].data.shape == (2, 32, 16)  # e d f
        places = jax.tree.map(lambda x: x.sharding, state)
        state, _ = train.update(optimizer, state, gradients, RATES, True)
        stayed = lambda x, place: x.sharding.is_equivalent_to(place, x.ndim)
        assert all(jax.tree.leaves(jax.tree.map(stayed, state, places)))
