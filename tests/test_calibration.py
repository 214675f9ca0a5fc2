"""Calibration: what every weight met, under every budget, split and resumed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import axes
from elastic_jax.calibration import input_statistics
from elastic_jax.quantize import Recipe, meets_activations

CFG = ej.ModelConfig(
    pattern="ME*-",
    vocab=16,
    embed=32,
    ssm_groups=2,
    heads_per_group=2,
    ssm_head_dim=16,
    ssm_state=16,
    kv_heads=2,
    q_per_kv=2,
    head_dim=16,
    experts=4,
    expert_ffn=32,
    shared_ffn=16,
    ffn=16,
    top_k=2,
)
SPECS = ej.param_specs(CFG)
SMALL = ej.counts(CFG, embed=16, heads_per_group=1, expert_ffn=16, q_per_kv=1)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)

    def draw(path, spec):
        shape = axes.shape(CFG, SPECS, path, spec)
        near = {"ones": 1.0, "zeros": 0.0}.get(spec.init)
        wide = rng.standard_normal(shape) * (0.3 if near is None else 0.1)
        return jnp.asarray(wide + (near or 0), jnp.float32)

    return axes.map_specs(draw, SPECS)


def text(rows=2, time=12, seed=0):
    return np.random.default_rng(seed).integers(0, CFG.vocab, (rows, time))


@pytest.fixture(scope="module")
def found(params, tmp_path_factory):
    """Of two batches, the parent alone."""
    path = tmp_path_factory.mktemp("found") / "inputs.npz"
    return input_statistics(params, [text(), text(seed=1)], CFG, path=path)


def tapped(params, tokens):
    seen = {}
    ej.apply(params, tokens, CFG, tap=lambda *a: seen.__setitem__(a[:2], a[2]))
    return seen


def test_every_weight_tells_what_it_met(params, found):
    """Beside the taps, which see the same activations on their own way."""
    assert found.largest.keys() == {p for p, spec in SPECS if meets_activations(spec)}
    batches = [jax.jit(tapped)(params, text()), tapped(params, text(seed=1))]

    def loudest(tap, layer):
        return max(float(jnp.max(jnp.abs(seen[layer, tap]))) for seen in batches)

    same = {
        **{("layers", 0, name): ("embed", 0) for name in ("z", "x", "B", "C", "dt")},
        **{("layers", 1, name): ("embed", 1) for name in ("router", "shared_up")},
        **{("layers", 2, name): ("embed", 2) for name in ("q", "k", "v")},
        ("layers", 1, "shared_down"): ("shared_ffn", 1),
        ("layers", 2, "o"): ("q_per_kv", 2),
        ("layers", 3, "up"): ("embed", 3),
        ("layers", 3, "down"): ("ffn", 3),
        ("lm_head",): ("embed", 4),
    }
    for path, (tap, layer) in same.items():
        np.testing.assert_allclose(found.largest[path], loudest(tap, layer), rtol=1e-5)
        assert found.met[path] == 2 * 24
    up, down, met = np.zeros(4), np.zeros(4), np.zeros(4, int)
    for seen in batches:
        chosen = np.asarray(seen[1, "experts"][0])
        x, hidden = (np.abs(seen[1, name]) for name in ("embed", "expert_ffn"))
        for row, col, c in np.ndindex(chosen.shape):
            e = chosen[row, col, c]
            up[e] = max(up[e], x[row, col].max())
            down[e] = max(down[e], hidden[row, col, c].max())
            met[e] += 1
    np.testing.assert_allclose(found.largest["layers", 1, "up"], up, rtol=1e-5)
    np.testing.assert_allclose(found.largest["layers", 1, "down"], down, rtol=1e-5)
    assert np.array_equal(found.met["layers", 1, "up"], met) and met.sum() == 2 * 48


def test_what_the_output_projection_meets_is_normed(params, found):
    """Every group has a mean square of one before its scale: checked by the bound."""
    scale = np.abs(params["layers"][0]["gate_norm"]).max()
    width = CFG.heads_per_group * CFG.ssm_head_dim
    assert 1 < found.largest["layers", 0, "out"] <= scale * width**0.5


def test_padding_counts_for_nothing(params, found, tmp_path):
    padded = [
        {
            "tokens": np.pad(text(seed=seed), ((0, 1), (0, 4)), constant_values=3),
            "lengths": np.array([12, 12, 0]),
        }
        for seed in (0, 1)
    ]
    got = input_statistics(params, padded, CFG, path=tmp_path / "inputs.npz")
    for path, want in found.largest.items():
        np.testing.assert_allclose(got.largest[path], want, rtol=1e-5)
        assert np.array_equal(got.met[path], found.met[path])


def test_budgets_join_under_their_masks(params, found, tmp_path):
    """As if each slice had been run on its own; a dropped block meets nothing."""
    shallow = ej.counts(CFG, layers=(1, 1, 0, 1), embed=16)
    budgets = (SMALL, shallow)
    batches = [text(), text(seed=1)]
    path = tmp_path / "inputs.npz"
    got = input_statistics(params, batches, CFG, path=path, budgets=budgets)
    want = {path: np.array(most) for path, most in found.largest.items()}
    for counts in budgets:
        cfg = ej.slice_config(CFG, counts)
        alone = input_statistics(
            ej.slice_params(params, SPECS, counts),
            batches,
            cfg,
            path=tmp_path / f"{cfg.pattern}.npz",
        )
        kept = [i for i, on in enumerate(counts.get("layers", (1,) * 4)) if on]
        for path, most in alone.largest.items():
            if path[0] == "layers":
                path = ("layers", kept[path[1]], path[2])
            want[path] = np.maximum(want[path], most)
    for path, most in want.items():
        np.testing.assert_allclose(got.largest[path], most, rtol=1e-5)
    q = found.met["layers", 2, "q"]
    assert got.met["layers", 2, "q"] == 2 * q and got.met["lm_head",] == 3 * q
    louder = [p for p, most in want.items() if (most > 1.01 * found.largest[p]).any()]
    assert louder  # why budgets have to join
    assert got.provenance["budgets"] == [dict(counts) for counts in budgets]


class Killed(Exception):
    pass


def test_a_pass_continues_where_it_was_stopped(params, found, tmp_path):
    path, computed = tmp_path / "inputs.npz", []

    def kill(state):
        raise Killed

    batches = [text(), text(seed=1)]
    options = {"path": path, "save_every": 1, "provenance": {"data": "x"}}
    with pytest.raises(Killed):
        input_statistics(params, batches, CFG, on_batch=kill, **options)
    options["on_batch"] = computed.append
    got = input_statistics(params, batches, CFG, **options)
    assert len(computed) == 1
    for name in ("largest", "met"):
        pairs = getattr(got, name), getattr(found, name)
        assert all(np.array_equal(pairs[0][p], pairs[1][p]) for p in pairs[1])
    assert got.provenance["data"] == "x" and got.provenance["batches"] == 2
    with pytest.raises(ValueError, match="budgets was"):
        input_statistics(params, batches, CFG, budgets=(SMALL,), **options)
    with pytest.raises(ValueError, match="are not those given"):
        input_statistics(params, batches[::-1], CFG, **options)


def test_experts_that_nobody_chose_borrow_a_scale(params, tmp_path):
    layers = list(params["layers"])
    bias = jnp.array([0.0, -9.0, 0.0, 0.0])
    layers[1] = layers[1] | {"router_bias": bias}
    odd = params | {"layers": tuple(layers)}
    got = input_statistics(odd, [text()], CFG, path=tmp_path / "inputs.npz")
    assert got.never_met == {("layers", 1, name): (1,) for name in ("up", "down")}
    quantized = ej.quantize(odd, SPECS, CFG, Recipe("fp8"), input_largest=got.largest)
    up = quantized["layers"][1]["up"]
    assert float(up.input_scale[1]) == float(jnp.max(up.input_scale))
    assert quantized["layers"][0]["z"].input_scale.shape == ()


def test_what_is_not_finite_stops_the_pass(params, tmp_path):
    layers = list(params["layers"])
    layers[3] = layers[3] | {"norm": layers[3]["norm"].at[5].set(jnp.nan)}
    bad = params | {"layers": tuple(layers)}
    with pytest.raises(ValueError, match="not finite after batch 1: .*largest.*3.*up"):
        input_statistics(bad, [text()], CFG, path=tmp_path / "inputs.npz")


def test_no_token_is_no_calibration(params, tmp_path):
    with pytest.raises(ValueError, match="no valid token"):
        input_statistics(params, [], CFG, path=tmp_path / "inputs.npz")
