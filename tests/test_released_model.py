"""The model is Nemotron-H as released: a second implementation, in plain NumPy.

One sequence, token by token and head by head, on weights in the layout and under the
names of the released checkpoints. It shares no code, no axis and no einsum with ours.
The architecture is that of arXiv 2504.03624 with the experts of arXiv 2512.20848.
"""

import jax
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
# Released tensor -> our parameters, in the order in which their rows are joined.
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


@pytest.mark.parametrize("pattern, n_group, topk_group",
                         [("M*E-", 4, 2), ("E-M*ME", 1, 1)])
def test_it_is_the_released_architecture(pattern, n_group, topk_group):
    values = {"pattern": pattern, "n_group": n_group, "topk_group": topk_group}
    cfg = ej.ModelConfig.from_dict(CFG.to_dict() | values)
    params = parameters(cfg)
    text = np.random.default_rng(3).integers(0, cfg.vocab, (3, 12))
    want = [nemotron_h(released(params, cfg), cfg, ids) for ids in text]
    logits = jax.jit(ej.apply, static_argnums=2)(params, text, cfg)
    np.testing.assert_allclose(logits, want, rtol=1e-10, atol=1e-12)
