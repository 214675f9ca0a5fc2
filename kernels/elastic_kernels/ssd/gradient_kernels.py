"""Triton kernels of the gradients of the chunked scan.

    T time   q token of a chunk that reads   s token of a chunk that writes
    G ssm_groups   R heads_per_group   P ssm_head_dim   N ssm_state

The gradient of the state walks backward as the state walked forward. With the states
around every chunk in memory, chunks are then independent of each other: heads for what
each head has to itself, groups for what heads share.
"""

import triton
import triton.language as tl

from elastic_kernels.ssd import tiles


@triton.jit
def state_gradient_kernel(
    dt, A, C, begins, dy, dfinal, parts, decays, T, segments, per_segment,
    dgiven, exits, left,
    G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_RESETS: tl.constexpr, SEGMENTED: tl.constexpr,
    WRITE: tl.constexpr,
):  # fmt: skip
    """Walks chunks backward with the gradient of the state; mirrors `scan_kernel`.

    Segments and chunks are numbered from the end here.

    Args:
      dfinal: the gradient of the last state, where HAS_STATE.
      WRITE: write the gradient of the state that each chunk leaves to `exits`, and the
        last segment that of the first state to `dgiven`; else each segment, starting
        from nothing, its gradient to `dgiven` and its whole decay to `left`.
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

    dstate = tiles.start_state(
        dfinal, parts, decays, batch, head, segment, segments, tile, inside,
        H, P, N, HAS_STATE, SEGMENTED,
    )  # fmt: skip
    decay = 1.0
    chunks = tl.cdiv(T, CHUNK)
    first = segment * per_segment
    for back in range(first, tl.minimum(first + per_segment, chunks)):
        chunk = chunks - 1 - back
        start = chunk * CHUNK
        rows = start + at
        valid = rows < T
        to_n = ((batch * T + start) * G + group) * N
        to_t = (batch * T + start) * H + head
        dts = tl.load(dt + to_t + at * H, mask=valid, other=0.0).to(tl.float32)
        entry, _, whole, _, _ = tiles.decays(
            dts, begins + batch * T, start, rows, T, log2a, HAS_RESETS
        )
        for_p = valid[:, None] & of_p[None, :]
        for_n = valid[:, None] & of_n[None, :]
        dys = tl.load(dy + to_t * P + along_p, mask=for_p, other=0.0)
        Cs = tl.load(C + to_n + along_n, mask=for_n, other=0.0)
        if WRITE:
            to = ((batch * chunks + chunk) * H + head) * P * N
            narrow = dstate.to(exits.dtype.element_ty)
            tl.store(exits + to + turned, narrow, mask=inside)
        read = (dys.to(tl.float32) * entry[:, None]).to(Cs.dtype)
        dstate = dstate * whole + tiles.dot(tl.trans(Cs), read)
        decay *= whole

    if WRITE:
        if segment == segments - 1:
            tl.store(dgiven + (batch * H + head) * P * N + tile, dstate, mask=inside)
    else:
        to = (batch * segments + segment) * H + head
        tl.store(dgiven + to * P * N + tile, dstate, mask=inside)
        tl.store(left + to, decay)


@triton.jit
def head_gradient_kernel(
    x, dt, A, B, C, D, begins, entries, exits, dy, T,
    dx, ddt, dA, dD,
    G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_RESETS: tl.constexpr,
):  # fmt: skip
    """The gradients of x, dt, A and D in one chunk of one head.

    Every term of y_i holds exp(cs_i), whatever token j writes holds exp(-cs_j), with
    cs the running sum of dt A. The gradient of cs is therefore the sum of the terms
    read at a token less that of those it wrote; the last cs is also a factor of all
    that leaves the chunk.
    """
    H: tl.constexpr = G * R
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)

    start = chunk * CHUNK
    at = tl.arange(0, CHUNK)
    ns = tl.arange(0, BLOCK_N)
    rows = start + at
    valid = rows < T
    of_n = tiles.inside(ns, N, BLOCK_N)
    for_n = valid[:, None] & of_n[None, :]
    along_n = at[:, None] * (G * N) + ns[None, :]
    to_n = ((batch * T + start) * G + head // R) * N
    to_t = (batch * T + start) * H + head
    to_c = (batch * chunks + chunk) * H + head
    a = tl.load(A + batch * H + head).to(tl.float32)
    skip = tl.load(D + batch * H + head).to(tl.float32)
    dts = tl.load(dt + to_t + at * H, mask=valid, other=0.0).to(tl.float32)
    entry, leave, whole, exponent, begin = tiles.decays(
        dts, begins + batch * T, start, rows, T, a * tiles.LOG2E, HAS_RESETS
    )
    Bs = tl.load(B + to_n + along_n, mask=for_n, other=0.0)
    Cs = tl.load(C + to_n + along_n, mask=for_n, other=0.0)
    weights = tiles.dot(Bs, tl.trans(Cs)) * tiles.until(
        exponent, begin, CHUNK, HAS_RESETS
    )
    weights_ = weights.to(Bs.dtype)
    pairs = tl.zeros((CHUNK, CHUNK), tl.float32)  # [s, q], like weights
    dcs = tl.zeros((CHUNK,), tl.float32)
    left = tl.zeros((CHUNK,), tl.float32)
    end = 0.0
    for block in range(BLOCKS):
        ps = block * BLOCK_P + tl.arange(0, BLOCK_P)
        of_p = tiles.inside(ps, P, BLOCK_P)
        for_p = valid[:, None] & of_p[None, :]
        along_p = at[:, None] * (H * P) + ps[None, :]
        xs = tl.load(x + to_t * P + along_p, mask=for_p, other=0.0)
        dys = tl.load(dy + to_t * P + along_p, mask=for_p, other=0.0)
        inside = of_n[:, None] & of_p[None, :]
        tile = to_c * P * N + ns[:, None] * P + ps[None, :]
        state = tl.load(entries + tile, mask=inside, other=0.0)
        dstate = tl.load(exits + tile, mask=inside, other=0.0)
        kept = state.to(tl.float32) * dstate.to(tl.float32)
        end += whole * tl.sum(tl.sum(kept, 1), 0)

        pairs += tiles.dot(xs, tl.trans(dys))
        dys_wide = dys.to(tl.float32)
        read = tiles.dot(Cs, state)
        dcs += tl.sum(read * dys_wide, 1) * entry
        across = tiles.dot(Bs, dstate) * leave[:, None]
        left += tl.sum(across * xs.to(tl.float32), 1)
        across += tiles.dot(weights_, dys)
        dxs = (dts[:, None] * across + skip * dys_wide).to(xs.dtype)
        tl.store(dx + to_t * P + along_p, dxs, mask=for_p)

    dskip = tl.sum(tl.sum(tl.where(at[:, None] == at[None, :], pairs, 0.0), 1), 0)
    pairs *= weights
    ddts = left + tl.sum(pairs, 1)
    end += tl.sum(dts * left, 0)
    dcs += tl.sum(pairs * dts[:, None], 0) - dts * ddts
    da = tl.cumsum(dcs, 0, reverse=True) + end
    tl.store(ddt + to_t + at * H, ddts + a * da, mask=valid)
    tl.store(dA + to_c, tl.sum(dts * da, 0))
    tl.store(dD + to_c, dskip)


@triton.jit
def direction_gradient_kernel(
    x, dt, A, B, C, begins, entries, exits, dy, T,
    dB, dC,
    G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_RESETS: tl.constexpr,
):  # fmt: skip
    """The gradients of B and C in one chunk of one group, for BLOCK_N state channels:
    head by head, so that they are summed in registers."""
    H: tl.constexpr = G * R
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    PARTS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    chunk = tl.program_id(0) // PARTS
    chunks = tl.num_programs(0) // PARTS
    group = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)

    start = chunk * CHUNK
    at = tl.arange(0, CHUNK)
    ns = tl.program_id(0) % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = start + at
    valid = rows < T
    of_n = tiles.inside(ns, N, BLOCK_N)
    for_n = valid[:, None] & of_n[None, :]
    along_n = at[:, None] * (G * N) + ns[None, :]
    to_n = ((batch * T + start) * G + group) * N
    Bs = tl.load(B + to_n + along_n, mask=for_n, other=0.0)
    Cs = tl.load(C + to_n + along_n, mask=for_n, other=0.0)
    dBs = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    dCs = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    # The chunk's B C^T is the only thing that heads share, so its gradient is summed
    # first and multiplied once.
    shared = tl.zeros((CHUNK, CHUNK), tl.float32)

    for head in range(group * R, (group + 1) * R):
        log2a = tl.load(A + batch * H + head).to(tl.float32) * tiles.LOG2E
        to_t = (batch * T + start) * H + head
        to_c = (batch * chunks + chunk) * H + head
        dts = tl.load(dt + to_t + at * H, mask=valid, other=0.0).to(tl.float32)
        entry, leave, _, exponent, begin = tiles.decays(
            dts, begins + batch * T, start, rows, T, log2a, HAS_RESETS
        )
        pairs = tl.zeros((CHUNK, CHUNK), tl.float32)
        for block in range(BLOCKS):
            ps = block * BLOCK_P + tl.arange(0, BLOCK_P)
            of_p = tiles.inside(ps, P, BLOCK_P)
            for_p = valid[:, None] & of_p[None, :]
            along_p = at[:, None] * (H * P) + ps[None, :]
            xs = tl.load(x + to_t * P + along_p, mask=for_p, other=0.0)
            dys = tl.load(dy + to_t * P + along_p, mask=for_p, other=0.0)
            inside = of_n[:, None] & of_p[None, :]
            tile = to_c * P * N + ns[:, None] * P + ps[None, :]
            state = tl.load(entries + tile, mask=inside, other=0.0)
            dstate = tl.load(exits + tile, mask=inside, other=0.0)
            pairs += tiles.dot(dys, tl.trans(xs))
            written = (xs.to(tl.float32) * (dts * leave)[:, None]).to(Bs.dtype)
            dBs += tiles.dot(written, tl.trans(dstate))
            read = (dys.to(tl.float32) * entry[:, None]).to(Cs.dtype)
            dCs += tiles.dot(read, tl.trans(state))
        weight = tl.log2(dts)
        shared += pairs * tiles.between(exponent, weight, begin, CHUNK, HAS_RESETS)

    shared_ = shared.to(Bs.dtype)
    dCs += tiles.dot(shared_, Bs)
    dBs += tiles.dot(tl.trans(shared_), Cs)
    tl.store(dB + to_n + along_n, dBs.to(Bs.dtype), mask=for_n)
    tl.store(dC + to_n + along_n, dCs.to(Cs.dtype), mask=for_n)
