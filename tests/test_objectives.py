"""Mixed prefixes: one budget reads, another answers, as if a cache had changed hands.

The other objectives are tested where their steps are, in `test_train.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import axes, nesting, objectives, train
from elastic_jax.curriculum import Stage, sample_pairs
from elastic_jax.elastic import Elastic
from elastic_jax.router import make_router

CFG = ej.ModelConfig(
    pattern="M*",
    vocab=16,
    embed=32,
    ssm_groups=2,
    heads_per_group=2,
    ssm_head_dim=16,
    ssm_state=32,
    kv_heads=1,
    q_per_kv=2,
    head_dim=8,
    experts=4,
    expert_ffn=16,
    shared_ffn=16,
    ffn=16,
    top_k=2,
)
COUNTS = {
    "full": ej.counts(CFG),
    "mid": ej.counts(CFG, heads_per_group=1, ssm_state=16),
    "small": ej.counts(CFG, embed=16, ssm_state=16, q_per_kv=1),
}
NAMES = tuple(COUNTS)
SEGMENT = 6  # tokens of a problem; two are packed into a row
STAGE = Stage(
    "mixed", context=2 * SEGMENT, batch=4, micro_batch=2, learning_rate=1e-3,
    steps=9, router="frozen", mixed_prefixes=1.0
)  # fmt: skip


def random_params(seed):
    rng, specs = np.random.default_rng(seed), ej.param_specs(CFG)

    def draw(path, spec):
        noise = rng.standard_normal(axes.shape(CFG, specs, path, spec))
        if spec.contracted:
            noise /= np.sqrt(np.prod([getattr(CFG, d) for d in spec.contracted]))
            return jnp.asarray(noise, jnp.float32)
        return jnp.asarray((spec.init == "ones") + 0.3 * noise, jnp.float32)

    return axes.map_specs(draw, specs)


@pytest.fixture(scope="module")
def elastic():
    offered = ej.ElasticConfig((("embed", (32, 16)),))
    budgets = tuple((name, ej.Budget(1 - i / 4)) for i, name in enumerate(NAMES))
    router = make_router(CFG, offered, len(budgets), hidden=8)
    return Elastic(CFG, random_params(0), router, budgets, seed=5)


@pytest.fixture(scope="module")
def state(elastic):
    return train.init_state(random_params(1), train.optimizer(elastic.specs))


@pytest.fixture(scope="module")
def batch():
    rng, shape = np.random.default_rng(2), (STAGE.batch, STAGE.context)
    # Of each problem the answer begins somewhere else, in one at its last token.
    switch = np.array([1, 5, 3, 2, 4, 2, 5, 3]).reshape(-1, 2, 1)
    return {
        "tokens": rng.integers(0, CFG.vocab, shape, np.int32),
        "targets": rng.integers(0, CFG.vocab, shape, np.int32),
        "segment_ids": np.repeat([[1, 2]] * STAGE.batch, SEGMENT, 1).astype(np.int32),
        "weights": rng.random(shape).astype(np.float32),
        "answer": (np.arange(SEGMENT) >= switch).reshape(shape),
    }


@functools.partial(jax.jit, static_argnums=(3,))
def extend(params, tokens, cache, cfg, lengths):
    return ej.extend(params, tokens, cache, cfg, lengths=lengths)


def relay(params, tokens, switch, first, second):
    """Logits [n, t, v]: the first slice reads up to the switch, the second goes on."""
    specs, logits = ej.param_specs(CFG), np.zeros((*tokens.shape, CFG.vocab))
    cache, start = None, np.zeros(len(tokens), int)
    for name, end in ((first, switch), (second, np.full(len(tokens), SEGMENT))):
        small = ej.slice_params(params, specs, COUNTS[name])
        cfg = ej.slice_config(CFG, COUNTS[name])
        empty = ej.init_cache(cfg, len(tokens), SEGMENT)
        cache = empty if cache is None else nesting.resized(cache, empty)
        ahead = np.stack([np.roll(t, -n) for t, n in zip(tokens, start, strict=True)])
        y, cache = extend(small, ahead, cache, cfg, end - start)
        for row, (a, b) in enumerate(zip(start, end, strict=True)):
            logits[row, a:b] = y[row, : b - a]
        start = end
    return logits


def split(array):
    """One row per problem."""
    return np.asarray(array).reshape(-1, SEGMENT)


def step_with(pair):
    """A step of `STAGE` whose first micro-batch has this pair, by places."""
    drawn = (sample_pairs(5, step, STAGE, 3)[0].tolist() for step in range(200))
    return next(step for step, found in enumerate(drawn) if found == list(pair))


@pytest.mark.parametrize(
    "first, second", [(0, 2), (2, 0), (1, 2), (2, 1)], ids=lambda i: NAMES[i]
)
def test_the_loss_is_that_of_a_transplant(elastic, state, batch, first, second):
    """Of every packed problem: the state that one left is what the other reads."""
    objective = objectives.mixed_objective(elastic, STAGE, COUNTS)
    at = state._replace(step=jnp.asarray(step_with((first, second))))
    (name, loss), _ = objective.gradients(at, batch, 0)[1]
    assert name == f"{NAMES[first]}-to-{NAMES[second]}"

    rows = {key: split(value[: STAGE.micro_batch]) for key, value in batch.items()}
    tokens, switch = rows["tokens"], SEGMENT - rows["answer"].sum(1)
    student = relay(state.params, tokens, switch, NAMES[first], NAMES[second])
    teacher = relay(elastic.teacher, tokens, switch, "full", "full")
    p, q = (np.asarray(jax.nn.log_softmax(y)) for y in (teacher, student))
    kl = np.sum(np.exp(p) * (p - q), -1)
    expected = np.average(kl, weights=rows["weights"])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    # Either submodel alone is far from it.
    for alone in (first, second):
        y = relay(state.params, tokens, switch, NAMES[alone], NAMES[alone])
        assert np.abs(y - student).max() > 1e-2


def test_a_budget_mixed_with_itself_is_the_slice(elastic, state, batch):
    """Loss and gradients are those of the sliced step, zero outside of the prefix."""
    stage = dataclasses.replace(STAGE, mixed_prefixes=0.0, sampling=(0.0, 1.0, 1.0))
    found, expected = (
        make(elastic, stage, COUNTS).gradients(state, batch, 0)
        for make in (objectives.mixed_objective, objectives.sliced_objective)
    )
    names = [name for name, _ in found[1]]
    assert names == [name for name, _ in expected[1]]
    assert sorted(names) == ["mid", "small"]
    for (_, got), (_, want) in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    for got, want in zip(*map(jax.tree.leaves, (found[0], expected[0])), strict=True):
        scale = np.abs(want).max() + 1e-9
        np.testing.assert_allclose(got / scale, want / scale, atol=1e-5)
        assert not np.any(np.asarray(got)[np.asarray(want) == 0])


def test_one_executable_serves_the_stage(elastic, state, batch):
    """All pairs, all shares and other counts of the same axes."""
    seen, compiled = set(), None
    other = COUNTS | {"small": ej.counts(CFG, **{**COUNTS["small"], "embed": 32})}
    half = dataclasses.replace(STAGE, mixed_prefixes=0.5, learning_rate=1e-2)
    for stage, counts in ((STAGE, COUNTS), (half, other)):
        objective = objectives.mixed_objective(elastic, stage, counts)
        for step in range(12):
            at = state._replace(step=jnp.asarray(step))
            seen |= {name for name, _ in objective.gradients(at, batch, step)[1]}
            compiled = compiled or train.accumulate._cache_size()
    assert train.accumulate._cache_size() == compiled
    mixed = {f"{a}-to-{b}" for a in NAMES for b in NAMES if a != b}
    assert mixed <= seen and seen & set(NAMES)


def test_budgets_that_keep_different_blocks_are_refused(elastic):
    counts = COUNTS | {"small": ej.counts(CFG, layers=(1, 0), embed=16)}
    with pytest.raises(ValueError) as error:
        objectives.mixed_objective(elastic, STAGE, counts)
    for said in ("'mixed'", "full 11", "small 10", "mixed_prefixes to 0"):
        assert said in str(error.value)
    without = dataclasses.replace(STAGE, sampling=(1.0, 1.0, 0.0))
    objectives.mixed_objective(elastic, without, counts)
    alike = {name: ej.counts(CFG, layers=(1, 0)) for name in NAMES}
    objectives.mixed_objective(elastic, STAGE, alike)


def test_what_cannot_mix_is_refused(elastic, state, batch):
    with pytest.raises(ValueError, match="'mixed'.*use mixed_objective"):
        objectives.sliced_objective(elastic, STAGE, COUNTS)
    objective = objectives.mixed_objective(elastic, STAGE, COUNTS)
    batch = {name: rows for name, rows in batch.items() if name != "answer"}
    with pytest.raises(ValueError, match="'mixed': rows without answer"):
        objective.gradients(state, batch, 0)
