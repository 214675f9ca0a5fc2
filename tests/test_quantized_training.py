"""Quantized training: the loss is that of the slice that will be stored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import axes, train
from elastic_jax.curriculum import Stage
from elastic_jax.elastic import Elastic
from elastic_jax.objectives import divergence
from elastic_jax.quantize import Recipe, meets_activations
from elastic_jax.quantized_training import QuantizedTraining, quantized_objective
from elastic_jax.router import make_router

CFG = ej.ModelConfig(
    pattern="ME*",
    vocab=16,
    embed=32,
    ssm_groups=2,
    heads_per_group=2,
    ssm_head_dim=16,
    ssm_state=16,
    kv_heads=1,
    q_per_kv=2,
    head_dim=16,
    experts=4,
    expert_ffn=32,
    shared_ffn=32,
    ffn=16,
    top_k=2,
)
SPECS = ej.param_specs(CFG)
COUNTS = {
    "full": ej.counts(CFG),
    "small": ej.counts(CFG, embed=16, heads_per_group=1, expert_ffn=16, experts=3),
}
STAGE = Stage(
    "qad", context=12, batch=2, micro_batch=2, learning_rate=1e-3, steps=9,
    router="frozen", sampling=(0.0, 1.0)
)  # fmt: skip


def recipe(format="nvfp4"):
    """All products, the head too."""
    return Recipe(format, (("*", format),))


def random_params(seed):
    rng = np.random.default_rng(seed)

    def draw(path, spec):
        noise = rng.standard_normal(axes.shape(CFG, SPECS, path, spec))
        if spec.contracted:
            noise /= np.sqrt(np.prod([getattr(CFG, d) for d in spec.contracted]))
            return jnp.asarray(noise, jnp.float32)
        return jnp.asarray((spec.init == "ones") + 0.3 * noise, jnp.float32)

    return axes.map_specs(draw, SPECS)


@pytest.fixture(scope="module")
def elastic():
    offered = ej.ElasticConfig((("embed", (32, 16)),))
    budgets = tuple((name, ej.Budget(1 - i / 4)) for i, name in enumerate(COUNTS))
    router = make_router(CFG, offered, len(budgets), hidden=8)
    return Elastic(CFG, random_params(0), router, budgets)


@pytest.fixture(scope="module")
def state(elastic):
    return train.init_state(random_params(1), train.optimizer(elastic.specs))


@pytest.fixture(scope="module")
def batch():
    rng, shape = np.random.default_rng(2), (STAGE.batch, STAGE.context)
    return {
        "tokens": rng.integers(0, CFG.vocab, shape, np.int32),
        "targets": rng.integers(0, CFG.vocab, shape, np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "weights": rng.random(shape).astype(np.float32),
    }


@pytest.fixture(scope="module")
def inputs():
    """Largest magnitudes of all activations, too small for some of them."""
    each = {path: spec for path, spec in SPECS if meets_activations(spec)}
    return {
        path: jnp.full((CFG.experts,) if spec.batch else (), 1.5)
        for path, spec in each.items()
    }


@functools.partial(jax.jit, static_argnums=2)
def logits(params, tokens, cfg):
    return ej.apply(params, tokens, cfg)


def sliced(params, name):
    return ej.slice_params(params, SPECS, COUNTS[name]), ej.slice_config(
        CFG, COUNTS[name]
    )


def mean_kl(taught, learnt, weights):
    p, q = (jax.nn.log_softmax(np.asarray(x, np.float64)) for x in (taught, learnt))
    return np.sum(weights * np.sum(np.exp(p) * (p - q), -1)) / weights.sum()


def run(elastic, training, state, batch, **options):
    objective = quantized_objective(elastic, STAGE, COUNTS, training, **options)
    gradient, [(name, loss)] = objective.gradients(state, batch, 0)
    assert name == "small"
    return gradient["params"], loss


@pytest.mark.parametrize("teacher", ["same_budget", "parent"])
@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_the_loss_is_that_of_the_slice_that_is_stored(
    format, teacher, elastic, state, batch, inputs
):
    """Weights and activations rounded, the head too, under the scales of the parent."""
    training = QuantizedTraining(recipe(format), teacher=teacher)
    _, loss = run(elastic, training, state, batch, input_largest=inputs)
    stored = ej.quantize(state.params, SPECS, CFG, recipe(format), input_largest=inputs)
    assert all(
        axes.leaf(stored, path).input_scale is not None for path in inputs
    )  # all of them
    small, cfg = sliced(stored, "small")
    taught, taught_cfg = elastic.teacher, CFG
    if teacher == "same_budget":
        taught, taught_cfg = sliced(taught, "small")
    pair = [
        logits(params, batch["tokens"], c)
        for params, c in ((taught, taught_cfg), (small, cfg))
    ]
    np.testing.assert_allclose(loss, mean_kl(*pair, batch["weights"]), rtol=1e-4)
    if teacher == "parent":
        got = divergence(taught, small, cfg, [batch], teacher_cfg=taught_cfg)
        np.testing.assert_allclose(got, loss, rtol=1e-4)


def test_cross_entropy_is_on_the_data(elastic, state, batch):
    training = QuantizedTraining(recipe("fp8"), loss="cross_entropy")
    _, loss = run(elastic, training, state, batch)
    stored = ej.quantize(state.params, SPECS, CFG, recipe("fp8"))
    small, cfg = sliced(stored, "small")
    log_q = jax.nn.log_softmax(logits(small, batch["tokens"], cfg))
    each = np.take_along_axis(np.asarray(log_q), batch["targets"][..., None], -1)
    want = -np.sum(batch["weights"] * each[..., 0]) / batch["weights"].sum()
    np.testing.assert_allclose(loss, want, rtol=1e-4)


def test_gradients_go_straight_through_and_stay_in_the_prefix(elastic, state, batch):
    """As at the rounded weights, where nothing is rounded any more."""
    training = QuantizedTraining(recipe())
    gradient, _ = run(elastic, training, state, batch)
    near = ej.dequantize(ej.quantize(state.params, SPECS, CFG, recipe()))
    kept = ej.Recipe("fp8", (("*", "keep"),))
    at = train.init_state(near, train.optimizer(elastic.specs))
    want, _ = run(elastic, QuantizedTraining(kept), at, batch)
    for got, expected in zip(*map(jax.tree.leaves, (gradient, want)), strict=True):
        largest = float(jnp.max(jnp.abs(expected)))
        np.testing.assert_allclose(got, expected, atol=1e-4 * largest + 1e-9)
    inside = ej.slice_params(gradient, SPECS, COUNTS["small"])
    inside = sum(float(jnp.sum(jnp.abs(g))) for g in jax.tree.leaves(inside))
    everywhere = sum(float(jnp.sum(jnp.abs(g))) for g in jax.tree.leaves(gradient))
    assert inside > 0
    np.testing.assert_allclose(inside, everywhere, rtol=1e-5)


def test_frozen_scales_are_those_of_the_tree(elastic, state, batch, inputs):
    """The tree of other weights: what is under its scales saturates."""
    before = jax.tree.map(lambda w: 0.5 * w, state.params)
    like = ej.quantize(before, SPECS, CFG, recipe(), input_largest=inputs)
    frozen = QuantizedTraining(recipe(), scales="frozen")
    _, loss = run(elastic, frozen, state, batch, like=like)
    stored = ej.quantize(state.params, SPECS, CFG, recipe(), like=like, frozen=True)
    small, cfg = sliced(stored, "small")
    teacher, _ = sliced(elastic.teacher, "small")
    pair = [logits(p, batch["tokens"], cfg) for p in (teacher, small)]
    np.testing.assert_allclose(loss, mean_kl(*pair, batch["weights"]), rtol=1e-4)
    anew = QuantizedTraining(recipe())
    _, other = run(elastic, anew, state, batch, input_largest=inputs)
    assert abs(other - loss) > 1e-3 * loss


def test_what_does_not_fit_is_said(elastic, inputs):
    plain = QuantizedTraining(recipe())
    frozen = QuantizedTraining(recipe(), scales="frozen")
    like = ej.quantize(random_params(0), SPECS, CFG, recipe())

    def refused(message, training=plain, stage=STAGE, **options):
        with pytest.raises(ValueError, match=message):
            quantized_objective(elastic, stage, COUNTS, training, **options)

    refused("'frozen', and a tree that has them is not given", frozen)
    refused("'recomputed', and a tree that has them is given", like=like)
    both = {"like": like, "input_largest": inputs}
    refused("a tree `like` has input scales of its own", frozen, **both)
    fields = {"context": 12, "batch": 2, "micro_batch": 2, "learning_rate": 1e-3}
    refused("router='frozen'", stage=Stage("s", **fields, steps=1))
    with pytest.raises(ValueError, match=r"(?s)scales: .*'warm'.*teacher: .*'none'"):
        QuantizedTraining(recipe(), scales="warm", teacher="none")
