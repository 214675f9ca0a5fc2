"""The half of bench.py that a GPU runs: errors, then times beside the device's floors.

Copy bandwidth and matmul rate are measured in the same run; a floor is the larger of
the bytes that must move over the one and the operations that must happen over the
other. Candidates alternate in one process; the host's clock is read around enough calls
to hide that they are launched one by one.
"""

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import elastic_kernels as kernels
from elastic_kernels import dispatch
from elastic_kernels.ssd import cases as ssd_cases

BUDGET, ROUNDING = 2.0, 1e-3  # relative; sums in another order are never over budget
CHUNK = 64  # of the scan's floors

NANO = {
    "scan": {"g": 8, "r": 8, "p": 64, "n": 128},
    "experts": {"e": 128, "c": 6, "d": 2688, "f": 1856},
    "tokens": [(1, 8192), (8, 8192), (1, 65536)],
    "decoding": 64,
    "mlp": 5632,  # 264 rows an expert
}
SMALL = {
    "scan": {"g": 2, "r": 2, "p": 16, "n": 16},
    "experts": {"e": 4, "c": 2, "d": 64, "f": 48},
    "tokens": [(1, 128)],
    "decoding": 2,
    "mlp": 64,
}


def seconds(candidates: dict[str, Callable], rounds: int = 7, least: float = 0.02):
    """name -> (minimum, median) seconds of a call; calls of a round last `least`."""
    calls, taken = {}, {name: [] for name in candidates}
    for name, run in candidates.items():
        jax.block_until_ready(run())
        start = time.perf_counter()
        jax.block_until_ready(run())
        calls[name] = max(1, round(least / (time.perf_counter() - start)))
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                result = run()
            jax.block_until_ready(result)
            taken[name].append((time.perf_counter() - start) / calls[name])
    return {name: (min(t), statistics.median(t)) for name, t in taken.items()}


def device_rates(small: bool) -> tuple[float, float]:
    """Bytes a second of a copy, operations a second of a large bfloat16 product."""
    n = 512 if small else 8192
    flat = jnp.ones((n * n * (1 if small else 8),), jnp.bfloat16)
    square = jnp.ones((n, n), jnp.bfloat16)
    copy, product = jax.jit(lambda a: a + 1), jax.jit(jnp.matmul)
    runs = {"copy": lambda: copy(flat), "matmul": lambda: product(square, square)}
    times = seconds(runs)
    return 2 * flat.nbytes / times["copy"][0], 2 * n**3 / times["matmul"][0]


def both(f):
    """Results of `f`, and gradients for cotangents that are their cosines."""

    def run(*floats):
        results, pull = jax.vjp(f, *floats)
        return results, pull(jax.tree.map(jnp.cos, results))

    return run


class Table:
    """Prints rows as they come, and keeps them."""

    def __init__(self, copy: float, matmul: float):
        self.copy, self.matmul = copy, matmul
        self.rows, self.bars = [], []

    def floor(self, moved_bytes: float, operations: float) -> float:
        return max(moved_bytes / self.copy, operations / self.matmul)

    def add(self, case: str, candidates: dict[str, Callable], floor: float) -> dict:
        times = seconds(candidates)
        for name, (least, median) in times.items():
            print(
                f"  {case:34} {name:12}{1e6 * least:12.1f}{1e6 * median:12.1f}"
                f"{floor / least:9.1%}",
                flush=True,
            )
            self.rows.append(
                {
                    "case": case,
                    "candidate": name,
                    "seconds": least,
                    "median_seconds": median,
                    "floor_seconds": floor,
                }
            )
        return {name: least for name, (least, _) in times.items()}

    def bar(self, what: str, value: float, bound: float, at_least: bool = True):
        met = value >= bound if at_least else value <= bound
        sign = ">=" if at_least else "<="
        verdict = "met" if met else "MISSED"
        print(f"  {'':34} {what}: {value:.3g} {sign} {bound}: {verdict}", flush=True)
        self.bars.append({"bar": what, "value": value, "bound": bound, "met": met})


# ------------------------------------------------------------------------- operations


def scan_inputs(b, t, g, r, p, n, dtype=jnp.bfloat16):
    case = ssd_cases.Case(b, t, g, r, p, n)
    x, dt, A, B, C, D = ssd_cases.inputs(case)[0]
    narrow = lambda a: a.astype(dtype)
    return narrow(x), dt, A, narrow(B), narrow(C), D


def expert_inputs(m, e, c, d, f, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 5)
    normal = lambda key, *shape: jax.random.normal(key, shape, dtype)
    _, experts = jax.lax.top_k(jax.random.uniform(keys[0], (m, e)), c)
    up, down = normal(keys[1], e, d, f) / d**0.5, normal(keys[2], e, f, d) / f**0.5
    gates = jax.nn.softmax(jax.random.normal(keys[3], (m, c))).astype(dtype)
    return normal(keys[4], m, d), up.astype(dtype), down.astype(dtype), experts, gates


def norm_inputs(b, t, g, r, p, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(1), 2)
    y, z = (jax.random.normal(key, (b, t, g, r, p), dtype) for key in keys)
    return y, z, jnp.ones((g, r, p), dtype)


def scan(implementation):
    return functools.partial(kernels.ssd, implementation=implementation)


def mlp(implementation, experts, **options):
    def f(x, up, down, gates):
        options_ = options | {"implementation": implementation}
        return kernels.expert_mlp(x, up, down, experts, gates, **options_)

    return f


def product(implementation, experts):
    def f(x, w):
        return kernels.grouped_matmul(x, w, experts, implementation=implementation)

    return f


def norm(implementation, width):
    options = {"live": width, "eps": 1e-5, "implementation": implementation}
    return functools.partial(kernels.gated_rms_norm, **options)


def with_mosaic(forms: tuple[str, ...]) -> tuple[str, ...]:
    """The forms of a grouped product: one more where its units are."""
    return (*forms, "mosaic") if dispatch.capability() == 90 else forms


def check(forms, sizes) -> list[dict]:
    """Errors of each form in bfloat16, within twice those of the reference there.

    What fails or errs is said, and not timed.
    """
    scan_sizes, expert_sizes = sizes["scan"], sizes["experts"] | {"e": 4}
    b, t = 2, 300
    x, up, down, experts, gates = expert_inputs(96, **expert_sizes, dtype=jnp.float32)
    heads = [scan_sizes[name] for name in "grp"]
    operations = {
        "ssd": (scan, scan_inputs(b, t, **scan_sizes, dtype=jnp.float32)),
        "expert_mlp": (
            lambda form: mlp(form, experts),
            (x, up, down, gates),
        ),
        "grouped_matmul": (
            lambda form: product(form, experts),
            (jnp.stack([x] * experts.shape[1], 1), up),
        ),
        "gated_rms_norm": (
            lambda form: norm(form, heads[1] * heads[2]),
            norm_inputs(b, t, *heads, dtype=jnp.float32),
        ),
    }

    def errors(got, exact):
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
        pairs = [(np.float64(g), np.float64(e)) for g, e in pairs]
        return np.array([np.abs(g - e).mean() / np.abs(e).mean() for g, e in pairs])

    rows = []
    for name, (make, floats) in operations.items():
        narrow = [a.astype(jnp.bfloat16) for a in floats]
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(both(make("reference")))(*floats)
        plain = errors(jax.jit(both(make("reference")))(*narrow), exact)
        for form in with_mosaic(forms) if name == "grouped_matmul" else forms:
            row = {"operation": name, "form": form, "ok": False}
            rows.append(row)
            try:
                found = errors(jax.jit(both(make(form)))(*narrow), exact)
            except Exception as failure:  # of one form; the others are still measured
                row["failure"] = f"{type(failure).__name__}: {failure}"
                print(f"  {name:17} {form:8} FAILED\n{row['failure']}", flush=True)
                continue
            row["ok"] = bool((found <= np.maximum(BUDGET * plain, ROUNDING)).all())
            row |= {"error": found.max(), "reference": plain.max()}
            print(
                f"  {name:17} {form:8} {found.max():.1e}  reference {plain.max():.1e}"
                f"  {'ok' if row['ok'] else 'WRONG'}",
                flush=True,
            )
    return rows


def time_scan(table: Table, forms, sizes):
    """Prefill and training; floors by the operations and bytes of a fused form."""
    g, r, p, n = (sizes["scan"][name] for name in "grpn")
    h, q = g * r, CHUNK / 2  # a causal chunk has half its pairs
    for b, t in sizes["tokens"]:
        inputs, tokens = scan_inputs(b, t, g, r, p, n), b * t
        runs = {form: functools.partial(jax.jit(scan(form)), *inputs) for form in forms}
        runs |= five_kernels(inputs)
        moved = tokens * (2 * (2 * h * p + 2 * g * n) + 4 * h)
        work = tokens * (2 * g * q * n + h * (2 * q * p + 4 * p * n))
        floor = table.floor(moved, work)
        case = f"ssd B{b} T{t}"
        times = table.add(case + " forward", runs, floor)
        if "triton" in times:
            table.bar("share of the roofline", floor / times["triton"], 0.25)
            if "mamba_ssm" in times:
                ratio = times["mamba_ssm"] / times["triton"]
                table.bar("five kernels / triton", ratio, 2.0)

        runs = {f: functools.partial(jax.jit(both(scan(f))), *inputs) for f in forms}
        moved += tokens * (2 * (3 * h * p + 4 * g * n) + 8 * h)
        work += tokens * (6 * g * q * n + h * (4 * q * p + 10 * p * n))
        times = table.add(case + " both", runs, table.floor(moved, work))
        if "triton" in times:
            table.bar("xla / triton", times["xla"] / times["triton"], 5.0)
            compiled = jax.jit(both(scan("triton"))).lower(*inputs).compile()
            memory = compiled.memory_analysis()
            given = memory.argument_size_in_bytes + memory.output_size_in_bytes
            share = memory.temp_size_in_bytes / given
            table.bar("temporaries / inputs and outputs", share, 2.0, at_least=False)


def five_kernels(inputs) -> dict[str, Callable]:
    """The usual Triton path, where its package is importable."""
    if not importlib.util.find_spec("mamba_ssm"):
        return {}
    import torch
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, A, B, C, D = (torch.utils.dlpack.from_dlpack(a) for a in inputs)
    merged = x.flatten(2, 3), dt.flatten(2), A.flatten(), B, C

    def run():
        y = mamba_chunk_scan_combined(*merged, chunk_size=256, D=D.flatten())
        torch.cuda.synchronize()
        return jnp.zeros(()) if y is None else ()

    return {"mamba_ssm": run}


def time_decoding(table: Table, forms, sizes):
    """One token of many sequences: the state is read and written."""
    b = sizes["decoding"]
    inputs = scan_inputs(b, 1, **sizes["scan"])
    g, r, p, n = (sizes["scan"][name] for name in "grpn")
    runs = {}
    for form in forms:
        step = jax.jit(
            lambda state, *a, form=form: scan(form)(*a, initial_state=state),
            donate_argnums=0,
        )
        held = [jnp.zeros((b, g, r, p, n))]

        def run(step=step, held=held):
            y, held[0] = step(held[0], *inputs)
            return y, held[0]

        runs[form] = run
    floor = table.floor(2 * 4 * b * g * r * p * n, 0)
    times = table.add(f"decode {b * g * r} heads", runs, floor)
    if "triton" in times:
        table.bar("share of copy bandwidth", floor / times["triton"], 0.75)


def time_experts(table: Table, forms, sizes):
    """Whole width beside the large product's rate, then fewer channels."""
    m, (e, c, d, f) = sizes["mlp"], (sizes["experts"][name] for name in "ecdf")
    x, up, down, experts, gates = expert_inputs(m, e, c, d, f)
    floats = x, up, down, gates
    forms_ = {form: mlp(form, experts) for form in forms}
    forms_["ragged_dot"] = functools.partial(ragged, experts)
    work, weights = 4 * m * c * d * f, 2 * 2 * e * d * f
    for what, wrap, times_ in (("forward", lambda g: g, 1), ("both", both, 3)):
        jitted = {n: jax.jit(wrap(g)) for n, g in forms_.items()}
        runs = {n: functools.partial(g, *floats) for n, g in jitted.items()}
        floor = table.floor(times_ * weights, times_ * work)
        times = table.add(f"expert_mlp {m * c // e} rows {what}", runs, floor)
        if "triton" in times:
            rate = times_ * work / times["triton"] / table.matmul
            table.bar("share of the large product's rate", rate, 0.70)
            ratio = times["ragged_dot"] / times["triton"]
            table.bar("ragged_dot / triton", ratio, 5.0)

    form = forms[0]
    step = 16
    elastic = jax.jit(
        lambda n_f, n_d, *a: both(mlp(form, experts, active=(n_f, n_d)))(*a)
    )
    for share in (0.5, 0.75):
        n_f, n_d = (round(share * width / step) * step for width in (f, d))
        cut = x[:, :n_d], up[:, :n_d, :n_f], down[:, :n_f, :n_d], gates
        runs = {
            "active": functools.partial(
                elastic, jnp.int32(n_f), jnp.int32(n_d), *floats
            ),
            "cut": functools.partial(jax.jit(both(forms_[form])), *cut),
        }
        floor = table.floor(3 * weights * share**2, 3 * work * share**2)
        times = table.add(f"expert_mlp {n_f} of {f} x {n_d} of {d}", runs, floor)
        if form == "triton":
            ratio = times["active"] / times["cut"]
            table.bar("active / really cut", ratio, 1.10, at_least=False)
    before = elastic._cache_size()
    for n_f, n_d in np.random.default_rng(0).integers(1, 1 + min(f, d), (20, 2)):
        jax.block_until_ready(elastic(jnp.int32(n_f), jnp.int32(n_d), *floats))
    new = elastic._cache_size() - before
    table.bar("compilations over 20 widths", new, 0, at_least=False)


def time_product(table: Table, forms, sizes):
    """One product of rows that choose, and its gradients."""
    m, (e, c, d, f) = sizes["mlp"], (sizes["experts"][name] for name in "ecdf")
    x, up, _, experts, _ = expert_inputs(m, e, c, d, f)
    x, work, weights = jnp.stack([x] * c, 1), 2 * m * c * d * f, 2 * e * d * f
    for what, wrap, times_ in (("forward", lambda g: g, 1), ("both", both, 3)):
        jitted = {n: jax.jit(wrap(product(n, experts))) for n in forms}
        runs = {n: functools.partial(g, x, up) for n, g in jitted.items()}
        floor = table.floor(times_ * weights, times_ * work)
        times = table.add(f"grouped_matmul {m * c // e} rows {what}", runs, floor)
        if "mosaic" in times:
            rate = times_ * work / times["mosaic"] / table.matmul
            table.bar("mosaic's share of the large product's rate", rate, 0.70)


def ragged(experts, x, up, down, gates):
    """Rows sorted by expert through `lax.ragged_dot`."""
    order = jnp.argsort(experts.ravel())
    sizes = jnp.bincount(experts.ravel(), length=len(up)).astype(jnp.int32)
    token = order // experts.shape[1]
    hidden = jax.nn.relu(jax.lax.ragged_dot(x[token], up, sizes)) ** 2
    rows = jax.lax.ragged_dot(hidden, down, sizes) * gates.ravel()[order][:, None]
    return jnp.zeros_like(x).at[token].add(rows)


def time_norm(table: Table, forms, sizes):
    heads = [sizes["scan"][name] for name in "grp"]
    b, t = sizes["tokens"][0]
    floats = norm_inputs(b, t, *heads)
    size = floats[0].nbytes
    for what, wrap, times_ in (("forward", lambda f: f, 3), ("both", both, 8)):
        make = lambda form, wrap=wrap: jax.jit(wrap(norm(form, heads[1] * heads[2])))
        runs = {form: functools.partial(make(form), *floats) for form in forms}
        table.add(f"gated_rms_norm {what}", runs, table.floor(times_ * size, 0))


OPERATIONS = {
    "ssd": (time_scan, time_decoding),
    "expert_mlp": (time_experts,),
    "grouped_matmul": (time_product,),
    "gated_rms_norm": (time_norm,),
}


def run(operations=tuple(OPERATIONS), *, small: bool = False) -> dict:
    """Errors, times and bars; `small` sizes prove the script, and no speed."""
    forms = ("triton", "xla") if jax.default_backend() == "gpu" else ("xla",)
    sizes = SMALL if small else NANO
    print("\nMean error of results and gradients in bfloat16, against float32:")
    errors = check(forms, sizes)
    copy, matmul = device_rates(small)
    print(f"\ncopy {copy / 1e12:.2f} TB/s, matmul {matmul / 1e12:.0f} TFLOP/s")
    print(f"\n  {'':34} {'':12}{'min us':>12}{'median us':>12}{'floor':>9}")
    table = Table(copy, matmul)
    for name in operations:
        right = [e["form"] for e in errors if e["operation"] == name and e["ok"]]
        for measure in OPERATIONS.get(name, ()) if right else ():
            measure(table, tuple(right), sizes)
    rates = {"copy_bytes_per_second": copy, "matmul_flops": matmul}
    return {"errors": errors, "times": table.rows, "bars": table.bars} | rates
