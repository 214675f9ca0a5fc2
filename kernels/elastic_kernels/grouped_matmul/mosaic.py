"""Grouped products by Hopper's warpgroup units. Experimental, and never chosen unasked.

    m tokens   c choices (top_k)   e experts   d embed   f expert_ffn
    n rows = m c   p places: rows in the order of their experts, in full tiles

Hopper's units multiply tiles that lie in shared memory, and its copy engine brings them
there as boxes, so rows are laid out beforehand: the tiles of an expert start at a
multiple of the tile and end in zeros. No tile then has two experts, and none is cut.

The language, Pallas Mosaic GPU, changes from release to release. No GPU has run this:
it is proved in the interpreter of JAX 0.11 and later, and by what compiles.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from elastic_kernels import dispatch
from elastic_kernels.grouped_matmul.schedule import schedule_of
from elastic_kernels.grouped_matmul.xla import block_size

CAPABILITY = 90
DTYPES = ("bfloat16", "float16")
DEPTH = 64  # of one step along the contraction: 128 bytes, the widest swizzle
STEPS_IN_FLIGHT = 4


class Places(NamedTuple):
    """Where rows lie, and whose they are."""

    source: Int[Array, " p"]  # the row at each place; n is none
    of_row: Int[Array, " n"]
    owner: Int[Array, " tiles"]  # the expert of each tile; -1 is none
    first: Int[Array, " e"]  # tile of each expert
    count: Int[Array, " e"]  # tiles of each expert


def grouped_matmul(
    x: Float[Array, "m c d"], w: Float[Array, "e d f"], experts: Int[Array, "m c"]
) -> Float[Array, "m c f"]:
    """As `elastic_kernels.grouped_matmul`.

    Raises:
      NotImplementedError: no Hopper GPU, a dtype without such units, quantized weights,
        or widths that are no multiples of 64.
    """
    if dispatch.capability() != CAPABILITY:
        raise NotImplementedError(
            "grouped_matmul: the Mosaic kernel is for compute capability 9.0 alone, "
            f"this device has {(dispatch.capability() or 0) / 10 or 'none'}; use "
            "implementation='triton' or 'xla'"
        )
    if x.dtype.name not in DTYPES or not isinstance(w, jax.Array):
        raise NotImplementedError(
            f"grouped_matmul: the Mosaic kernel takes x in {DTYPES} and plain arrays "
            f"as weights, got {x.dtype} and {type(w).__name__}; use "
            "implementation='triton'"
        )
    if any(width % DEPTH for width in w.shape[1:]):
        raise NotImplementedError(
            f"grouped_matmul: the Mosaic kernel takes widths that are multiples of "
            f"{DEPTH}, got {w.shape[1:]}; use implementation='triton'"
        )
    rows = x.reshape(-1, x.shape[-1])
    return _grouped(rows, w.astype(x.dtype), experts).reshape(*experts.shape, -1)


@jax.custom_vjp
def _grouped(x, w, experts):
    return _run(x, w, experts)


def _grouped_forward(x, w, experts):
    return _run(x, w, experts), (x, w, experts)


def _grouped_backward(saved, dy):
    return *_gradients(*saved, dy), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


@jax.custom_batching.sequential_vmap
def _run(x, w, experts):
    places = _places(experts, len(w))
    return _rows(_laid_out(x, places), w, places, turned=False)[places.of_row]


@jax.custom_batching.sequential_vmap
def _gradients(x, w, experts, dy):
    places = _places(experts, len(w))
    x, dy = _laid_out(x, places), _laid_out(dy, places)
    dx = _rows(dy, w, places, turned=True)[places.of_row]
    return dx, _weight_gradient(x, dy, places)


def _places(experts: Int[Array, "m c"], count: int) -> Places:
    n = experts.size
    tile = 64 if block_size(n, count) <= 64 else 128
    schedule = schedule_of(experts, count, tile)
    owner, first, last = schedule.tiles.T
    within = first[:, None] + jnp.arange(tile)
    real = within < last[:, None]
    order = schedule.order[jnp.minimum(within, n - 1)]
    source = jnp.where(real, order, n).reshape(-1)
    of_row = jnp.zeros(n, jnp.int32)
    of_row = of_row.at[source].set(jnp.arange(len(source)), mode="drop")
    of_expert = -(-jnp.diff(schedule.ends) // tile)
    ahead = jnp.cumsum(of_expert) - of_expert
    return Places(source, of_row, owner, ahead, of_expert)


def _laid_out(x: Float[Array, "n k"], places: Places) -> Float[Array, "p k"]:
    return x.at[places.source].get(mode="fill", fill_value=0)


def _rows(x: Float[Array, "p k"], w: Float[Array, "e _ _"], places: Places, *, turned):
    """Every tile by its expert's matrix, or, `turned`, by the transpose of that."""
    depth, width = w.shape[:0:-1] if turned else w.shape[1:]
    tiles = len(places.owner)
    tile, column = len(x) // tiles, _column(width)

    def body(owner, x, w, y):
        row, expert = jax.lax.axis_index("row"), owner[jax.lax.axis_index("row")]
        at = jax.lax.axis_index("column")

        @pl.when(expert >= 0)
        def _():
            def multiply(total):
                def step(_, x, w):
                    w = w.transpose((1, 0)) if turned else w
                    plgpu.wgmma(total, x, w)

                box = (column, DEPTH) if turned else (DEPTH, column)
                place = (lambda k: (at, k)) if turned else (lambda k: (k, at))
                plgpu.emit_pipeline(
                    step,
                    grid=(depth // DEPTH,),
                    in_specs=[
                        _box((tile, DEPTH), lambda k: (row, k)),
                        _box(box, place),
                    ],
                    max_concurrent_steps=STEPS_IN_FLIGHT,
                )(x, w.at[expert])
                return total[...]

            total = pl.run_scoped(multiply, plgpu.ACC((tile, column)))
            box = pl.ds(row * tile, tile), pl.ds(at * column, column)
            _store(total, y.at[box])

    return _kernel(
        body,
        jax.ShapeDtypeStruct((len(x), width), x.dtype),
        row=tiles,
        column=width // column,
    )(places.owner, x, w)


def _weight_gradient(x: Float[Array, "p d"], dy: Float[Array, "p f"], places: Places):
    """x^T dy over the tiles of each expert; zeros where it has none."""
    (p, d), f, e = x.shape, dy.shape[1], len(places.first)
    tile = p // len(places.owner)
    sides = _column(d), _column(f)

    def body(first, count, x, dy, dw):
        expert, i, j = map(jax.lax.axis_index, ("expert", "row", "column"))
        start = pl.multiple_of(first[expert] * tile, tile)

        def multiply(total):
            def step(_, x, dy):
                plgpu.wgmma(total, x.transpose((1, 0)), dy)

            steps = count[expert] * (tile // DEPTH)

            @pl.when(steps > 0)
            def _():
                own = pl.ds(start, p)  # no step reaches behind the expert's last tile
                plgpu.emit_pipeline(
                    step,
                    grid=(steps,),
                    in_specs=[
                        _box((DEPTH, sides[0]), lambda k: (k, i)),
                        _box((DEPTH, sides[1]), lambda k: (k, j)),
                    ],
                    max_concurrent_steps=STEPS_IN_FLIGHT,
                )(x.at[own], dy.at[own])

            return total[...]

        total = pl.run_scoped(multiply, plgpu.ACC(sides))
        box = (pl.ds(at * side, side) for at, side in zip((i, j), sides, strict=True))
        _store(total, dw.at[(expert, *box)])

    return _kernel(
        body,
        jax.ShapeDtypeStruct((e, d, f), x.dtype),
        expert=e,
        row=d // sides[0],
        column=f // sides[1],
    )(places.first, places.count, x, dy)


def _column(width: int) -> int:
    return 128 if width % 128 == 0 else DEPTH


def _box(shape, place):
    return plgpu.BlockSpec(shape, place, delay_release=1)


def _store(total, target):
    """Registers to global memory, through shared memory."""

    @functools.partial(pl.run_scoped, staged=plgpu.SMEM(total.shape, target.dtype))
    def _(staged):
        staged[...] = total.astype(target.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _kernel(body, out, **grid):
    semantics = plgpu.LoweringSemantics.Warpgroup
    return plgpu.kernel(
        body,
        out_type=out,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(lowering_semantics=semantics),
    )
