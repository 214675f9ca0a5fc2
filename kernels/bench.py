"""Is every operation right, and how fast is it beside what one would write instead?

    python kernels/bench.py [--ops ssd expert_mlp ...] [--quick] [--small]
                            [--json PATH]

For each operation: first its error against the float64 reference, beside that of the
reference itself in float32; then time, forward and forward + backward (`jax.vjp` on
fixed cotangents), candidates alternating in one process that is pinned to one core
and one thread. The bars are ratios between candidates, so they carry over from
machine to machine better than seconds do. Wrong results exit with code 1; a missed
bar is printed, but a busy machine can miss one too.

On a GPU it is `bench_gpu` that runs: the kernels, in the sizes of Nemotron 3 Nano,
beside the device's own floors. `--small` runs that half anywhere, in sizes that prove
nothing but the script.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import sys
import types
from collections.abc import Callable

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
)
os.environ["OMP_NUM_THREADS"] = "1"

# The lines above take effect only before JAX is imported.
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

try:
    import jaxtyping  # noqa: F401
except ImportError:  # a machine with JAX and Triton alone: shapes are annotations only

    class Shaped:
        def __class_getitem__(cls, item):
            return jax.Array

    named = dict.fromkeys(("Bool", "Float", "Int", "UInt32"), Shaped)
    sys.modules["jaxtyping"] = types.SimpleNamespace(Array=jax.Array, **named)

from elastic_kernels.timing import alternate

BUDGET = 2.0  # times the error of the reference in the same dtype
ROUNDING = 1e-5  # relative, in float32: sums in another order, never over budget


@dataclasses.dataclass(frozen=True)
class Bar:
    """What is asked of seconds(top) / seconds(bottom), forward + backward."""

    top: str
    bottom: str
    at_least: float = 0.0
    at_most: float = float("inf")

    def __str__(self):
        asked = f">= {self.at_least}" if self.at_least else f"<= {self.at_most}"
        return f"{self.top} / {self.bottom} {asked}"


@dataclasses.dataclass(frozen=True)
class Rivals:
    """Other candidates for one case: name -> function, and arguments it is
    differentiated in."""

    candidates: dict[str, tuple[Callable, tuple]]
    bars: tuple[Bar, ...] = ()


@dataclasses.dataclass(frozen=True)
class Operation:
    """`call(case, dtype)` is a function of (implementation, *floats), and floats."""

    cases: types.ModuleType
    call: Callable
    rivals: Callable


# --- state space duality -----------------------------------------------------------


def ssd():
    from elastic_kernels.ssd import api, cases

    def call(case, dtype=np.float32):
        floats, options = cases.inputs(case, dtype=dtype)
        if "initial_state" in options:
            floats = (*floats, options.pop("initial_state"))

        def f(implementation, x, dt, A, B, C, D, state=None):
            options_ = dict(options, initial_state=state, implementation=implementation)
            return api.ssd(x, dt, A, B, C, D, **options_)

        return f, floats

    def rivals(case, floats):
        bars = (Bar("chunk64_autodiff", "xla", at_least=2.0),) * (case.t >= 2048)
        return Rivals({"chunk64_autodiff": (ssd_chunks_at_once, floats)}, bars)

    return Operation(cases, call, rivals)


def ssd_chunks_at_once(x, dt, A, B, C, D, chunk=64):
    """The usual form: every chunk of the sequence at once, left to autodiff."""
    b, t, g, r, p = x.shape
    c = t // chunk
    x_, B, C = (a.reshape(b, c, chunk, *a.shape[2:]) for a in (x, B, C))
    dt = dt.reshape(b, c, chunk, g, r)
    xd = x_ * dt[..., None]
    cs = jnp.cumsum(dt * A, 2)
    rows = jnp.moveaxis(cs, 2, -1)  # b c g r q
    between = rows[..., :, None] - rows[..., None, :]
    between = jnp.exp(jnp.where(np.tri(chunk, dtype=bool), between, -jnp.inf))
    pairs = jnp.einsum("bcqgn,bcsgn->bcgqs", C, B)[:, :, :, None] * between
    y = jnp.einsum("bcgrqs,bcsgrp->bcqgrp", pairs, xd)
    leave = jnp.exp(cs[:, :, -1:] - cs)[..., None]
    written = jnp.einsum("bcsgn,bcsgrp->bcgrpn", B, xd * leave)

    def hand_on(state, chunk):
        written, whole = chunk
        return state * whole[..., None, None] + written, state

    whole = jnp.exp(cs[:, :, -1])
    chunks = jnp.moveaxis(written, 1, 0), jnp.moveaxis(whole, 1, 0)
    final, entries = lax.scan(hand_on, jnp.zeros_like(written[:, 0]), chunks)
    across = jnp.einsum("bcqgn,cbgrpn->bcqgrp", C, entries)
    y = y + across * jnp.exp(cs)[..., None]
    return y.reshape(x.shape) + D[..., None] * x, final


# --- mixture of experts ------------------------------------------------------------


def expert_mlp():
    from elastic_kernels.grouped_matmul import api, cases

    def call(case, dtype=np.float32):
        x, up, down, experts, gates = cases.inputs(case, dtype=dtype)

        def f(implementation, x, up, down, gates):
            return api.expert_mlp(
                x, up, down, experts, gates, implementation=implementation
            )

        return f, (x, up, down, gates)

    def rivals(case, floats):
        x, up, down, experts, _ = cases.inputs(case)
        rows = jnp.repeat(x, case.c, axis=0)
        bars = (
            Bar("xla", "ideal_pair", at_most=3.0),
            Bar("ragged_dot", "xla", at_least=10.0),
        )
        return Rivals(
            {
                "ideal_pair": (gemm_pair, (rows, up[0], down[0])),
                "ragged_dot": (functools.partial(expert_mlp_ragged, experts), floats),
            },
            bars * (len(rows) >= 1024),
        )

    return Operation(cases, call, rivals)


def gemm_pair(rows, up, down):
    """The least that any form must do: as many rows, one expert for all."""
    return jax.nn.relu(rows @ up) ** 2 @ down


def expert_mlp_ragged(experts, x, up, down, gates):
    """Rows sorted by expert through `lax.ragged_dot`."""
    order = jnp.argsort(experts.ravel())
    sizes = jnp.bincount(experts.ravel(), length=len(up)).astype(jnp.int32)
    token = order // experts.shape[1]
    hidden = jax.nn.relu(lax.ragged_dot(x[token], up, sizes)) ** 2
    rows = lax.ragged_dot(hidden, down, sizes) * gates.ravel()[order][:, None]
    return jnp.zeros_like(x).at[token].add(rows)


# --- attention: the reference is the plain einsum, hence its own rival ---------------


def causal_attention():
    from elastic_kernels.attention import api, cases

    def call(case, dtype=np.float32):
        q, k, v, options = cases.inputs(case, dtype=dtype)

        def f(implementation, q, k, v):
            options_ = dict(options, implementation=implementation)
            return api.causal_attention(q, k, v, **options_)

        return f, (q, k, v)

    return Operation(cases, call, lambda case, floats: Rivals({}))


# --- running them ------------------------------------------------------------------

OPERATIONS = {
    "ssd": ssd,
    "expert_mlp": expert_mlp,
    "causal_attention": causal_attention,
}
ON_GPU = ("gated_rms_norm", "grouped_matmul")
SLOW = ("reference", "ragged_dot")  # timed once, on their own


def forward_and_backward(f, floats):
    """A thunk for the results and gradients of `f`, for fixed random cotangents."""
    rng = np.random.default_rng(1)
    cotangents = jax.tree.map(
        lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype),
        jax.eval_shape(f, *floats),
    )

    def run(cotangents, *floats):
        results, pull = jax.vjp(f, *floats)
        return results, pull(cotangents)

    return functools.partial(jax.jit(run), cotangents, *floats)


def errors(actual, exact):
    """Per leaf, the largest difference over the largest value."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(exact), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(e, np.float64)) for a, e in pairs]
    return np.array(
        [np.abs(a - e).max() / max(np.abs(e).max(), 1e-30) for a, e in pairs]
    )


def check(name, operation, case_name, case):
    """Errors of one case, as a row; `ok` where every leaf is within the budget."""

    def outcome(implementation, dtype):
        f, floats = operation.call(case, dtype)
        return forward_and_backward(functools.partial(f, implementation), floats)()

    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, outcome("reference", np.float64))
    plain = errors(outcome("reference", np.float32), exact)
    tuned = errors(outcome("xla", np.float32), exact)
    ok = bool((tuned <= np.maximum(BUDGET * plain, ROUNDING)).all())
    print(
        f"  {name:17} {case_name:14} xla {tuned.max():.1e}"
        f"  reference {plain.max():.1e}  {'ok' if ok else 'WRONG'}",
        flush=True,
    )
    row = {"operation": name, "case": case_name, "ok": ok}
    return row | {"xla": float(tuned.max()), "reference": float(plain.max())}


def measure(name, operation, case_name, case, rounds):
    """Times of one case: a row for each candidate, and one for each bar."""
    f, floats = operation.call(case)
    rivals = operation.rivals(case, floats)
    candidates = {i: (functools.partial(f, i), floats) for i in ("xla", "reference")}
    candidates |= rivals.candidates
    thunks = {
        "forward": {
            n: functools.partial(jax.jit(f), *a) for n, (f, a) in candidates.items()
        },
        "both": {n: forward_and_backward(f, a) for n, (f, a) in candidates.items()},
    }
    times = {}
    for what, of in thunks.items():
        times[what] = alternate({n: of[n] for n in of if n not in SLOW}, rounds=rounds)
        times[what] |= alternate({n: of[n] for n in of if n in SLOW}, rounds=1)

    rows, both = [], {n: t.min_seconds for n, t in times["both"].items()}
    for candidate in candidates:
        taken = {
            "forward_seconds": times["forward"][candidate].min_seconds,
            "both_seconds": both[candidate],
            "both_median_seconds": times["both"][candidate].median_seconds,
        }
        columns = "".join(f"{1e3 * seconds:11.2f}" for seconds in taken.values())
        print(
            f"  {name:17} {case_name:14} {candidate:17}{columns}"
            f"{both[candidate] / both['xla']:9.2f}",
            flush=True,
        )
        rows.append(
            {"operation": name, "case": case_name, "candidate": candidate} | taken
        )
    bars = []
    for bar in rivals.bars:
        ratio = both[bar.top] / both[bar.bottom]
        met = bar.at_least <= ratio <= bar.at_most
        print(f"{'':33} {bar}: {ratio:.2f}, {'met' if met else 'MISSED'}", flush=True)
        bars.append({"case": case_name, "bar": str(bar), "ratio": ratio, "met": met})
    return rows, bars


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    names = [*OPERATIONS, *ON_GPU]
    parser.add_argument("--ops", nargs="+", choices=names, default=names)
    parser.add_argument("--quick", action="store_true", help="first case, few rounds")
    parser.add_argument("--json", metavar="PATH", help="write the numbers here as well")
    parser.add_argument("--small", action="store_true", help="the GPU's half, tiny")
    options = parser.parse_args()
    if options.small or jax.default_backend() == "gpu":
        return on_gpu(options)
    operations = {n: OPERATIONS[n]() for n in options.ops if n in OPERATIONS}
    if not operations:
        parser.error(f"{options.ops} are timed on a GPU only; here: {[*OPERATIONS]}")

    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, one core, one thread"
    )
    print("\nLargest error of results and gradients in float32, against float64:")
    checks = [
        check(name, operation, *case)
        for name, operation in operations.items()
        for case in operation.cases.TESTED.items()
    ]
    print(
        "\nProcessor milliseconds: forward, forward + backward, median of the latter:"
    )
    rows, bars = [], []
    for name, operation in operations.items():
        cases = [*operation.cases.TIMED.items()][: 1 if options.quick else None]
        for case in cases:
            more = measure(name, operation, *case, rounds=3 if options.quick else 9)
            rows, bars = rows + more[0], bars + more[1]
    if options.json:
        with open(options.json, "w") as file:
            report = {"errors": checks, "times": rows, "bars": bars}
            json.dump({"jax": jax.__version__} | report, file, indent=1)
    return 0 if all(row["ok"] for row in checks) else 1


def on_gpu(options) -> int:
    import bench_gpu

    versions = {"jax": jax.__version__}
    for name in ("triton", "jax_triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = jax.devices()[0].device_kind
    print(f"{device}, " + ", ".join(f"{n} {v}" for n, v in versions.items()))
    report = bench_gpu.run(options.ops, small=options.small)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": device} | versions | report, file, indent=1)
    return 0 if all(row["ok"] for row in report["errors"]) else 1


if __name__ == "__main__":
    sys.exit(main())
