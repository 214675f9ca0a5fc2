"""The model: Nemotron-H as released, causal, and blind to whatever is no token of it.

The first part is a second implementation in NumPy: one sequence, token by token, on
weights in the layout and under the names of the released checkpoints. It shares no
code, no axis and no einsum with ours.
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
MIXER = {
    "M": {"in_proj": "z x B C dt", "conv1d": "conv_x conv_B conv_C",
          "conv1d.bias": "conv_x_bias conv_B_bias conv_C_bias", "dt_bias": "dt_bias",
          "A_log": "A_log", "D": "D", "norm": "gate_norm", "out_proj": "out"},
    "*": {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"},
    "E": {"gate": "router", "bias": "router_bias",
          "shared_up": "shared_up", "shared_down": "shared_down"},
    "-": {"up_proj": "up", "down_proj": "down"},
}  # fmt: skip


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


def released(params, cfg):
    """Our tree as released tensors: produced dimensions first, flattened, joined."""

    def matrix(weight, spec):
        fan = np.prod([getattr(cfg, dim) for dim in spec.contracted], dtype=int)
        flat = weight.reshape(fan, -1).T
        return flat if spec.contracted else flat[:, 0]

    specs = dict(ej.param_specs(cfg))
    layers = []
    for i, kind in enumerate(cfg.pattern):
        ours = params["layers"][i]
        layer = {"layer_norm": ours["norm"]}
        for name, parts in MIXER[kind].items():
            joined = [matrix(ours[p], specs["layers", i, p]) for p in parts.split()]
            layer[name] = np.concatenate(joined)
        if kind == "E":
            layer["up"] = ours["up"].transpose(0, 2, 1)  # E x F x H
            layer["down"] = ours["down"].transpose(0, 2, 1)  # E x H x F
        layers.append(layer)
    ends = {"embeddings": params["embedding"], "norm_f": params["final_norm"]}
    return ends | {"lm_head": params["lm_head"].T, "layers": layers}


def nemotron_h(weights, cfg, ids):
    """Logits [time, vocab] of one sequence."""
    x = weights["embeddings"][ids]
    mixers = {"M": mamba, "*": attend, "E": mixture, "-": dense}
    for kind, w in zip(cfg.pattern, weights["layers"], strict=True):
        x = x + mixers[kind](w, cfg, rms(x, cfg) * w["layer_norm"])
    return rms(x, cfg) * weights["norm_f"] @ weights["lm_head"].T


def rms(x, cfg):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + cfg.norm_eps)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def relu2(x, up, down):
    return np.maximum(x @ up.T, 0) ** 2 @ down.T


def mamba(w, cfg, x):
    groups, n, p = cfg.ssm_groups, cfg.ssm_state, cfg.ssm_head_dim
    heads, time = groups * cfg.heads_per_group, len(x)
    inner = heads * p
    cuts = [inner, 2 * inner + 2 * groups * n]
    z, xbc, dt = np.split(x @ w["in_proj"].T, cuts, axis=1)
    padded = np.pad(xbc, ((3, 0), (0, 0)))
    xbc = sum(padded[j : j + time] * w["conv1d"][:, j] for j in range(4))
    xbc = xbc + w["conv1d.bias"]
    xbc = xbc * sigmoid(xbc)
    u, B, C = np.split(xbc, [inner, inner + groups * n], axis=1)
    dt = np.log1p(np.exp(dt + w["dt_bias"]))

    y = np.zeros((time, inner))
    for h in range(heads):
        mine, group = slice(h * p, h * p + p), h // (heads // groups)
        shared = slice(group * n, group * n + n)
        state = np.zeros((p, n))
        for t in range(time):
            state *= np.exp(-np.exp(w["A_log"][h]) * dt[t, h])
            state += dt[t, h] * np.outer(u[t, mine], B[t, shared])
            y[t, mine] = state @ C[t, shared] + w["D"][h] * u[t, mine]
    y = (y * z * sigmoid(z)).reshape(time, groups, -1)
    return rms(y, cfg).reshape(time, inner) * w["norm"] @ w["out_proj"].T


def attend(w, cfg, x):
    q, k, v = (x @ w[f"{name}_proj"].T for name in "qkv")
    size, y = cfg.head_dim, np.zeros(q.shape)
    for head in range(cfg.kv_heads * cfg.q_per_kv):
        mine = slice(head * size, (head + 1) * size)
        kv = head // cfg.q_per_kv * size
        theirs = slice(kv, kv + size)
        for t in range(len(x)):
            scores = k[: t + 1, theirs] @ q[t, mine] * size**-0.5
            share = np.exp(scores - scores.max())
            y[t, mine] = share / share.sum() @ v[: t + 1, theirs]
    return y @ w["o_proj"].T


def mixture(w, cfg, x):
    y = relu2(x, w["shared_up"], w["shared_down"])
    for t, scores in enumerate(sigmoid(x @ w["gate"].T)):
        choice = (scores + w["bias"]).reshape(cfg.n_group, -1)
        groups = np.argsort(-np.sort(choice, axis=1)[:, -2:].sum(axis=1))
        choice[groups[cfg.topk_group :]] = -np.inf
        chosen = np.argsort(-choice.ravel())[: cfg.top_k]
        gates = scores[chosen] / (scores[chosen].sum() + 1e-20)
        for e, gate in zip(chosen, gates * cfg.routed_scaling_factor, strict=True):
            y[t] += gate * relu2(x[t], w["up"][e], w["down"][e])
    return y


def dense(w, cfg, x):
    return relu2(x, w["up_proj"], w["down_proj"])


@functools.partial(jax.jit, static_argnums=2)
def forward(params, text, cfg, segment_ids=None, lengths=None):
    return ej.apply(params, text, cfg, segment_ids=segment_ids, lengths=lengths)


def read(text, segment_ids=None, lengths=None):
    """`forward` of CFG, compiled once: options that are left out say nothing."""
    rows, time = text.shape
    segment_ids = np.zeros((rows, time), int) if segment_ids is None else segment_ids
    lengths = np.full(rows, time) if lengths is None else np.asarray(lengths)
    return forward(parameters(CFG), text, CFG, segment_ids, lengths)


@pytest.mark.parametrize("pattern, n_group, topk_group",
                         [("M*E-", 4, 2), ("E-M*ME", 1, 1)])
def test_it_is_the_released_architecture(pattern, n_group, topk_group):
    values = {"pattern": pattern, "n_group": n_group, "topk_group": topk_group}
    cfg = ej.ModelConfig.from_dict(CFG.to_dict() | values)
    params, text = parameters(cfg), texts()
    want = [nemotron_h(released(params, cfg), cfg, ids) for ids in text]
    np.testing.assert_allclose(forward(params, text, cfg), want, **TIGHT)


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
    np.testing.assert_allclose(y, forward(params, text, cfg), **TIGHT)
    assert cache["filled"].tolist() == [6] * 3


def shaped(cfg, dtype):
    return jax.eval_shape(lambda: ej.init_params(jax.random.key(0), cfg, dtype=dtype))


@pytest.mark.parametrize("given, logits", [("float64", "float64"),
                                           ("float32", "float32"),
                                           ("bfloat16", "float32")])
def test_logits_are_at_least_float32(given, logits):
    params, text = shaped(CFG, given), jnp.asarray(texts())
    y = jax.eval_shape(lambda p: ej.apply(p, text, CFG), params)
    assert y.shape == (3, 12, 13) and y.dtype == logits
    assert jax.eval_shape(lambda p: ej.hidden_states(p, text, CFG), params).dtype == given
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
        (0, "ssm_x"): (2, 3, 4),
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
    key = jax.random.key(0, impl="unsafe_rbg")  # Compiles faster, and is as normal.
    params = jax.jit(lambda: ej.init_params(key, cfg))()
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
