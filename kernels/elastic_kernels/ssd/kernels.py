"""Triton kernels of the chunked scan: forward, gradients, and the step of decoding.

    T time   q token of a chunk that reads   s token of a chunk that writes
    G ssm_groups   R heads_per_group   P ssm_head_dim   N ssm_state

One program walks the chunks of one head, or of a segment of them, with the state
[N, P] in registers; B and C are read by group. `x`, `B`, `C` enter products in their
own dtype, everything is summed in float32. Decays are powers of two: A comes times
log2(e), which also makes the running sums those of exponents of two.

Rows beyond the last token have dt = 0, which leaves the state alone. `begins` is the
row of the last reset up to each token, -1 where there was none: what was written before
it is not seen.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(a, b):
    """A product in float32; float32 operands are split in three, to lose no digits."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _decays(dt, begins, start, rows, T, log2a, HAS_RESETS: tl.constexpr):
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
def _between(exponent, weight, begin, CHUNK: tl.constexpr, HAS_RESETS: tl.constexpr):
    """[q, s]: what is left at token q of what token s wrote, times 2 ** weight[s]."""
    at = tl.arange(0, CHUNK)
    seen = at[:, None] >= at[None, :]
    if HAS_RESETS:
        seen = seen & (at[None, :] >= begin[:, None])
    # Masked before the exponential: above the diagonal it could overflow.
    between = exponent[:, None] + (weight - exponent)[None, :]
    return tl.exp2(tl.where(seen, between, -float("inf")))


@triton.jit
def _until(exponent, begin, CHUNK: tl.constexpr, HAS_RESETS: tl.constexpr):
    """`_between` without a weight, turned: [s, q]."""
    at = tl.arange(0, CHUNK)
    seen = at[None, :] >= at[:, None]
    if HAS_RESETS:
        seen = seen & (at[:, None] >= begin[None, :])
    return tl.exp2(tl.where(seen, exponent[None, :] - exponent[:, None], -float("inf")))


@triton.jit
def _inside(columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Which columns exist; a constant, and so free, where blocks divide the width."""
    inside = tl.full(columns.shape, True, tl.int1)
    if WIDTH % BLOCK != 0:
        inside = columns < WIDTH
    return inside


@triton.jit
def _start(given, parts, decays, batch, head, segment, segments, tile, inside,
           H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
           HAS_STATE: tl.constexpr, SEGMENTED: tl.constexpr):  # fmt: skip
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
    of_p, of_n = _inside(ps, P, BLOCK_P), _inside(ns, N, BLOCK_N)
    tile = ps[None, :] * N + ns[:, None]
    turned = ns[:, None] * P + ps[None, :]  # the layout of entries and exits
    inside = of_n[:, None] & of_p[None, :]
    along_p = at[:, None] * (H * P) + ps[None, :]
    along_n = at[:, None] * (G * N) + ns[None, :]
    log2a = tl.load(A + batch * H + head).to(tl.float32) * LOG2E
    skip = tl.load(D + batch * H + head).to(tl.float32)

    state = _start(given, parts, decays, batch, head, segment, segments, tile, inside,
                   H, P, N, HAS_STATE, SEGMENTED)  # fmt: skip
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
        entry, leave, whole, exponent, begin = _decays(
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
            out = _dot(Cs, state.to(Cs.dtype)) * entry[:, None]
        xs = tl.load(x + to_t * P + along_p, mask=for_p, other=0.0)
        written = (xs.to(tl.float32) * (dts * leave)[:, None]).to(xs.dtype)
        state = state * whole + _dot(tl.trans(Bs), written)
        if WRITE:
            pairs = _dot(Cs, tl.trans(Bs))
            pairs *= _between(exponent, tl.log2(dts), begin, CHUNK, HAS_RESETS)
            out += _dot(pairs.to(xs.dtype), xs) + skip * xs.to(tl.float32)
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
    of_p, of_n = _inside(ps, P, BLOCK_P), _inside(ns, N, BLOCK_N)
    tile = ps[None, :] * N + ns[:, None]
    turned = ns[:, None] * P + ps[None, :]  # the layout of entries and exits
    inside = of_n[:, None] & of_p[None, :]
    along_p = at[:, None] * (H * P) + ps[None, :]
    along_n = at[:, None] * (G * N) + ns[None, :]
    log2a = tl.load(A + batch * H + head).to(tl.float32) * LOG2E

    dstate = _start(dfinal, parts, decays, batch, head, segment, segments, tile, inside,
                    H, P, N, HAS_STATE, SEGMENTED)  # fmt: skip
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
        entry, _, whole, _, _ = _decays(
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
        dstate = dstate * whole + _dot(tl.trans(Cs), read)
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
    of_n = _inside(ns, N, BLOCK_N)
    for_n = valid[:, None] & of_n[None, :]
    along_n = at[:, None] * (G * N) + ns[None, :]
    to_n = ((batch * T + start) * G + head // R) * N
    to_t = (batch * T + start) * H + head
    to_c = (batch * chunks + chunk) * H + head
    a = tl.load(A + batch * H + head).to(tl.float32)
    skip = tl.load(D + batch * H + head).to(tl.float32)
    dts = tl.load(dt + to_t + at * H, mask=valid, other=0.0).to(tl.float32)
    entry, leave, whole, exponent, begin = _decays(
        dts, begins + batch * T, start, rows, T, a * LOG2E, HAS_RESETS
    )
    Bs = tl.load(B + to_n + along_n, mask=for_n, other=0.0)
    Cs = tl.load(C + to_n + along_n, mask=for_n, other=0.0)
    weights = _dot(Bs, tl.trans(Cs)) * _until(exponent, begin, CHUNK, HAS_RESETS)
    weights_ = weights.to(Bs.dtype)
    pairs = tl.zeros((CHUNK, CHUNK), tl.float32)  # [s, q], like weights
    dcs = tl.zeros((CHUNK,), tl.float32)
    left = tl.zeros((CHUNK,), tl.float32)
    end = 0.0
    for block in range(BLOCKS):
        ps = block * BLOCK_P + tl.arange(0, BLOCK_P)
        of_p = _inside(ps, P, BLOCK_P)
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

        pairs += _dot(xs, tl.trans(dys))
        dys_wide = dys.to(tl.float32)
        read = _dot(Cs, state)
        dcs += tl.sum(read * dys_wide, 1) * entry
        across = _dot(Bs, dstate) * leave[:, None]
        left += tl.sum(across * xs.to(tl.float32), 1)
        across += _dot(weights_, dys)
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
    of_n = _inside(ns, N, BLOCK_N)
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
        log2a = tl.load(A + batch * H + head).to(tl.float32) * LOG2E
        to_t = (batch * T + start) * H + head
        to_c = (batch * chunks + chunk) * H + head
        dts = tl.load(dt + to_t + at * H, mask=valid, other=0.0).to(tl.float32)
        entry, leave, _, exponent, begin = _decays(
            dts, begins + batch * T, start, rows, T, log2a, HAS_RESETS
        )
        pairs = tl.zeros((CHUNK, CHUNK), tl.float32)
        for block in range(BLOCKS):
            ps = block * BLOCK_P + tl.arange(0, BLOCK_P)
            of_p = _inside(ps, P, BLOCK_P)
            for_p = valid[:, None] & of_p[None, :]
            along_p = at[:, None] * (H * P) + ps[None, :]
            xs = tl.load(x + to_t * P + along_p, mask=for_p, other=0.0)
            dys = tl.load(dy + to_t * P + along_p, mask=for_p, other=0.0)
            inside = of_n[:, None] & of_p[None, :]
            tile = to_c * P * N + ns[:, None] * P + ps[None, :]
            state = tl.load(entries + tile, mask=inside, other=0.0)
            dstate = tl.load(exits + tile, mask=inside, other=0.0)
            pairs += _dot(dys, tl.trans(xs))
            written = (xs.to(tl.float32) * (dts * leave)[:, None]).to(Bs.dtype)
            dBs += _dot(written, tl.trans(dstate))
            read = (dys.to(tl.float32) * entry[:, None]).to(Cs.dtype)
            dCs += _dot(read, tl.trans(state))
        weight = tl.log2(dts)
        shared += pairs * _between(exponent, weight, begin, CHUNK, HAS_RESETS)

    shared_ = shared.to(Bs.dtype)
    dCs += _dot(shared_, Bs)
    dBs += _dot(tl.trans(shared_), Cs)
    tl.store(dB + to_n + along_n, dBs.to(Bs.dtype), mask=for_n)
    tl.store(dC + to_n + along_n, dCs.to(Cs.dtype), mask=for_n)


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
    decay = tl.exp2(dts * tl.load(A + batch * H + head).to(tl.float32) * LOG2E)
    if HAS_RESETS:
        decay = tl.where(tl.load(resets + batch) > 0, 0.0, decay)
    skip = tl.load(D + batch * H + head).to(tl.float32)

    new = old * decay + (dts * xs)[:, None] * Bs[None, :]
    tl.store(final + tile, new, mask=inside)
    out = tl.sum(new * Cs[None, :], 1) + skip * xs
    tl.store(y + channel, out, mask=ps < P)
