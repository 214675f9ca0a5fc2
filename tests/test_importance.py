"""Importance: what scores mean, and that a pass can be split, padded and resumed.

Batches share few shapes, because each shape compiles once.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import axes
from elastic_jax.axes import AXES
from elastic_jax.importance import (
    add,
    calibrate,
    depth_importance,
    finish,
    importance,
    init,
)
from elastic_jax.scores import EXPERT_METRICS, Scores

WIDTHS = [axis for axis in AXES if axis != "layers"]


def config(**changes):
    sizes = {
        "pattern": "ME*-",
        "vocab": 16,
        "embed": 32,
        "ssm_groups": 2,
        "heads_per_group": 3,
        "ssm_head_dim": 16,
        "ssm_state": 16,
        "kv_heads": 2,
        "q_per_kv": 3,
        "head_dim": 8,
        "experts": 4,
        "expert_ffn": 16,
        "shared_ffn": 16,
        "ffn": 16,
        "top_k": 2,
    }
    return ej.ModelConfig(**(sizes | changes))


CFG = config()


@pytest.fixture(scope="module")
def params():
    return parent(CFG)


def parent(cfg, seed=0):
    """Parameters by NumPy, which compiles nothing: near their starts, none the same."""
    rng = np.random.default_rng(seed)
    draw = {"ones": lambda n: 1 + 0.1 * n, "fan_in": lambda n: 0.3 * n}

    def leaf(path, spec):
        noise = rng.normal(size=axes.shape(cfg, ej.param_specs(cfg), path, spec))
        return jnp.asarray(draw.get(spec.init, lambda n: 0.1 * n)(noise), jnp.float32)

    return axes.map_specs(leaf, ej.param_specs(cfg))


apply = jax.jit(ej.apply, static_argnums=2)


def text(cfg=CFG, rows=4, seed=1):
    return jax.random.randint(jax.random.key(seed), (rows, 7), 0, cfg.vocab)


@jax.jit
def seen_by_taps(params, tokens):
    """(layer, name) -> value of one plain forward pass of CFG."""
    seen = {}

    def tap(layer, name, value):
        seen[layer, name] = value

    ej.hidden_states(params, tokens, CFG, tap=tap)
    return seen


def replaced(params, layer, **leaves):
    layers = list(params["layers"])
    layers[layer] = layers[layer] | leaves
    return params | {"layers": tuple(layers)}


def assert_same(a, b, rtol=0.0):
    """Equal, or to rounding: a small sum is judged beside the largest."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        atol = rtol * 1e-2 * np.max(np.abs(y), initial=0)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def test_scores_have_the_shapes_that_ranking_and_permuting_take(params):
    scores = importance(params, [text()], CFG)
    assert list(scores) == WIDTHS
    for axis in scores:
        owners = tuple(getattr(CFG, owner) for owner in AXES[axis].owners)
        assert isinstance(scores[axis], tuple) == bool(AXES[axis].blocks)
        for score in jax.tree.leaves(scores[axis]):
            assert score.shape == (*owners, getattr(CFG, axis))
            assert score.dtype == jnp.float32
    specs = ej.param_specs(CFG)
    permuted = jax.eval_shape(
        lambda p: ej.permute_params(p, specs, ej.rank(scores)), params
    )
    assert jax.tree.map(jnp.shape, permuted) == jax.tree.map(jnp.shape, params)


def scaled_unit(params, axis, factor):
    """The parent with what unit 1 of an axis writes (query head: asks) scaled."""

    def at(layer, **units):
        held = params["layers"][layer]
        scaled = {n: held[n].at[unit].multiply(factor) for n, unit in units.items()}
        return replaced(params, layer, **scaled)

    if axis == "embed":
        layers = [
            held | {"norm": held["norm"].at[1].multiply(factor)}
            for held in params["layers"]
        ]
        norm = params["final_norm"].at[1].multiply(factor)
        return params | {"layers": tuple(layers), "final_norm": norm}
    return {
        "heads_per_group": lambda: at(0, x=np.s_[:, :, 1]),
        "ssm_head_dim": lambda: at(0, x=np.s_[..., 1]),
        "ssm_state": lambda: at(0, B=np.s_[..., 1]),
        "experts": lambda: at(1, down=np.s_[1]),
        "expert_ffn": lambda: at(1, up=np.s_[:, :, 1]),
        "shared_ffn": lambda: at(1, shared_up=np.s_[:, 1]),
        "q_per_kv": lambda: at(2, q=np.s_[:, :, 1]),
        "ffn": lambda: at(3, up=np.s_[:, 1]),
    }[axis]()


@pytest.mark.parametrize("aggregate", ["mean_l2", "sum"])
@pytest.mark.parametrize("axis", WIDTHS)
def test_a_silent_unit_ranks_last_and_a_loud_one_first(params, axis, aggregate):
    # A silenced query head attends everywhere alike, so its values average out.
    batches = [text()]
    for factor, place in ((0.0, -1), (30.0, 0)):
        changed = scaled_unit(params, axis, factor)
        scores = importance(changed, batches, CFG, aggregate=aggregate)
        rank = np.concatenate([
            np.asarray(r).reshape(-1, r.shape[-1])
            for r in jax.tree.leaves(ej.rank({axis: scores[axis]}))
        ])
        assert (rank[:, place] == 1).all()


def test_width_scores_equal_their_definitions(params):
    # Causality: the short row sees what the same row sees in the longer batch.
    tokens = text()
    batches = [tokens[:2], tokens[2:3, :4]]
    seen = jax.device_get(seen_by_taps(params, tokens))
    means = importance(params, batches, CFG)
    sums = importance(params, batches, CFG, aggregate="sum")
    close = {"rtol": 1e-4, "atol": 1e-6}

    def rows(a):
        return np.abs(a[0]), np.abs(a[1]), np.abs(a[2, :4])

    def mean_l2(a):
        return np.sqrt(sum(row.mean(0) ** 2 for row in rows(a)))

    ffn = seen[3, "ffn"]
    np.testing.assert_allclose(means["ffn"][0], mean_l2(ffn), **close)
    total = sum(row.sum(0) for row in rows(ffn))
    np.testing.assert_allclose(sums["ffn"][0], total, **close)
    norms = sum(mean_l2(seen[i, "embed"]) for i in range(CFG.layers + 1))
    np.testing.assert_allclose(means["embed"], norms, **close)
    query = np.linalg.norm(mean_l2(seen[2, "q_per_kv"]), axis=-1)
    np.testing.assert_allclose(means["q_per_kv"][0], query, **close)

    x = mean_l2(seen[0, "heads_per_group"])
    channels = np.sqrt((x**2).sum((0, 1)))
    best = np.argsort(-channels)[: CFG.ssm_head_dim // 2]
    heads = np.linalg.norm(x[..., best], axis=-1)
    np.testing.assert_allclose(means["ssm_head_dim"][0], channels, **close)
    np.testing.assert_allclose(means["heads_per_group"][0], heads, **close)
    B, C = (mean_l2(seen[0, name]) for name in ("ssm_B", "ssm_state"))
    state = np.linalg.norm(B, axis=0) * np.linalg.norm(C, axis=0)
    np.testing.assert_allclose(means["ssm_state"][0], state, **close)


def test_expert_scores_equal_a_loop_over_tokens(params):
    # The last expert can never be chosen.
    bias = jnp.zeros(CFG.experts).at[-1].set(-10.0)
    params, tokens = replaced(params, 1, router_bias=bias), text()
    seen = jax.device_get(seen_by_taps(params, tokens))
    experts, gates, output = seen[1, "experts"]
    np.testing.assert_allclose(gates.sum(-1), 1, rtol=1e-5)

    mass, routed = np.zeros(CFG.experts), np.zeros(CFG.experts)
    neurons = np.zeros((len(tokens), CFG.experts, CFG.expert_ffn))
    for b, t, c in np.ndindex(experts.shape):
        e = experts[b, t, c]
        mass[e] += gates[b, t, c] * np.linalg.norm(output[b, t, c])
        routed[e] += 1
        neurons[b, e] += seen[1, "expert_ffn"][b, t, c] / tokens.shape[1]

    scores = importance(params, [tokens[:2], tokens[2:]], CFG)
    by_hand = {
        "reap": mass / np.maximum(routed, 1),
        "mass": mass,
        "frequency": routed / routed.sum(),
    }
    for metric in EXPERT_METRICS:
        got = scores.with_experts(metric)
        np.testing.assert_allclose(got["experts"][0], by_hand[metric], rtol=1e-5)
        assert got.provenance["experts"] == metric
    np.testing.assert_allclose(scores["experts"][0], by_hand["reap"], rtol=1e-5)
    assert scores.never_routed == ((CFG.experts - 1,),)
    want = np.sqrt((neurons**2).sum(0))
    np.testing.assert_allclose(scores["expert_ffn"][0], want, rtol=1e-4, atol=1e-6)


def test_expert_groups_have_no_expert_scores():
    cfg = config(pattern="E", n_group=2, topk_group=1)
    params = parent(cfg)
    scores = importance(params, [text(cfg)], cfg)
    assert list(scores) == ["expert_ffn", "shared_ffn", "embed"]
    with pytest.raises(ValueError, match="not elastic"):
        scores.with_experts("mass")


@pytest.mark.parametrize("aggregate", ["mean_l2", "sum"])
def test_splitting_batches_changes_nothing(params, aggregate):
    tokens = text()
    whole = importance(params, [tokens], CFG, aggregate=aggregate)
    halves = importance(params, [tokens[:2], tokens[2:]], CFG, aggregate=aggregate)
    assert halves.provenance == whole.provenance
    assert_same(halves, whole, rtol=1e-5)

    state = add(init(CFG), params, tokens[:2], CFG)
    continued = importance(
        params, [tokens[2:]], CFG, state=state, aggregate=aggregate
    )
    assert_same(continued, halves)


def test_tokens_that_do_not_count_do_not_matter(params):
    """Neither padding behind a length, whatever it holds, nor tokens marked invalid."""
    tokens = np.array(text())
    alone = importance(params, [tokens[:2], tokens[2:3, :4]], CFG)
    batch = {
        "tokens": np.concatenate([tokens, np.full((4, 4), 999)], axis=1),
        "lengths": np.array([7, 7, 6, 0]),
        "valid": np.arange(11) < np.array([[11], [11], [4], [11]]),
    }
    together = importance(params, [batch], CFG)
    assert together.provenance == alone.provenance
    assert together.provenance["sequences"] == 3
    assert together.provenance["tokens"] == 18
    assert_same(together, alone, rtol=1e-4)


def test_packed_documents_score_as_if_alone(params):
    tokens = text(rows=2)
    packed = {
        "tokens": tokens.reshape(1, -1),
        "segment_ids": np.repeat([[1, 2]], tokens.shape[1], axis=1),
    }
    alone = importance(params, [tokens], CFG, aggregate="sum")
    together = importance(params, [packed], CFG, aggregate="sum")
    assert_same(together.by_axis, alone.by_axis, rtol=1e-4)


def test_a_submodel_with_a_width_per_layer_is_scored():
    cfg = config(pattern="EME")
    params = parent(cfg)
    counts = ej.counts(cfg, experts=(4, 3), heads_per_group=2, embed=16)
    small = ej.slice_params(params, ej.param_specs(cfg), counts)
    scores = importance(small, [text()], ej.slice_config(cfg, counts))
    assert [s.shape for s in scores["experts"]] == [(4,), (3,)]
    assert [s.shape for s in scores["heads_per_group"]] == [(2, 2)]
    assert scores["embed"].shape == (16,)


def test_scores_survive_being_stored(params):
    scores = importance(params, [text()], CFG, provenance={"data": "ab12"})
    assert scores.provenance["data"] == "ab12"
    arrays, provenance = scores.to_arrays()
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    back = Scores.from_arrays(arrays, json.loads(json.dumps(provenance)))
    assert_same(back, scores)
    assert list(back) == list(scores)
    assert_same(jax.jit(ej.rank)(scores), ej.rank(back))


class Killed(Exception):
    pass


def killed_after(batches):
    """An `on_batch` that ends the pass after so many batches."""
    left = iter(range(batches - 1, -1, -1))

    def on_batch(state):
        if next(left) == 0:
            raise Killed

    return on_batch


@pytest.mark.parametrize("batches_before", [1, 2, 3, 5])
def test_resumed_equals_uninterrupted_bit_for_bit(params, tmp_path, batches_before):
    batches = [text(rows=2, seed=seed) for seed in range(5)]
    want = importance(params, batches, CFG)
    path = tmp_path / "importance.npz"
    options = {"path": path, "save_every": 2, "provenance": {"data": "x"}}
    with pytest.raises(Killed):
        kill = killed_after(batches_before)
        calibrate(params, batches, CFG, on_batch=kill, **options)
    (tmp_path / "importance.npz.partial").write_bytes(b"killed while writing")

    computed = []
    got = calibrate(params, batches, CFG, on_batch=computed.append, **options)
    assert len(computed) == 5 - batches_before // 2 * 2
    assert_same(got.to_arrays()[0], want.to_arrays()[0])
    assert got.provenance["batches"] == 5 and got.provenance["data"] == "x"

    again = calibrate(params, batches, CFG, on_batch=killed_after(1), **options)
    assert_same(again, got)
    assert again.provenance == got.provenance


def test_a_calibration_is_continued_only_where_it_belongs(params, tmp_path):
    batches = [text(rows=2, seed=seed) for seed in range(3)]
    path = tmp_path / "importance.npz"
    options = {"path": path, "provenance": {"data": "x"}}
    calibrate(params, batches, CFG, **options)
    held = path.read_bytes()

    def refused(message, params=params, batches=batches, cfg=CFG, **changes):
        with pytest.raises(ValueError, match=message) as error:
            calibrate(params, batches, cfg, **(options | changes))
        assert str(path) in str(error.value)

    other = parent(CFG, seed=9)
    refused("params was", params=other)
    refused("config was", cfg=config(norm_eps=1e-4))
    refused("provenance was", provenance={"data": "y"})
    refused("are not those given", batches=[batches[1], batches[0], batches[2]])
    refused("has seen 3 batches, only 2", batches=batches[:2])
    assert path.read_bytes() == held
    for damaged in (b"", held[: len(held) // 2], b"no file of this kind"):
        path.write_bytes(damaged)
        refused("damaged")
    flipped = bytearray(held)
    flipped[held.index(b"\x93NUMPY") + 200] ^= 1
    path.write_bytes(flipped)
    refused("damaged")


def test_depth_removes_identity_blocks_first_and_measures_logits():
    cfg = config(pattern="M-*-")
    params = parent(cfg)
    params = replaced(params, 1, down=jnp.zeros((cfg.ffn, cfg.embed)))
    tokens = text(cfg)
    batches = [{"tokens": tokens[:1], "lengths": np.array([5])}, tokens[1:]]
    steps = []
    scores = depth_importance(
        params, batches, cfg, on_step=lambda *step: steps.append(step)
    )
    order = [block for block, _ in steps]
    assert sorted(order) == list(range(cfg.layers))
    assert order[0] == 1 and steps[0][1] == 0
    assert [float(scores[block]) for block in order] == [0, 1, 2, 3]
    assert ej.keep_layers(ej.rank({"layers": scores}), 3) == (1, 0, 1, 1)

    def logits(keep):
        masks = {"layers": jnp.asarray(keep, jnp.float32)}
        y = apply(params, tokens, cfg, masks=masks)
        return np.concatenate([y[0, :5], *y[1:]])

    full, keep = logits([1] * 4), np.ones(4)
    for removed, error in steps:
        errors = {}
        for block in np.flatnonzero(keep):
            without = np.where(np.arange(4) == block, 0, keep)
            errors[block] = ((full - logits(without)) ** 2).sum() / (full**2).sum()
        assert removed == min(errors, key=errors.get)
        np.testing.assert_allclose(error, errors[removed], rtol=1e-4, atol=1e-9)
        keep[removed] = 0


def test_one_executable_serves_all_batches(params):
    from elastic_jax.importance import _add

    importance(params, [text()], CFG)
    before = _add._cache_size()
    importance(params, [text(seed=seed) for seed in range(3)], CFG)
    assert _add._cache_size() == before


def test_what_is_wrong_is_said_at_once(params):
    bad = {
        "tokens": np.zeros((2, 3)),
        "lengths": np.array([1, 2, 3]),
        "token": 1,
    }
    with pytest.raises(ValueError) as error:
        add(init(CFG), params, bad, CFG)
    for words in ("did you mean 'tokens'", "expected integers", "lengths: expected"):
        assert words in str(error.value)
    for batch, words in (
        (np.full((1, 2), CFG.vocab), "expected 0..15, got 16..16"),
        ({"tokens": np.zeros((1, 2), int), "lengths": np.array([3])}, "0..2"),
        (np.zeros(3, int), "b, t"),
    ):
        with pytest.raises(ValueError, match=words):
            add(init(CFG), params, batch, CFG)

    with pytest.raises(ValueError, match="did you mean 'reap'.*|aggregate.*mean"):
        importance(params, [], CFG, aggregate="mean", experts="reep")
    with pytest.raises(ValueError, match="no valid token"):
        importance(params, [], CFG)
    with pytest.raises(ValueError, match="no batch"):
        depth_importance(params, [], CFG)
    state = add(init(CFG), params, text(), CFG)
    with pytest.raises(ValueError, match="'tokens'.* other names"):
        finish(state, CFG, provenance={"tokens": 5})
    with pytest.raises(ValueError, match="plain values"):
        finish(state, CFG, provenance={"data": object()})
    broken = replaced(params, 3, up=jnp.full((CFG.embed, CFG.ffn), jnp.inf))
    with pytest.raises(ValueError, match="embed in layer 4, ffn in layer 3"):
        importance(broken, [text()], CFG)
