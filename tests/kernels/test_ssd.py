"""The chunked scan computes the recurrence: values, gradients, every option."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_kernels.ssd import cases, xla
from elastic_kernels.ssd.api import ssd

scan = jax.jit(ssd, static_argnames="implementation")
NAMES = ["x", "dt", "A", "B", "C", "D", "initial_state"]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@functools.partial(jax.jit, static_argnames=("implementation", "chunk"))
def run(arguments, options, implementation="xla", chunk=None):
    """Results and the gradient of every float argument, for random cotangents."""
    state = options.get("initial_state")
    floats = (*arguments, *(() if state is None else (state,)))

    def f(x, dt, A, B, C, D, initial_state=None):
        kept = {"initial_state": initial_state, "resets": options.get("resets")}
        if chunk:
            return xla.ssd(x, dt, A, B, C, D, chunk=chunk, **kept)
        return ssd(x, dt, A, B, C, D, implementation=implementation, **kept)

    results, pull = jax.vjp(f, *floats)
    rng = np.random.default_rng(1)
    cotangents = [jnp.asarray(rng.standard_normal(r.shape), r.dtype) for r in results]
    gradients = pull(tuple(cotangents))
    return results, dict(zip(NAMES[: len(floats)], gradients, strict=True))


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)


def assert_close(actual, expected, bound):
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), got in zip(paths, jax.tree.leaves(actual), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert error(got, want) < bound, (jax.tree_util.keystr(path), error(got, want))


@pytest.mark.parametrize("name", cases.TESTED)
def test_values_and_gradients(name, float64):
    arguments, options = cases.inputs(cases.TESTED[name], dtype=np.float64)
    want = run(arguments, options, "reference")
    assert_close(run(arguments, options), want, 1e-11)


def test_values_and_gradients_float32():
    arguments, options = cases.inputs(cases.TESTED["documents"])
    want = run(arguments, options, "reference")
    assert_close(run(arguments, options), want, 1e-5)


def test_any_chunk_computes_the_same(float64):
    arguments, options = cases.inputs(cases.TESTED["documents"], dtype=np.float64)
    want = run(arguments, options, "reference")
    for chunk in (7, 128):  # no tail, and nothing but a tail
        assert_close(run(arguments, options, chunk=chunk), want, 1e-11)


def test_bfloat16_stays_in_the_error_budget():
    """Against float32: at most twice the error of the reference run in bfloat16."""
    arguments, options = cases.inputs(cases.TESTED["documents"])
    exact = run(arguments, options, "reference")
    narrow = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a,
        (arguments, options),
    )
    plain, got = run(*narrow, "reference"), run(*narrow)
    assert got[0][0].dtype == jnp.bfloat16 and got[0][1].dtype == jnp.float32
    for e, p, g in zip(*map(jax.tree.leaves, (exact, plain, got)), strict=True):
        assert error(g, e) <= 2 * error(p, e)


def test_strong_decay_and_long_steps_stay_finite():
    """exp of the decay over a chunk underflows, and its inverse would overflow."""
    (x, dt, A, *rest), options = cases.inputs(cases.TESTED["documents"])
    arguments = (x, 40 * dt, 10 * A, *rest)
    got, want = run(arguments, options), run(arguments, options, "reference")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
    assert_close(got[0], want[0], 1e-5)


def test_the_state_carries_on(float64):
    """Calls that hand the state on are one call over all: one token, then a chunk
    and a bit, then the rest."""
    (x, dt, A, B, C, D), options = cases.inputs(
        cases.TESTED["documents"], dtype=np.float64
    )
    whole = scan(x, dt, A, B, C, D, **options)
    state, parts = options["initial_state"], []
    for part in (slice(0, 1), slice(1, 34), slice(34, None)):
        y, state = scan(
            *(x[:, part], dt[:, part], A, B[:, part], C[:, part], D),
            initial_state=state,
            resets=options["resets"][:, part],
        )
        parts.append(y)
    assert_close((jnp.concatenate(parts, 1), state), whole, 1e-12)


def test_a_reset_starts_over(float64):
    """After a reset, results are those of a sequence that begins there; no gradient
    crosses it."""
    (x, dt, A, B, C, D), _ = cases.inputs(cases.TESTED["tail"], dtype=np.float64)
    state = jnp.ones((*x.shape[:1], *x.shape[2:], B.shape[-1]))
    start = 20
    resets = jnp.zeros(x.shape[:2], bool).at[:, start].set(True)
    after = slice(start, None)

    def late(x, state):
        y, final = ssd(x, dt, A, B, C, D, initial_state=state, resets=resets)
        return (y[:, after] ** 2).sum() + final.sum(), (y[:, after], final)

    (dx, dstate), got = jax.jit(jax.grad(late, (0, 1), has_aux=True))(x, state)
    want = scan(x[:, after], dt[:, after], A, B[:, after], C[:, after], D)
    assert_close(got, want, 1e-12)
    assert not dx[:, :start].any() and not dstate.any()


def test_zero_steps_leave_the_state(float64):
    (x, dt, A, B, C, D), _ = cases.inputs(cases.TESTED["tail"], dtype=np.float64)
    length = 37
    padded = jnp.where(jnp.arange(x.shape[1])[:, None, None] < length, dt, 0)
    _, state = scan(x, padded, A, B, C, D)
    short = slice(None, length)
    _, want = scan(x[:, short], dt[:, short], A, B[:, short], C[:, short], D)
    assert_close(state, want, 1e-12)


def test_no_token_sees_a_later_one(float64):
    (x, dt, A, B, C, D), options = cases.inputs(
        cases.TESTED["documents"], dtype=np.float64
    )
    whole, _ = scan(x, dt, A, B, C, D, **options)
    for t in (0, 31, 32, 50):
        x_, dt_, B_, C_ = (a.at[:, t + 1 :].set(0.7) for a in (x, dt, B, C))
        y, _ = scan(x_, dt_, A, B_, C_, D, **options)
        assert_close(y[:, : t + 1], whole[:, : t + 1], 1e-12)
        assert error(y[:, t + 1], whole[:, t + 1]) > 1e-3


def test_composes_with_vmap_and_checkpoint(float64):
    arguments, options = cases.inputs(cases.TESTED["documents"], dtype=np.float64)
    rows = [(arguments, options)]
    rows += [(jax.tree.map(lambda a: 0.5 * a, arguments), options)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *rows)
    got = jax.jit(jax.vmap(jax.checkpoint(run)))(*stacked)
    for i, row in enumerate(rows):
        mine = jax.tree.map(lambda a, i=i: a[i], got)
        assert_close(mine, run(*row, "reference"), 1e-11)


def test_memory_grows_with_states_not_with_pairs():
    """Temporaries are y and one state a chunk, at most; forward alone keeps neither."""
    case = cases.Case(1, 2048, 1, 4, 16, 16)
    arguments, _ = cases.inputs(case)

    def both(*arguments):
        results, pull = jax.vjp(ssd, *arguments)
        return pull(results)

    def temporaries(f):
        compiled = jax.jit(f).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    y_bytes = arguments[0].nbytes
    states_bytes = case.t // xla.CHUNK * case.r * case.p * case.n * 4
    assert temporaries(both) < 2 * (y_bytes + states_bytes)
    assert temporaries(ssd) < y_bytes


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dt": (1, 45, 2, 2)}, r"dt \(1, 45, 2, 2\), expected \(2, 45, 2, 2\)"),
        ({"C": (2, 45, 3, 4)}, r"C \(2, 45, 3, 4\), expected \(2, 45, 2, 4\)"),
        ({"x": (2, 0, 2, 2, 3)}, "at least one token"),
        ({"initial_state": (2, 2, 2, 4, 3)}, "initial_state"),
        ({"resets": (2, 45)}, "resets must be bool"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments, _ = cases.inputs(cases.TESTED["tail"])
    named = dict(zip(NAMES[:6], arguments, strict=True))
    named |= {name: jnp.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        ssd(**named)
