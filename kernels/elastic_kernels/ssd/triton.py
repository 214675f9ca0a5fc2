"""The chunked scan on NVIDIA GPUs.

    b batch   t time   g ssm_groups   r heads_per_group   p ssm_head_dim   n ssm_state
    c chunks

One program per (batch, head) walks the chunks with the state in registers, so that
inputs are read and outputs written once, and no state goes to memory but those the
gradient needs. Where that gives too few programs for the device, the sequence is cut
into segments: a first pass finds the state that each leaves, a second walks them all
at once (`_segments`). A single token, decoding, has a kernel of its own.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from elastic_kernels import dispatch
from elastic_kernels import launch as launching
from elastic_kernels.launch import alike, batch_parallel
from elastic_kernels.ssd import gradient_kernels, kernels, xla

LARGEST_STATE = 256
PROGRAMS = 264  # two for each multiprocessor of the GPUs that this is tuned for
DTYPES = ("float32", "bfloat16", "float16")


def ssd(
    x: Float[Array, "b t g r p"],
    dt: Float[Array, "b t g r"],
    A: Float[Array, "g r"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, "g r"],
    *,
    initial_state: Float[Array, "b g r p n"] | None = None,
    resets: Bool[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t g r p"], Float[Array, "b g r p n"]]:
    """Scans chunks; arguments and results as in `elastic_kernels.ssd`.

    Raises:
      NotImplementedError: a dtype or a state size that the kernels do not have, or a
        GPU older than Ampere.
    """
    dispatch.require_capability("ssd")
    if x.dtype.name not in DTYPES:
        raise NotImplementedError(
            f"ssd: the Triton kernels take x in {DTYPES}, got {x.dtype}; use "
            "implementation='xla'"
        )
    if B.shape[-1] > LARGEST_STATE:
        raise NotImplementedError(
            f"ssd: the Triton kernels keep a state of at most {LARGEST_STATE} channels "
            f"on chip, got {B.shape[-1]}; use implementation='xla'"
        )
    b, t, g, r, _ = x.shape
    if t == 1:
        return _step(*alike(x, dt, A, B, C, D, initial_state, resets))
    A, D = (jnp.broadcast_to(a.astype(jnp.float32), (b, g, r)) for a in (A, D))
    B, C = B.astype(x.dtype), C.astype(x.dtype)
    begins = None if resets is None else _last_reset(resets)
    return _scan(*alike(x, dt, A, B, C, D, initial_state, begins))


@jax.custom_vjp
def _scan(x, dt, A, B, C, D, state, begins):
    y, final, _ = _forward(x, dt, A, B, C, D, state, begins)
    return y, final


def _scan_forward(x, dt, A, B, C, D, state, begins):
    y, final, entries = _forward_saving(x, dt, A, B, C, D, state, begins)
    return (y, final), (x, dt, A, B, C, D, state, begins, entries)


def _scan_backward(saved, cotangents):
    x, dt, A, B, C, D, state, begins, entries = saved
    dy, dfinal = cotangents
    exits, dstate = _state_gradient(x, dt, A, C, begins, dy, dfinal)
    dx, ddt, dA, dB, dC, dD = _chunk_gradients(
        x, dt, A, B, C, D, begins, entries, exits, dy
    )
    dstate = None if state is None else dstate.astype(state.dtype)
    return dx, ddt, dA, dB, dC, dD, dstate, None


_scan.defvjp(_scan_forward, _scan_backward)


def _blocks(
    x: jax.Array, B: jax.Array, *, widest: int = 32, states: int = LARGEST_STATE
) -> dict[str, int]:
    """Tile sizes of one program, powers of two, and its warps: chosen so that
    registers do not spill in the widths that models have.

    Args:
      widest: the most channels of a head.
      states: the most state channels, for a kernel that need not hold them all.
    """
    (_, t, *_, p), n = x.shape, B.shape[-1]
    # Hopper and Blackwell servers multiply 64 rows at a time, straight from memory.
    large = 90 <= (dispatch.capability() or 90) < 120
    crowded = n > 128 or (n > 64 and x.dtype == jnp.float32)
    room = (64 if large else 32) // (2 if crowded else 1)
    # Padding costs as much as channels; every block repeats the products of B and C.
    cost = {
        size: math.ceil(p / size) * (size + 16)
        for size in (64, 32, 16)
        if size <= max(16, min(widest, room))
    }
    return {
        "CHUNK": min(room, _power_of_two(t)),
        "BLOCK_P": min(cost, key=cost.get),
        "BLOCK_N": min(states, _power_of_two(n)),
        "num_warps": 8 if crowded else 4,
    }


def _power_of_two(size: int) -> int:
    """The smallest that holds `size` and is no smaller than a tensor core's 16."""
    return max(16, 1 << (size - 1).bit_length())


def _sizes(x: jax.Array, B: jax.Array) -> dict[str, int]:
    *_, g, r, p = x.shape
    return {"G": g, "R": r, "P": p, "N": B.shape[-1]}


def _segments(x: jax.Array, blocks: dict[str, int]) -> tuple[int, int]:
    """How many segments each sequence is cut into, and how many chunks each holds.

    One, unless the device would stand idle: the first pass does a third of the work of
    the second.
    """
    b, t, g, r, p = x.shape
    chunks = math.ceil(t / blocks["CHUNK"])
    programs = b * g * r * math.ceil(p / blocks["BLOCK_P"])
    segments = max(1, min(PROGRAMS // programs, chunks // 2, 32))
    per_segment = math.ceil(chunks / segments)
    return math.ceil(chunks / per_segment), per_segment


def _run_scan(x, dt, A, B, C, D, state, begins, *, save: bool):
    """y [b t g r p], the last state [b g r p n], and those of chunk entries
    [b c g r n p], or nothing [b 0] where they are not saved."""
    (b, t, g, r, p), n = x.shape, B.shape[-1]
    blocks, sizes = _blocks(x, B), _sizes(x, B)
    segments, per_segment = _segments(x, blocks)
    heads = g * r * math.ceil(p / blocks["BLOCK_P"])
    of_segments = jax.ShapeDtypeStruct((b, segments, g, r, p, n), jnp.float32)
    lefts = jax.ShapeDtypeStruct((b, segments, g, r), jnp.float32)
    y = jax.ShapeDtypeStruct(x.shape, x.dtype)
    nothing = jax.ShapeDtypeStruct((b, 0), x.dtype)

    def walk(parts, decays, outputs, **flags):
        return launching.launch(
            kernels.scan_kernel,
            (
                x,
                dt,
                A,
                B,
                C,
                D,
                _or(state, x),
                _or(begins, x),
                parts,
                decays,
                t,
                segments,
                per_segment,
            ),  # fmt: skip
            outputs,
            grid=(heads, b * segments),
            HAS_RESETS=begins is not None,
            **blocks,
            **sizes,
            **flags,
        )

    parts = decays = x
    if segments > 1:
        _, parts, _, decays = walk(
            x, x, (nothing, of_segments, nothing, lefts),
            HAS_STATE=False, SEGMENTED=False, WRITE=False, SAVE=False,
        )  # fmt: skip
    chunks = math.ceil(t / blocks["CHUNK"])
    entries = jax.ShapeDtypeStruct((b, chunks, g, r, n, p), x.dtype)
    final = jax.ShapeDtypeStruct((b, g, r, p, n), jnp.float32)
    outputs = y, final, entries if save else nothing, nothing
    y, final, entries, _ = walk(
        parts, decays, outputs,
        HAS_STATE=state is not None, SEGMENTED=segments > 1, WRITE=True, SAVE=save,
    )  # fmt: skip
    return y, final, entries


_forward = batch_parallel(functools.partial(_run_scan, save=False))
_forward_saving = batch_parallel(functools.partial(_run_scan, save=True))


@batch_parallel
def _state_gradient(x, dt, A, C, begins, dy, dfinal):
    """Gradients of the states that chunks leave [b c g r n p], and of the first one."""
    (b, t, g, r, p), n = x.shape, C.shape[-1]
    blocks, sizes = _blocks(x, C), _sizes(x, C)
    segments, per_segment = _segments(x, blocks)
    heads = g * r * math.ceil(p / blocks["BLOCK_P"])
    nothing = jax.ShapeDtypeStruct((b, 0), x.dtype)

    def walk(parts, decays, outputs, **flags):
        return launching.launch(
            gradient_kernels.state_gradient_kernel,
            (
                dt,
                A,
                C,
                _or(begins, x),
                dy,
                dfinal,
                parts,
                decays,
                t,
                segments,
                per_segment,
            ),  # fmt: skip
            outputs,
            grid=(heads, b * segments),
            HAS_RESETS=begins is not None,
            **blocks,
            **sizes,
            **flags,
        )

    parts = decays = x
    if segments > 1:
        of_segments = jax.ShapeDtypeStruct((b, segments, g, r, p, n), jnp.float32)
        lefts = jax.ShapeDtypeStruct((b, segments, g, r), jnp.float32)
        parts, _, decays = walk(
            x, x, (of_segments, nothing, lefts),
            HAS_STATE=False, SEGMENTED=False, WRITE=False,
        )  # fmt: skip
    chunks = math.ceil(t / blocks["CHUNK"])
    exits = jax.ShapeDtypeStruct((b, chunks, g, r, n, p), x.dtype)
    first = jax.ShapeDtypeStruct((b, g, r, p, n), jnp.float32)
    first, exits, _ = walk(
        parts, decays, (first, exits, nothing),
        HAS_STATE=True, SEGMENTED=segments > 1, WRITE=True,
    )  # fmt: skip
    return exits, first


@batch_parallel
def _chunk_gradients(x, dt, A, B, C, D, begins, entries, exits, dy):
    """Gradients of x, dt, A, B, C and D, from the states around every chunk."""
    b, t, g, r, _ = x.shape
    chunks = entries.shape[1]
    of_chunks = jax.ShapeDtypeStruct((b, chunks, g, r), jnp.float32)
    like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
    options = {"HAS_RESETS": begins is not None, **_sizes(x, B)}
    around = _or(begins, x), entries, exits, dy, t
    dx, ddt, dA, dD = launching.launch(
        gradient_kernels.head_gradient_kernel,
        (x, dt, A, B, C, D, *around),
        (like(x), like(dt), of_chunks, of_chunks),
        grid=(chunks, g * r, b),
        **_blocks(x, B, widest=64),
        **options,
    )
    blocks = _blocks(x, B, states=64)
    dB, dC = launching.launch(
        gradient_kernels.direction_gradient_kernel,
        (x, dt, A, B, C, *around),
        (like(B), like(C)),
        grid=(chunks * math.ceil(B.shape[-1] / blocks["BLOCK_N"]), g, b),
        **blocks,
        **options,
    )
    return dx, ddt, jnp.sum(dA, 1), dB, dC, jnp.sum(dD, 1)


@jax.custom_vjp
def _step(x, dt, A, B, C, D, state, resets):
    b, _, g, r, p = x.shape
    if state is None:
        state = jnp.zeros((b, g, r, p, B.shape[-1]), jnp.float32)
    A, D = (jnp.broadcast_to(a.astype(jnp.float32), (b, g, r)) for a in (A, D))
    flags = None if resets is None else resets[:, 0].astype(jnp.int32)
    return _one_token(x, dt, A, B, C, D, state, flags)


def _step_forward(*arguments):
    return _step(*arguments), arguments


def _step_backward(saved, cotangents):
    """Nobody trains on sequences of one token: XLA differentiates the recurrence."""
    *floats, resets = saved

    def recurrence(x, dt, A, B, C, D, state):
        return xla.ssd(x, dt, A, B, C, D, initial_state=state, resets=resets)

    return *jax.vjp(recurrence, *floats)[1](cotangents), None


_step.defvjp(_step_forward, _step_backward)


@batch_parallel
def _one_token(x, dt, A, B, C, D, state, resets):
    (b, _, g, r, p), n = x.shape, B.shape[-1]
    block = min(32, _power_of_two(p))
    y, final = launching.launch(
        kernels.step_kernel,
        (x, dt, A, B, C, D, state, _or(resets, x)),
        (
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((b, g, r, p, n), jnp.float32),
        ),
        grid=(g * r * math.ceil(p / block), b),
        aliases={6: 1} if state.dtype == jnp.float32 else None,
        HAS_RESETS=resets is not None,
        BLOCK_P=block,
        BLOCK_N=_power_of_two(n),
        **_sizes(x, B),
    )
    return y, final


def _last_reset(resets: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """Where the document of each token begins; -1 before the first reset."""
    at = jnp.where(resets, jnp.arange(resets.shape[1], dtype=jnp.int32), -1)
    return jax.lax.cummax(at, axis=1)


def _or(a: jax.Array | None, anything: jax.Array) -> jax.Array:
    """`a`; where it is missing, a pointer that the kernel will not follow."""
    return anything if a is None else a
