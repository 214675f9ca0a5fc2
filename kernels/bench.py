"""Is every operation right, and how fast is it beside what one would write instead?

    python kernels/bench.py [--ops ssd expert_mlp causal_attention] [--quick]
                            [--json PATH]

For each operation: first its error against the float64 reference, beside that of the
reference itself in float32; then time, forward and forward + backward (`jax.vjp` on
fixed cotangents), candidates alternating in one process that is pinned to one core
and one thread. The bars are ratios between candidates, so they carry over from
machine to machine better than seconds do. Wrong results exit with code 1.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
)
os.environ["OMP_NUM_THREADS"] = "1"

import jax  # noqa: E402  (the lines above must come first)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

from elastic_kernels.timing import alternate  # noqa: E402

BUDGET = 2.0  # times the error of the reference in the same dtype
ROUNDING = 2e-6  # relative; an error below it is never over budget


@dataclasses.dataclass(frozen=True)
class Bar:
    """seconds(top) / seconds(bottom) of forward + backward, and what is asked of it."""

    top: str
    bottom: str
    at_least: float = 0.0
    at_most: float = float("inf")

    def judge(self, seconds: dict[str, float]) -> tuple[float, bool]:
        ratio = seconds[self.top] / seconds[self.bottom]
        return ratio, self.at_least <= ratio <= self.at_most

    def __str__(self):
        asked = (
            f">= {self.at_least}" if self.at_least else f"<= {self.at_most}"
        )
        return f"{self.top} / {self.bottom} {asked}"


@dataclasses.dataclass(frozen=True)
class Contest:
    """One case of one operation. A candidate is a function and its arguments; it is
    differentiated in all of them."""

    operation: str
    case: str
    candidates: dict[str, tuple[Callable, tuple]]
    slow: frozenset[str] = frozenset()  # timed in one round of their own
    bars: tuple[Bar, ...] = ()


# --- state space duality -----------------------------------------------------------


def ssd_contests(quick):
    from elastic_kernels.ssd import api, cases

    for name, case in cases.TIMED.items():
        if quick and case.t > 2048:
            continue
        arguments, options = cases.inputs(case)
        yield Contest(
            "ssd",
            name,
            {
                "xla": (functools.partial(api.ssd, **options), arguments),
                "chunk64_autodiff": (ssd_chunks_at_once, arguments),
                "reference": (
                    functools.partial(api.ssd, implementation="reference", **options),
                    arguments,
                ),
            },
            slow=frozenset({"reference"}),
            bars=(Bar("chunk64_autodiff", "xla", at_least=2.0),) * (case.t >= 2048),
        )


def ssd_checks():
    from elastic_kernels.ssd import api, cases

    timed = {n: dataclasses.replace(c, t=144) for n, c in cases.TIMED.items()}
    for name, case in {**cases.TESTED, **timed}.items():

        def make(dtype, case=case):
            arguments, options = cases.inputs(case, dtype=dtype)
            state = options.pop("initial_state", None)
            floats = arguments if state is None else (*arguments, state)

            def f(implementation, x, dt, A, B, C, D, state=None):
                return api.ssd(
                    *(x, dt, A, B, C, D),
                    initial_state=state,
                    implementation=implementation,
                    **options,
                )

            return f, floats

        yield name, make


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


def expert_mlp_contests(quick):
    from elastic_kernels.grouped_matmul import api, cases

    for name, case in cases.TIMED.items():
        x, up, down, experts, gates = cases.inputs(case)
        rows = jnp.repeat(x, experts.shape[1], axis=0)
        if quick and len(rows) > 2048:
            continue

        def op(x, up, down, gates, experts=experts, **options):
            return api.expert_mlp(x, up, down, experts, gates, **options)

        arguments = (x, up, down, gates)
        ragged = functools.partial(expert_mlp_ragged, experts)
        yield Contest(
            "expert_mlp",
            name,
            {
                "xla": (op, arguments),
                "ideal_pair": (gemm_pair, (rows, up[0], down[0])),
                "ragged_dot": (ragged, arguments),
                "reference": (
                    functools.partial(op, implementation="reference"),
                    arguments,
                ),
            },
            slow=frozenset({"ragged_dot", "reference"}),
            bars=(
                Bar("xla", "ideal_pair", at_most=3.0),
                Bar("ragged_dot", "xla", at_least=10.0),
            )
            * (len(rows) >= 1024),
        )


def expert_mlp_checks():
    from elastic_kernels.grouped_matmul import api, cases

    for name, case in cases.TESTED.items():

        def make(dtype, case=case):
            x, up, down, experts, gates = cases.inputs(case, dtype=dtype)

            def f(implementation, x, up, down, gates):
                return api.expert_mlp(
                    x, up, down, experts, gates, implementation=implementation
                )

            return f, (x, up, down, gates)

        yield name, make


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


# --- attention ---------------------------------------------------------------------


def causal_attention_contests(quick):
    from elastic_kernels.attention import api, cases

    for name, case in cases.TIMED.items():
        q, k, v, options = cases.inputs(case)
        if quick and q.shape[1] > 1024:
            continue
        reference = functools.partial(
            api.causal_attention, implementation="reference", **options
        )
        yield Contest(
            "causal_attention",
            name,
            {
                "xla": (functools.partial(api.causal_attention, **options), (q, k, v)),
                "einsum": (reference, (q, k, v)),
            },
        )


def causal_attention_checks():
    from elastic_kernels.attention import api, cases

    for name, case in cases.TESTED.items():

        def make(dtype, case=case):
            q, k, v, options = cases.inputs(case, dtype=dtype)

            def f(implementation, q, k, v):
                return api.causal_attention(
                    q, k, v, implementation=implementation, **options
                )

            return f, (q, k, v)

        yield name, make


# --- running them ------------------------------------------------------------------

OPERATIONS = {
    "ssd": (ssd_checks, ssd_contests),
    "expert_mlp": (expert_mlp_checks, expert_mlp_contests),
    "causal_attention": (causal_attention_checks, causal_attention_contests),
}


def pulled_back(f):
    """Forward and backward: results and gradients for given cotangents."""

    def run(cotangents, *arguments):
        results, pull = jax.vjp(f, *arguments)
        return results, pull(cotangents)

    return jax.jit(run)


def cotangents_like(results):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), results
    )


def check(operation, name, make):
    """Largest relative error over results and gradients; True within the budget."""

    def outcome(implementation, dtype):
        f, floats = make(dtype)
        f = functools.partial(f, implementation)
        cotangents = cotangents_like(jax.eval_shape(f, *floats))
        return jax.tree.leaves(pulled_back(f)(cotangents, *floats))

    with jax.enable_x64(True):
        exact = [np.asarray(a) for a in outcome("reference", np.float64)]
    plain, tuned = (outcome(i, np.float32) for i in ("reference", "xla"))

    def errors(leaves):
        pairs = zip(leaves, exact, strict=True)
        return [np.abs(a - e).max() / max(np.abs(e).max(), 1e-30) for a, e in pairs]

    plain, tuned = errors(plain), errors(tuned)
    good = all(
        t <= max(BUDGET * p, ROUNDING) for t, p in zip(tuned, plain, strict=True)
    )
    print(
        f"  {operation:17} {name:16} xla {max(tuned):.1e}  reference {max(plain):.1e}"
        f"  {'ok' if good else 'WRONG'}",
        flush=True,
    )
    return {
        "operation": operation,
        "case": name,
        "error": float(max(tuned)),
        "reference_error": float(max(plain)),
        "ok": bool(good),
    }


def time_contest(contest, rounds):
    """One row a candidate, and one row a bar."""
    thunks = {"forward": {}, "both": {}}
    for name, (f, arguments) in contest.candidates.items():
        cotangents = cotangents_like(jax.eval_shape(f, *arguments))
        thunks["forward"][name] = functools.partial(jax.jit(f), *arguments)
        thunks["both"][name] = functools.partial(
            pulled_back(f), cotangents, *arguments
        )
    timings = {}
    for what, candidates in thunks.items():
        fast = {n: c for n, c in candidates.items() if n not in contest.slow}
        slow = {n: c for n, c in candidates.items() if n in contest.slow}
        timings[what] = alternate(fast, rounds=rounds) | alternate(slow, rounds=1)

    rows = [
        {
            "operation": contest.operation,
            "case": contest.case,
            "candidate": name,
            "forward_seconds": timings["forward"][name].min_seconds,
            "forward_median_seconds": timings["forward"][name].median_seconds,
            "both_seconds": timings["both"][name].min_seconds,
            "both_median_seconds": timings["both"][name].median_seconds,
        }
        for name in contest.candidates
    ]
    seconds = {row["candidate"]: row["both_seconds"] for row in rows}
    for row in rows:
        print(
            f"  {row['operation']:17} {row['case']:16} {row['candidate']:17}"
            f"{row['forward_seconds'] * 1e3:10.2f}{row['both_seconds'] * 1e3:11.2f}"
            f"{row['both_median_seconds'] * 1e3:11.2f}"
            f"{row['both_seconds'] / seconds['xla']:9.2f}",
            flush=True,
        )
    bars = []
    for bar in contest.bars:
        ratio, met = bar.judge(seconds)
        print(f"  {'':34} {bar}: {ratio:.2f} {'met' if met else 'MISSED'}", flush=True)
        bars.append(
            {"case": contest.case, "bar": str(bar), "ratio": ratio, "met": bool(met)}
        )
    return rows, bars


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ops", nargs="+", choices=OPERATIONS, default=[*OPERATIONS])
    parser.add_argument("--quick", action="store_true", help="small cases, few rounds")
    parser.add_argument("--json", metavar="PATH", help="write the numbers here as well")
    options = parser.parse_args()

    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, one core, one thread")
    print("\nErrors against the float64 reference, largest of results and gradients:")
    checks = [
        check(operation, name, make)
        for operation in options.ops
        for name, make in OPERATIONS[operation][0]()
    ]
    print("\nProcessor milliseconds (minimum; of forward + backward also the median):")
    print(
        f"  {'operation':17} {'case':16} {'candidate':17}{'forward':>10}{'fwd+bwd':>11}"
        f"{'median':>11}{'/ xla':>9}"
    )
    rows, bars = [], []
    for operation in options.ops:
        for contest in OPERATIONS[operation][1](options.quick):
            more_rows, more_bars = time_contest(contest, 3 if options.quick else 9)
            rows, bars = rows + more_rows, bars + more_bars
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"jax": jax.__version__, "errors": checks, "times": rows, "bars": bars},
                file,
                indent=1,
            )
    return 0 if all(c["ok"] for c in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
