"""Grouped products on NVIDIA GPUs, as wide as they are live.

    m tokens   c choices (top_k)   e experts   d embed   f expert_ffn   n rows = m c

Rows are sorted by expert and cut into tiles of one expert each; an expert without rows
gets no tile. The rows are gathered inside the first product and weighted by their gates
inside the second; relu and square are between the two in registers. What is kept for
the gradient is the rectified `x @ up` of each row.

How many hidden and embedding channels are live is read by the kernels when they run
and bounds their loops: half the width costs half of either product, with no other
executable. Tails of results and gradients are exact zeros.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from elastic_kernels import dispatch
from elastic_kernels import launch as launching
from elastic_kernels.grouped_matmul import kernels
from elastic_kernels.grouped_matmul.schedule import schedule_of
from elastic_kernels.grouped_matmul.xla import block_size
from elastic_kernels.products import FakeQuant, input_scale, met_by_choice
from elastic_kernels.quant_array import QuantArray

DTYPES = ("float32", "bfloat16", "float16")
Weight = jax.Array | QuantArray | FakeQuant


def grouped_matmul(
    x: Float[Array, "m c d"],
    w: Float[Array | QuantArray | FakeQuant, "e d f"],
    experts: Int[Array, "m c"],
) -> Float[Array, "m c f"]:
    """As `elastic_kernels.grouped_matmul`.

    Raises:
      NotImplementedError: as `expert_mlp`.
    """
    x, w = met_by_choice(x, w, experts), _taken("grouped_matmul", x, w)
    live = jnp.array([x.shape[2], w.shape[2]], jnp.int32)
    x, w, experts, live = _alike(x, w, experts, live)
    return _grouped_matmul(x, w, experts, live)


def expert_mlp(
    x: Float[Array, "m d"],
    up: Float[Array | QuantArray | FakeQuant, "e d f"],
    down: Float[Array | QuantArray | FakeQuant, "e f d"],
    experts: Int[Array, "m c"],
    gates: Float[Array, "m c"],
    hidden_mask: Float[Array, "*m f"] | None = None,
    active: tuple = (None, None),
) -> Float[Array, "m d"]:
    """As `elastic_kernels.expert_mlp`.

    Raises:
      NotImplementedError: a dtype or a packing that the kernels do not have, or a GPU
        older than Ampere.
    """
    taken = [_taken("expert_mlp", x, w) for w in (up, down)]
    widths = zip((up.shape[2], up.shape[1]), active, strict=True)
    live = [whole if n is None else n for whole, n in widths]
    live = jnp.stack([jnp.asarray(n, jnp.int32) for n in live])
    x, taken, *others = _alike(x, taken, experts, gates, hidden_mask, live)
    if input_scale(up) is None and input_scale(down) is None:
        return _expert_mlp(x, *taken, *others)
    return _rounding_mlp(x, (up, down), taken, *others)


def _taken(operation: str, x: jax.Array, w: Weight) -> jax.Array | QuantArray:
    """The weight as the kernels read it.

    Raises:
      NotImplementedError: they do not.
    """
    dispatch.require_capability(operation)
    if isinstance(w, QuantArray) and (w.axis != -2 or w.scale.ndim > 1):
        raise NotImplementedError(
            f"{operation}: the Triton kernels read matrices packed along axis -2 with "
            f"a scale for each, got axis {w.axis} and scales {w.scale.shape}; use "
            "implementation='xla'"
        )
    if x.dtype.name not in DTYPES:
        raise NotImplementedError(
            f"{operation}: the Triton kernels take x in {DTYPES}, got {x.dtype}; use "
            "implementation='xla'"
        )
    return w.astype(x.dtype) if isinstance(w, FakeQuant) else w


def _alike(*arguments):
    leaves, tree = jax.tree.flatten(arguments)
    return jax.tree.unflatten(tree, launching.alike(*leaves))


# ------------------------------------------------------------------------- expert_mlp


@jax.custom_vjp
def _expert_mlp(x, up, down, experts, gates, mask, live):
    return _mlp(False, x, up, down, experts, gates, mask, live)[0]


def _mlp_forward(x, up, down, experts, gates, mask, live):
    y, kept = _mlp(True, x, up, down, experts, gates, mask, live)
    return y, (x, up, down, experts, gates, mask, live, kept)


def _mlp_backward(saved, dy):
    x, up, down, experts, gates, mask, live, kept = saved
    dx, dup, ddown, dgates, dmask = _mlp_gradient(
        x, up, down, experts, gates, mask, live, kept, dy
    )
    return dx, dup, ddown, None, dgates, dmask, None


_expert_mlp.defvjp(_mlp_forward, _mlp_backward)


def _mlp(keep, *arguments):
    run = _run_keeping if keep else _run
    y, kept = run(*arguments)
    return y, kept


def _run_mlp(x, up, down, experts, gates, mask, live, *, keep: bool):
    """The output [m d]; where `keep`, the rectified x @ up of each place [n f]."""
    (m, d), c, f, n = x.shape, experts.shape[1], up.shape[2], experts.size
    tiling = _tiling(x, n, len(up))
    schedule = schedule_of(experts, len(up), tiling["BLOCK_M"])
    slots = len(schedule.tiles)
    of_places = jax.ShapeDtypeStruct((n, f), x.dtype)
    hidden, kept = launching.launch(
        kernels.up_kernel,
        (x, *_stored(up), _or(mask, x), schedule.order, schedule.tiles, live, slots),
        (of_places, of_places if keep else jax.ShapeDtypeStruct((0,), x.dtype)),
        grid=(slots * _blocks(f, tiling["BLOCK_N"]),),
        D=d,
        F=f,
        C=c,
        MASK=0 if mask is None else mask.ndim,
        KEEP=keep,
        FORMAT=_format(up),
        **tiling,
    )
    out = _rows(hidden, down, schedule, live[0:1], live[1:2], tiling, c=c, gates=gates)
    return _over_choices(out, m), kept


_run = jax.custom_batching.sequential_vmap(functools.partial(_run_mlp, keep=False))
_run_keeping = jax.custom_batching.sequential_vmap(
    functools.partial(_run_mlp, keep=True)
)


@jax.custom_batching.sequential_vmap
def _mlp_gradient(x, up, down, experts, gates, mask, live, kept, dy):
    """Gradients of x, up, down, gates and mask; None where nothing is learnt."""
    (m, d), c, f, n = x.shape, experts.shape[1], up.shape[2], experts.size
    tiling = _tiling(x, n, len(up))
    schedule = schedule_of(experts, len(up), tiling["BLOCK_M"])
    slots = len(schedule.tiles)
    half = tiling | {"BLOCK_N": 64}  # the end of that kernel takes many registers
    blocks = _blocks(f, half["BLOCK_N"])
    of_places = jax.ShapeDtypeStruct((n, f), x.dtype)
    of_mask = {0: 0, 1: slots * f, 2: n * f}[0 if mask is None else mask.ndim]
    dactive, gated, dgates, dmask = launching.launch(
        kernels.hidden_gradient_kernel,
        (
            dy,
            *_stored(down),
            kept,
            gates,
            _or(mask, x),
            schedule.order,
            schedule.tiles,
            live,
            slots,
        ),  # fmt: skip
        (
            of_places,
            of_places,
            jax.ShapeDtypeStruct((n, blocks), jnp.float32),
            jax.ShapeDtypeStruct((of_mask,), jnp.float32),
        ),
        grid=(slots * blocks,),
        zeroed=(3,),
        D=d,
        F=f,
        C=c,
        MASK=0 if mask is None else mask.ndim,
        FORMAT=_format(down),
        **half,
    )
    live_f, live_d = live[0:1], live[1:2]
    dx = _rows(dactive, up, schedule, live_f, live_d, tiling, c=c, turned=True)
    dup = _weight_gradient(
        (x, dactive), (True, False), up, schedule, (live_d, live_f), c
    )
    ddown = _weight_gradient(
        (gated, dy), (False, True), down, schedule, (live_f, live_d), c
    )
    dgates = jnp.sum(dgates, -1).reshape(gates.shape).astype(gates.dtype)
    if mask is not None:
        rows = dmask.reshape(m, c, f) if mask.ndim == 2 else dmask.reshape(1, slots, f)
        dmask = jnp.sum(rows, 1).reshape(mask.shape).astype(mask.dtype)
    return _over_choices(dx, m), dup, ddown, dgates, None if mask is None else dmask


def _rounding_mlp(x, weights, taken, experts, gates, mask, live):
    """Two products apart: what each meets is rounded by the scale of the chosen one.

    That takes a row per choice of the inputs and of the outputs, which the fused form
    never has.
    """
    (up, down), wide = weights, jnp.float32
    x = jnp.where(jnp.arange(x.shape[1]) < live[1], x, 0)
    rows = jnp.broadcast_to(x[:, None], (*experts.shape, x.shape[1]))
    rows = met_by_choice(rows, up, experts)
    active = jax.nn.relu(_grouped_matmul(rows, taken[0], experts, live[::-1]))
    hidden = active.astype(wide) ** 2
    if mask is not None:
        hidden = hidden * jnp.expand_dims(mask.astype(wide), -2)
    hidden = met_by_choice(hidden.astype(x.dtype), down, experts)
    out = _grouped_matmul(hidden, taken[1], experts, live)
    return jnp.sum(gates[..., None].astype(wide) * out, axis=1).astype(x.dtype)


# --------------------------------------------------------------------- grouped_matmul


@jax.custom_vjp
def _grouped_matmul(x, w, experts, live):
    return _run_grouped(x, w, experts, live)


def _grouped_forward(x, w, experts, live):
    return _run_grouped(x, w, experts, live), (x, w, experts, live)


def _grouped_backward(saved, dy):
    return *_grouped_gradient(*saved, dy), None, None


_grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


@jax.custom_batching.sequential_vmap
def _run_grouped(x, w, experts, live):
    tiling = _tiling(x, experts.size, len(w))
    schedule = schedule_of(experts, len(w), tiling["BLOCK_M"])
    y = _rows(x, w, schedule, live[0:1], live[1:2], tiling, c=1, gathered=True)
    return y.reshape(*experts.shape, -1)


@jax.custom_batching.sequential_vmap
def _grouped_gradient(x, w, experts, live, dy):
    tiling = _tiling(x, experts.size, len(w))
    schedule = schedule_of(experts, len(w), tiling["BLOCK_M"])
    live_in, live_out = live[0:1], live[1:2]
    options = {"c": 1, "gathered": True, "turned": True}
    dx = _rows(dy, w, schedule, live_out, live_in, tiling, **options)
    dw = _weight_gradient((x, dy), (True, True), w, schedule, (live_in, live_out), 1)
    return dx.reshape(x.shape), dw


# -------------------------------------------------------------------------- their parts


def _tiling(x: jax.Array, rows: int, experts: int) -> dict[str, int]:
    """Tile sizes and warps: rows as many as an expert usually has, up to 128."""
    few = min(128, max(16, 1 << (block_size(rows, experts) - 1).bit_length()))
    if x.dtype == jnp.float32:
        sizes = {"BLOCK_M": min(few, 64), "BLOCK_N": 64, "BLOCK_K": 32}
    else:
        sizes = {"BLOCK_M": few, "BLOCK_N": 128, "BLOCK_K": 64}
    return sizes | {"num_warps": 8 if few == 128 else 4, "num_stages": 3}


def _rows(
    x, w, schedule, live_in, live_out, tiling, *, c,
    gates=None, gathered=False, turned=False,
):  # fmt: skip
    """x @ w of each row [n, width]; by the transpose of w where `turned`."""
    width_in, width_out = w.shape[1:][:: -1 if turned else 1]
    slots = len(schedule.tiles)
    (out,) = launching.launch(
        kernels.rows_kernel,
        (
            x,
            *_stored(w),
            _or(gates, x),
            schedule.order,
            schedule.tiles,
            live_in,
            live_out,
            slots,
        ),  # fmt: skip
        (jax.ShapeDtypeStruct((len(schedule.order), width_out), x.dtype),),
        grid=(slots * _blocks(width_out, tiling["BLOCK_N"]),),
        WIDTH_IN=width_in,
        WIDTH_OUT=width_out,
        C=c,
        GATHERED=gathered,
        GATED=gates is not None,
        TURNED=turned,
        FORMAT=_format(w),
        **tiling,
    )
    return out


def _weight_gradient(operands, gathered, w, schedule, live, c):
    """a^T b over the rows of each expert, in the dtype of `w`; None if quantized."""
    if isinstance(w, QuantArray):
        return None
    side = 64 if operands[0].dtype == jnp.float32 else 128
    tiling = {"BLOCK_M": side, "BLOCK_N": side, "BLOCK_K": 32 if side == 64 else 64}
    (out,) = launching.launch(
        kernels.weight_gradient_kernel,
        (*operands, schedule.order, schedule.ends, *live),
        (jax.ShapeDtypeStruct(w.shape, w.dtype),),
        grid=(_blocks(w.shape[1], side) * _blocks(w.shape[2], side), len(w)),
        WIDTH_A=w.shape[1],
        WIDTH_B=w.shape[2],
        C=c,
        GATHERED_A=gathered[0],
        GATHERED_B=gathered[1],
        num_warps=8,
        num_stages=3,
        **tiling,
    )
    return out


def _over_choices(rows: Float[Array, "n d"], m: int) -> Float[Array, "m d"]:
    """The sum over each token's choices, always in the same order."""
    wide = rows.reshape(m, -1, rows.shape[-1]).astype(jnp.float32)
    return jnp.sum(wide, 1).astype(rows.dtype)


def _stored(w: jax.Array | QuantArray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The matrices as the kernels read them: values, block scales, scales."""
    if not isinstance(w, QuantArray):
        return w, w, w
    codes = lambda a: a if a.dtype == jnp.uint8 else _bits(a)
    values = codes(w.values)
    blocks = values if w.block_scale is None else codes(w.block_scale)
    return values, blocks, jnp.broadcast_to(w.scale, (len(w),))


def _bits(a: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(a, jnp.uint8)


def _format(w: jax.Array | QuantArray) -> int:
    if not isinstance(w, QuantArray):
        return 0
    return {"fp8": 1, "nvfp4": 2}[w.format]


def _blocks(width: int, block: int) -> int:
    return -(-width // block)


def _or(a: jax.Array | None, anything: jax.Array) -> jax.Array:
    """`a`; where it is missing, a pointer that the kernel will not follow."""
    return anything if a is None else a
