"""What the kernels of the chunked scan share: decays, masks, products, the first state.

    q token of a chunk that reads   s token of a chunk that writes

Decays are powers of two: A comes times log2(e), which also makes the running sums those
of exponents of two. Rows beyond the last token have dt = 0, which leaves the state
alone. `begins` is the row of the last reset up to each token, -1 where there was none:
what was written before it is not seen.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b):
    """A product in float32; float32 operands are split in three, to lose no digits."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def decays(dt, begins, start, rows, T, log2a, HAS_RESETS: tl.constexpr):
    """What is left of the entry state at each token, of each token at the chunk's end,
    and of the entry state there; the exponents; the first row each token sees."""
    exponent = tl.cumsum(dt * log2a, 0)
    last = tl.sum(dt * log2a, 0)
    entry = tl.exp2(exponent)
    leave = tl.exp2(last - exponent)
    whole = tl.exp2(last)
    begin = rows * 0
    if HAS_RESETS:
        begin = tl.load(begins + tl.minimum(rows, T - 1))
        final = tl.load(begins + tl.minimum(start + rows.shape[0], T) - 1)
        entry = tl.where(begin < start, entry, 0.0)
        leave = tl.where(rows >= final, leave, 0.0)
        whole = tl.where(final < start, whole, 0.0)
        begin -= start
    return entry, leave, whole, exponent, begin


@triton.jit
def between(exponent, weight, begin, CHUNK: tl.constexpr, HAS_RESETS: tl.constexpr):
    """[q, s]: what is left at token q of what token s wrote, times 2 ** weight[s]."""
    at = tl.arange(0, CHUNK)
    seen = at[:, None] >= at[None, :]
    if HAS_RESETS:
        seen = seen & (at[None, :] >= begin[:, None])
    # Masked before the exponential: above the diagonal it could overflow.
    between = exponent[:, None] + (weight - exponent)[None, :]
    return tl.exp2(tl.where(seen, between, -float("inf")))


@triton.jit
def until(exponent, begin, CHUNK: tl.constexpr, HAS_RESETS: tl.constexpr):
    """`between` without a weight, turned: [s, q]."""
    at = tl.arange(0, CHUNK)
    seen = at[None, :] >= at[:, None]
    if HAS_RESETS:
        seen = seen & (at[:, None] >= begin[None, :])
    return tl.exp2(tl.where(seen, exponent[None, :] - exponent[:, None], -float("inf")))


@triton.jit
def inside(columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Which columns exist; a constant, and so free, where blocks divide the width."""
    inside = tl.full(columns.shape, True, tl.int1)
    if WIDTH % BLOCK != 0:
        inside = columns < WIDTH
    return inside


@triton.jit
def start_state(
    given, parts, decays, batch, head, segment, segments, tile, inside,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    HAS_STATE: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """The state [N, P] before a segment, out of what earlier ones wrote."""
    state = tl.zeros(tile.shape, tl.float32)
    if HAS_STATE:
        at = (batch * H + head) * P * N
        state = tl.load(given + at + tile, mask=inside, other=0.0).to(tl.float32)
    if SEGMENTED:
        for earlier in range(segment):
            at = (batch * segments + earlier) * H + head
            part = tl.load(parts + at * P * N + tile, mask=inside, other=0.0)
            state = state * tl.load(decays + at) + part
    return state
