"""The model: causal, and blind to whatever is no token of a row's own document.

That it is Nemotron-H is `test_released_model.py`; that masks, slices and caches agree
is `test_laws.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import axes

CFG = ej.ModelConfig(
    pattern="M*E-",
    vocab=13,
    embed=16,
    ssm_groups=2,
    heads_per_group=3,
    ssm_head_dim=4,
    ssm_state=5,
    kv_heads=2,
    q_per_kv=3,
    head_dim=4,
    experts=8,
    expert_ffn=6,
    shared_ffn=7,
    ffn=9,
    top_k=3,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    norm_eps=1e-5,
)
TIGHT = {"rtol": 1e-10, "atol": 1e-12}

@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@functools.cache
def parameters(cfg):
    """Random float64 weights; norms, biases and D away from their plain starts."""
    specs, rng = ej.param_specs(cfg), np.random.default_rng(1)

    def draw(path, spec):
        noise = rng.standard_normal(axes.shape(cfg, specs, path, spec))
        if spec.contracted:
            fan = np.prod([getattr(cfg, dim) for dim in spec.contracted])
            return noise * (1 if spec.init == "embedding" else fan**-0.5)
        return (spec.init == "ones") + 0.3 * noise

    return axes.map_specs(draw, specs)


def texts(rows=3, time=12, seed=3):
    return np.random.default_rng(seed).integers(0, CFG.vocab, (rows, time))


@functools.partial(jax.jit, static_argnums=2)
def forward(params, text, cfg, segment_ids=None, lengths=None):
    return ej.apply(params, text, cfg, segment_ids=segment_ids, lengths=lengths)


def read(text, segment_ids=None, lengths=None):
    """`forward` of CFG, compiled once: options that are left out say nothing."""
    rows, time = text.shape
    segment_ids = np.zeros((rows, time), int) if segment_ids is None else segment_ids
    lengths = np.full(rows, time) if lengths is None else np.asarray(lengths)
    return forward(parameters(CFG), text, CFG, segment_ids, lengths)


@functools.cache
def gradients(remat, at=7):
    """Of one position's hidden state; every token of the text is another one."""
    text = jnp.arange(12)[None]

    @jax.jit
    @jax.grad
    def of(params):
        x = ej.hidden_states(params, text, CFG, remat=remat)
        return jnp.sum(jnp.sin(x[:, at]))

    return of(parameters(CFG))


def test_no_token_sees_a_later_one():
    seen = gradients(remat=False)["embedding"].any(axis=-1)
    assert seen[:8].all() and not seen[8:].any()


def test_rematerialisation_changes_no_gradient():
    pairs = zip(*(jax.tree.leaves(gradients(remat=r)) for r in (True, False)),
                strict=True)
    for got, want in pairs:
        np.testing.assert_allclose(got, want, **TIGHT)


def test_rematerialisation_is_not_tapped():
    with pytest.raises(ValueError, match="remat and tap"):
        ej.hidden_states({}, texts(), CFG, remat=True, tap=lambda *_: None)


def test_packed_documents_are_read_apart():
    """One row of several documents equals a right-padded row for each."""
    lengths = [5, 1, 6]
    documents = [row[:n] for row, n in zip(texts(seed=8), lengths, strict=True)]
    alone = read(texts(seed=8), lengths=lengths)
    orders = [(0, 1, 2), (2, 0, 1), (1, 2, 0)]
    packed = np.stack([np.concatenate([documents[i] for i in o]) for o in orders])
    ids = np.stack([np.repeat(order, [lengths[i] for i in order]) for order in orders])
    y = read(packed, segment_ids=ids)
    for row, order in enumerate(orders):
        want = np.concatenate([alone[i, : lengths[i]] for i in order])
        np.testing.assert_allclose(y[row], want, **TIGHT)
    assert np.abs(read(packed) - y).max() > 1e-2  # They would influence each other.


@pytest.mark.parametrize("padding", [-1, 12, 13, -(2**31), 2**31 - 1])
def test_padding_never_reaches_a_valid_token(padding):
    """Not even ids outside the vocabulary, which as tokens would give NaN."""
    text, lengths = texts(), np.array([12, 5, 1])
    padded = np.where(np.arange(12) < lengths[:, None], text, padding)
    y, whole = read(padded, lengths=lengths), read(text)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(y[row, :n], whole[row, :n], **TIGHT)


def test_a_padded_row_is_that_row_alone():
    text = texts()
    alone = forward(parameters(CFG), text[1:2, :5], CFG)
    np.testing.assert_allclose(read(text, lengths=[12, 5, 1])[1, :5], alone[0], **TIGHT)


def test_a_token_outside_the_vocabulary_is_loud_in_its_row_only():
    text = texts()
    clean = read(text)
    for wrong in (13, -1, -13, 10**6):
        y = read(np.where((np.arange(3) == 1)[:, None] & (np.arange(12) == 4),
                          wrong, text))
        assert np.isnan(y[1, 4:]).all()
        np.testing.assert_allclose(y[::2], clean[::2], **TIGHT)


@functools.partial(jax.jit, static_argnums=3)
def extend(params, text, cache, cfg, lengths=None):
    return ej.extend(params, text, cache, cfg, lengths=lengths)


def test_padding_leaves_nothing_in_the_cache():
    """The final states of a ragged batch are those of each row alone."""
    text, lengths = texts(time=6), np.array([6, 2, 0])
    cache = ej.init_cache(CFG, 3, 8, dtype=jnp.float64)
    padded = np.where(np.arange(6) < lengths[:, None], text, 10**6)
    y, ragged = extend(parameters(CFG), padded, cache, CFG, lengths)
    assert ragged["filled"].tolist() == [6, 2, 0]

    alone = ej.init_cache(CFG, 1, 8, dtype=jnp.float64)
    want, alone = extend(parameters(CFG), text[1:2, :2], alone, CFG)
    np.testing.assert_allclose(y[1, :2], want[0], **TIGHT)
    for got, row, start in zip(*map(jax.tree.leaves, (ragged, alone, cache)),
                               strict=True):
        np.testing.assert_allclose(got[1], row[0], **TIGHT)
        np.testing.assert_array_equal(got[2], start[2])


def test_a_full_cache_is_loud():
    """Rows whose keys were not stored get NaN, then and ever after; others do not."""
    cfg = ej.ModelConfig.from_dict(CFG.to_dict() | {"pattern": "-*"})
    params, text = parameters(cfg), texts(time=6)
    cache = ej.init_cache(cfg, 3, 5, dtype=jnp.float64)
    _, cache = extend(params, text[:, :3], cache, cfg, np.array([3, 3, 2]))
    fits = np.array([2, 3, 3])
    y, cache = extend(params, text[:, 3:], cache, cfg, fits)
    assert np.isnan(y[1]).all() and np.isfinite(y[::2]).all()
    np.testing.assert_allclose(y[0, :2], forward(params, text, cfg)[0, 3:5], **TIGHT)
    y, cache = extend(params, text[:, :3], cache, cfg, np.array([0, 0, 1]))
    assert np.isfinite(y[0]).all() and np.isnan(y[1:]).all()
    with pytest.raises(ValueError, match="6 tokens for a cache of length 5; make it"):
        extend(params, text, cache, cfg)


def test_without_attention_a_cache_has_no_end():
    cfg = ej.ModelConfig.from_dict(CFG.to_dict() | {"pattern": "M"})
    params, text = parameters(cfg), texts(time=6)
    cache = ej.init_cache(cfg, 3, 2, dtype=jnp.float64)
    y, cache = extend(params, text, cache, cfg)
    assert np.isfinite(y).all() and cache["filled"].tolist() == [6] * 3


def shaped(cfg, dtype):
    return jax.eval_shape(lambda: ej.init_params(jax.random.key(0), cfg, dtype=dtype))


@pytest.mark.parametrize("given, logits", [("float64", "float64"),
                                           ("float32", "float32"),
                                           ("bfloat16", "float32")])
def test_logits_are_at_least_float32(given, logits):
    params, text = shaped(CFG, given), jnp.asarray(texts())
    y = jax.eval_shape(lambda p: ej.apply(p, text, CFG), params)
    assert y.shape == (3, 12, 13) and y.dtype == logits
    x = jax.eval_shape(lambda p: ej.hidden_states(p, text, CFG), params)
    assert x.shape == (3, 12, 16) and x.dtype == given
    cache = ej.init_cache(CFG, 3, 12, dtype=given)
    step = lambda p: ej.extend(p, text, cache, CFG)
    y, after = jax.eval_shape(step, params)
    assert y.dtype == logits
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
        lambda a: (a.shape, a.dtype), cache
    )
    states = {a.dtype for a in jax.tree.leaves(cache["layers"])}
    assert states == {jnp.dtype(given), jnp.dtype(logits)}


def test_tokens_must_be_integers():
    with pytest.raises(ValueError, match="tokens must be integers, got float"):
        ej.apply(shaped(CFG, "float32"), jnp.zeros((1, 2)), CFG)


def test_a_tap_sees_every_activation_that_is_scored():
    seen = {}

    def tap(layer, name, value):
        assert (layer, name) not in seen
        shapes = jax.tree.map(lambda a: a.shape[2:], value)
        assert all(a.shape[:2] == (3, 12) for a in jax.tree.leaves(value))
        seen[layer, name] = shapes

    text = jnp.asarray(texts())
    jax.eval_shape(lambda p: ej.apply(p, text, CFG, tap=tap), shaped(CFG, "float32"))
    assert seen == {(i, "embed"): (16,) for i in range(5)} | {
        (0, "heads_per_group"): (2, 3, 4),
        (0, "ssm_B"): (2, 5),
        (0, "ssm_state"): (2, 5),
        (1, "q_per_kv"): (2, 3, 4),
        (2, "expert_ffn"): (3, 6),
        (2, "experts"): ((3,), (3,), (3, 16)),
        (2, "shared_ffn"): (7,),
        (3, "ffn"): (9,),
    }


def test_equal_shapes_trace_once():
    """Equal configurations are one to jit; masks, lengths and caches are data."""
    traces = []

    @functools.partial(jax.jit, static_argnums=3)
    def step(params, text, cache, cfg, masks, lengths):
        traces.append(text.shape)
        return ej.extend(params, text, cache, cfg, masks=masks, lengths=lengths)

    values = CFG.to_dict() | {"pattern": "*-", "embed": 32}
    cfg = ej.ModelConfig.from_dict(values)
    params = parameters(cfg)
    cache = ej.init_cache(cfg, 3, 8, dtype=jnp.float64)
    for t, kept in enumerate([16, 32, 16, 16]):
        fresh = ej.ModelConfig.from_dict(values)
        masks = ej.masks_from_counts(fresh, ej.counts(fresh, embed=kept, q_per_kv=2))
        lengths = jnp.array([1, t % 2, 0])
        _, cache = step(params, texts(time=1, seed=t), cache, fresh, masks, lengths)
    assert traces == [(3, 1)] and cache["filled"].tolist() == [4, 2, 0]


def test_a_parent_starts_with_the_published_statistics():
    wide = {"vocab": 512, "embed": 96, "heads_per_group": 64, "ssm_state": 16,
            "experts": 8, "expert_ffn": 48, "shared_ffn": 64, "ffn": 128}  # fmt: skip
    cfg = ej.ModelConfig.from_dict(CFG.to_dict() | wide)
    with jax.enable_x64(False):
        params = jax.jit(ej.init_params, static_argnums=1)(jax.random.key(0), cfg)
    for path, spec in ej.param_specs(cfg):
        w = np.asarray(axes.leaf(params, path))
        fan = np.prod([getattr(cfg, dim) for dim in spec.contracted])
        assert w.dtype == np.float32
        if spec.contracted:
            unit = w * (1 if path == ("embedding",) else fan**0.5)
            assert abs(unit.std() - 1) < 5 / np.sqrt(2 * w.size), path
            assert abs(unit.mean()) < 5 / np.sqrt(w.size), path
        elif path[-1] in ("norm", "final_norm", "gate_norm", "D"):
            assert (w == 1).all()
        elif path[-1] not in ("A_log", "dt_bias"):
            assert path[-1].endswith("_bias") and not w.any()

    mamba_weights = params["layers"][0]
    rate = np.exp(mamba_weights["A_log"])
    assert 1 <= rate.min() < 2 and 15 < rate.max() <= 16
    dt = np.log1p(np.exp(mamba_weights["dt_bias"]))
    assert 0.999e-3 < dt.min() < 2e-3 and 0.05 < dt.max() < 1.001e-1
    assert abs(np.log10(dt).mean() + 2) < 0.2  # Log-uniform, not uniform.
    assert not np.array_equal(mamba_weights["B"], mamba_weights["C"])
