"""Triton kernels of the chunked scan, forward, and the step of decoding.

    T time   G ssm_groups   R heads_per_group   P ssm_head_dim   N ssm_state

One program walks the chunks of one head, or of a segment of them, with the state
[N, P] in registers; B and C are read by group. `x`, `B`, `C` enter products in their
own dtype, everything is summed in float32.
"""

import triton
import triton.language as tl

from elastic_kernels.ssd import tiles


@triton.jit
def scan_kernel(
    x, dt, A, B, C, D, given, begins, parts, decays, T, segments, per_segment,
    y, final, entries, left,
    G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_RESETS: tl.constexpr, SEGMENTED: tl.constexpr,
    WRITE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Walks chunks forward.

    Args:
      given: the state before the first token, where HAS_STATE.
      parts, decays: where SEGMENTED, what `left` and `final` were of each segment.
      segments, per_segment: how many walks share a head; chunks of each.
      WRITE: write y, and the last segment its state to `final`; else each segment,
        starting from nothing, its state to `final` and its whole decay to `left`.
      SAVE: write the state at each chunk's entry to `entries`.
    """
    H: tl.constexpr = G * R
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    head = tl.program_id(0) // BLOCKS
    group = head // R
    batch = (tl.program_id(1) // segments).to(tl.int64)
    segment = tl.program_id(1) % segments

    at = tl.arange(0, CHUNK)
    ps = tl.program_id(0) % BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    ns = tl.arange(0, BLOCK_N)
    of_p, of_n = tiles.inside(ps, P, BLOCK_P), tiles.inside(ns, N, BLOCK_N)
    tile = ps[None, :] * N + ns[:, None]
    turned = ns[:, None] * P + ps[None, :]  # the layout of entries and exits
    inside = of_n[:, None] & of_p[None, :]
    along_p = at[:, None] * (H * P) + ps[None, :]
    along_n = at[:, None] * (G * N) + ns[None, :]
    log2a = tl.load(A + batch * H + head).to(tl.float32) * tiles.LOG2E
    skip = tl.load(D + batch * H + head).to(tl.float32)

    state = tiles.start_state(
        given, parts, decays, batch, head, segment, segments, tile, inside,
        H, P, N, HAS_STATE, SEGMENTED,
    )  # fmt: skip
    decay = 1.0
    chunks = tl.cdiv(T, CHUNK)
    first = segment * per_segment
    for chunk in range(first, tl.minimum(first + per_segment, chunks)):
        start = chunk * CHUNK
        rows = start + at
        valid = rows < T
        to_n = ((batch * T + start) * G + group) * N
        to_t = (batch * T + start) * H + head
        dts = tl.load(dt + to_t + at * H, mask=valid, other=0.0).to(tl.float32)
        entry, leave, whole, exponent, begin = tiles.decays(
            dts, begins + batch * T, start, rows, T, log2a, HAS_RESETS
        )
        for_p = valid[:, None] & of_p[None, :]
        for_n = valid[:, None] & of_n[None, :]
        Bs = tl.load(B + to_n + along_n, mask=for_n, other=0.0)
        if SAVE:
            to = ((batch * chunks + chunk) * H + head) * P * N
            narrow = state.to(entries.dtype.element_ty)
            tl.store(entries + to + turned, narrow, mask=inside)
        if WRITE:
            Cs = tl.load(C + to_n + along_n, mask=for_n, other=0.0)
            out = tiles.dot(Cs, state.to(Cs.dtype)) * entry[:, None]
        xs = tl.load(x + to_t * P + along_p, mask=for_p, other=0.0)
        written = (xs.to(tl.float32) * (dts * leave)[:, None]).to(xs.dtype)
        state = state * whole + tiles.dot(tl.trans(Bs), written)
        if WRITE:
            pairs = tiles.dot(Cs, tl.trans(Bs))
            pairs *= tiles.between(exponent, tl.log2(dts), begin, CHUNK, HAS_RESETS)
            out += tiles.dot(pairs.to(xs.dtype), xs) + skip * xs.to(tl.float32)
            tl.store(y + to_t * P + along_p, out.to(xs.dtype), mask=for_p)
        decay *= whole

    if WRITE:
        if segment == segments - 1:
            tl.store(final + (batch * H + head) * P * N + tile, state, mask=inside)
    else:
        to = (batch * segments + segment) * H + head
        tl.store(final + to * P * N + tile, state, mask=inside)
        tl.store(left + to, decay)


@triton.jit
def step_kernel(
    x, dt, A, B, C, D, state, resets,
    y, final,
    G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, HAS_RESETS: tl.constexpr,
):  # fmt: skip
    """One token: reads a state, writes the next, in place where their buffer is one."""
    H: tl.constexpr = G * R
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    head = tl.program_id(0) // BLOCKS
    batch = tl.program_id(1).to(tl.int64)
    ps = tl.program_id(0) % BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    ns = tl.arange(0, BLOCK_N)
    inside = (ps < P)[:, None] & (ns < N)[None, :]
    tile = ((batch * H + head) * P + ps[:, None]) * N + ns[None, :]
    channel = (batch * H + head) * P + ps
    along = (batch * G + head // R) * N + ns

    old = tl.load(state + tile, mask=inside, other=0.0).to(tl.float32)
    xs = tl.load(x + channel, mask=ps < P, other=0.0).to(tl.float32)
    Bs = tl.load(B + along, mask=ns < N, other=0.0).to(tl.float32)
    Cs = tl.load(C + along, mask=ns < N, other=0.0).to(tl.float32)
    dts = tl.load(dt + batch * H + head).to(tl.float32)
    decay = tl.exp2(dts * tl.load(A + batch * H + head).to(tl.float32) * tiles.LOG2E)
    if HAS_RESETS:
        decay = tl.where(tl.load(resets + batch) > 0, 0.0, decay)
    skip = tl.load(D + batch * H + head).to(tl.float32)

    new = old * decay + (dts * xs)[:, None] * Bs[None, :]
    tl.store(final + tile, new, mask=inside)
    out = tl.sum(new * Cs[None, :], 1) + skip * xs
    tl.store(y + channel, out, mask=ps < P)
