"""Triton kernels of grouped products: rows by the matrix of their expert, and back.

    tile    up to BLOCK_M rows of one expert, next to each other once sorted
    place   where a row stands when rows are sorted by expert
    row     token * C + choice;  C choices a token
    live    how many leading channels count, read from memory when the kernel runs

Loops end at the last live channel, so one executable serves every width and costs what
that width costs; beyond it, results are exact zeros, and nothing is read. Matrices
stay whole: their full widths are strides.

Quantized matrices are decoded in registers, by integer arithmetic: every GPU since
Ampere can, whether it has units for such numbers or not.
"""

import triton
import triton.language as tl

PLAIN, FP8, NVFP4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
GROUP = tl.constexpr(8)  # tiles that share the columns they read, while in cache


@triton.jit
def _dot(a, b, total):
    """A product in float32; float32 operands are split in three, to lose no digits."""
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def _mine(
    tiles, order, slots, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What this program computes: a tile, its expert (-1 is none), places and rows,
    which of them exist, and the first of its columns."""
    COLUMNS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // (GROUP * COLUMNS)
    within = tl.program_id(0) % (GROUP * COLUMNS)
    size = tl.minimum(slots - group * GROUP, GROUP)
    tile = group * GROUP + within % size
    expert = tl.load(tiles + tile * 3)
    places = tl.load(tiles + tile * 3 + 1) + tl.arange(0, BLOCK_M)
    inside = places < tl.load(tiles + tile * 3 + 2)
    rows = tl.load(order + places, mask=inside, other=0)
    first = within // size * BLOCK_N
    return tile, expert, places.to(tl.int64), rows.to(tl.int64), inside, first


@triton.jit
def _e4m3(code):
    """The float32 that an E4M3 code, an int32, stands for."""
    half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _e2m1(code):
    """The float32 that an E2M1 code, an int32 below 16, stands for."""
    half = ((code & 8) << 12) | ((code & 7) << 9)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def _weights(
    w, blocks, scale, expert, rows, columns, mask, dtype: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Entries of one expert's matrix [ROWS, COLUMNS], packed along its rows."""
    matrix = expert.to(tl.int64) * (ROWS * COLUMNS)
    if FORMAT == PLAIN:
        at = rows * COLUMNS + columns
        return tl.load(w + matrix + at, mask=mask, other=0.0).to(dtype)
    if FORMAT == FP8:
        at = rows * COLUMNS + columns
        code = tl.load(w + matrix + at, mask=mask, other=0).to(tl.int32)
        return (_e4m3(code) * tl.load(scale + expert)).to(dtype)
    at = rows // 2 * COLUMNS + columns
    pair = tl.load(w + matrix // 2 + at, mask=mask, other=0).to(tl.int32)
    at = rows // 16 * COLUMNS + columns
    code = tl.load(blocks + matrix // 16 + at, mask=mask, other=0).to(tl.int32)
    scales = _e4m3(code) * tl.load(scale + expert)
    return (_e2m1((pair >> rows % 2 * 4) & 15) * scales).to(dtype)


@triton.jit
def _step(
    total, x_rows, inside, w, blocks, scale, expert, ks, known, columns, exist,
    WIDTH_IN: tl.constexpr, WIDTH_OUT: tl.constexpr, TURNED: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Adds to a product what the channels `ks` contribute, where they are `known`."""
    part = tl.load(
        x_rows + ks[None, :], mask=inside[:, None] & known[None, :], other=0.0
    )
    kept = known[:, None] & exist[None, :]
    if TURNED:
        matrix = _weights(w, blocks, scale, expert, columns[None, :], ks[:, None], kept,
                          part.dtype, WIDTH_OUT, WIDTH_IN, FORMAT)  # fmt: skip
    else:
        matrix = _weights(w, blocks, scale, expert, ks[:, None], columns[None, :], kept,
                          part.dtype, WIDTH_IN, WIDTH_OUT, FORMAT)  # fmt: skip
    return _dot(part, matrix, total)


@triton.jit
def _product(
    x, sources, inside, w, blocks, scale, expert, columns, live_in, live_out,
    WIDTH_IN: tl.constexpr, WIDTH_OUT: tl.constexpr, TURNED: tl.constexpr,
    FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows `sources` of x, as far as they are live, by an expert's matrix; zeros in
    columns that are not live.

    The matrix is [WIDTH_IN, WIDTH_OUT], or, TURNED, stored the other way round. No
    channel is checked but in the last, partial block: a width that is read at run time
    may end anywhere, and checking it would make every load as narrow as one number.
    """
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_rows = x + sources[:, None] * WIDTH_IN
    exist = _inside(columns, WIDTH_OUT, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    whole = live_in // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        all = tl.full((BLOCK_K,), True, tl.int1)
        total = _step(total, x_rows, inside, w, blocks, scale, expert, start + ks, all,
                      columns, exist, WIDTH_IN, WIDTH_OUT, TURNED, FORMAT)  # fmt: skip
    if whole < live_in:
        ks += whole
        known = ks < live_in
        total = _step(total, x_rows, inside, w, blocks, scale, expert, ks, known,
                      columns, exist, WIDTH_IN, WIDTH_OUT, TURNED, FORMAT)  # fmt: skip
    return tl.where((columns < live_out)[None, :], total, 0.0)


@triton.jit
def _inside(columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Which columns exist; a constant, and so free, where blocks divide the width."""
    inside = tl.full(columns.shape, True, tl.int1)
    if WIDTH % BLOCK != 0:
        inside = columns < WIDTH
    return inside


@triton.jit
def _factors(
    mask, rows, columns, known, F: tl.constexpr, C: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """The hidden mask of a tile: 1 dimension for all tokens, 2 with one per token."""
    if MASK == 1:
        factors = tl.load(mask + columns, mask=columns < F, other=0.0).to(tl.float32)
        return tl.broadcast_to(factors[None, :], known.shape)
    at = (rows // C)[:, None] * F + columns[None, :]
    return tl.load(mask + at, mask=known, other=0.0).to(tl.float32)


@triton.jit
def up_kernel(
    x, w, blocks, scale, mask, order, tiles, live, slots,
    hidden, kept,
    D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, MASK: tl.constexpr,
    KEEP: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden [place, f] = relu(x[token] @ w) ** 2 * mask; `kept` is not squared yet."""
    _, expert, places, rows, inside, first = _mine(
        tiles, order, slots, F, BLOCK_M, BLOCK_N
    )
    live_f, live_d = tl.load(live), tl.load(live + 1)
    if (expert >= 0) & (first < live_f):
        columns = first + tl.arange(0, BLOCK_N)
        total = _product(x, rows // C, inside, w, blocks, scale, expert, columns,
                       live_d, live_f, D, F, False, FORMAT,
                       BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        known = inside[:, None] & (columns < live_f)[None, :]
        at = places[:, None] * F + columns[None, :]
        active = tl.maximum(total, 0.0).to(x.dtype.element_ty)
        if KEEP:
            tl.store(kept + at, active, mask=known)
        square = active.to(tl.float32) * active.to(tl.float32)
        if MASK:
            square *= _factors(mask, rows, columns, known, F, C, MASK)
        tl.store(hidden + at, square.to(x.dtype.element_ty), mask=known)


@triton.jit
def rows_kernel(
    x, w, blocks, scale, gates, order, tiles, live_in, live_out, slots,
    out,
    WIDTH_IN: tl.constexpr, WIDTH_OUT: tl.constexpr, C: tl.constexpr,
    GATHERED: tl.constexpr, GATED: tl.constexpr, TURNED: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [row, WIDTH_OUT] = x @ w, times the row's gate where GATED.

    Row by row, for the caller to total over choices: adding to tokens here would need
    atomics, and give other bits every time.

    Args:
      GATHERED: x is by token, else by place.
    """
    _, expert, places, rows, inside, first = _mine(
        tiles, order, slots, WIDTH_OUT, BLOCK_M, BLOCK_N
    )
    if expert >= 0:
        columns = first + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        live = tl.load(live_out)
        if first < live:
            sources = rows // C if GATHERED else places
            total = _product(x, sources, inside, w, blocks, scale, expert, columns,
                           tl.load(live_in), live, WIDTH_IN, WIDTH_OUT, TURNED, FORMAT,
                           BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        if GATED:
            gate = tl.load(gates + rows, mask=inside, other=0.0).to(tl.float32)
            total *= gate[:, None]
        known = inside[:, None] & (columns < WIDTH_OUT)[None, :]
        at = rows[:, None] * WIDTH_OUT + columns[None, :]
        tl.store(out + at, total.to(x.dtype.element_ty), mask=known)


@triton.jit
def hidden_gradient_kernel(
    dy, w, blocks, scale, kept, gates, mask, order, tiles, live, slots,
    dactive, gated, dgates, dmask,
    D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, MASK: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From dy back to what the up product gave.

    Writes `dactive` and `gated`, the gated hidden rows, by place; to `dgates` [row,
    block of columns] the part of each block; and to `dmask`, which starts as zeros,
    [tile, f] or [row, f].
    """
    COLUMNS: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    tile, expert, places, rows, inside, first = _mine(
        tiles, order, slots, F, BLOCK_M, BLOCK_N
    )
    live_f, live_d = tl.load(live), tl.load(live + 1)
    to_gate = dgates + rows * COLUMNS + first // BLOCK_N
    if expert >= 0:
        tl.store(to_gate, tl.zeros((BLOCK_M,), tl.float32), mask=inside)
    if (expert >= 0) & (first < live_f):
        columns = first + tl.arange(0, BLOCK_N)
        dhidden = _product(dy, rows // C, inside, w, blocks, scale, expert, columns,
                           live_d, live_f, D, F, True, FORMAT,
                           BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        known = inside[:, None] & (columns < live_f)[None, :]
        at = places[:, None] * F + columns[None, :]
        active = tl.load(kept + at, mask=known, other=0.0).to(tl.float32)
        gate = tl.load(gates + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
        hidden = active * active
        slope = 2 * active
        if MASK:
            learnt = gate * dhidden * hidden
            factors = _factors(mask, rows, columns, known, F, C, MASK)
            hidden *= factors
            slope *= factors
            if MASK == 1:
                to_mask = dmask + tile.to(tl.int64) * F + columns
                tl.store(to_mask, tl.sum(learnt, 0), mask=columns < live_f)
            else:
                to_mask = dmask + rows[:, None] * F + columns[None, :]
                tl.store(to_mask, learnt, mask=known)
        back = (gate * slope * dhidden).to(dy.dtype.element_ty)
        tl.store(dactive + at, back, mask=known)
        tl.store(gated + at, (gate * hidden).to(dy.dtype.element_ty), mask=known)
        tl.store(to_gate, tl.sum(dhidden * hidden, 1), mask=inside)


@triton.jit
def weight_gradient_kernel(
    a, b, order, ends, live_a, live_b,
    out,
    WIDTH_A: tl.constexpr, WIDTH_B: tl.constexpr, C: tl.constexpr,
    GATHERED_A: tl.constexpr, GATHERED_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [expert, WIDTH_A, WIDTH_B] = a^T b over the rows of each expert.

    Args:
      ends: the place behind the last row of each expert, a zero before them.
      GATHERED_A, GATHERED_B: the operand is by token, else by place.
    """
    COLUMNS: tl.constexpr = (WIDTH_B + BLOCK_N - 1) // BLOCK_N
    expert = tl.program_id(1)
    first_a = tl.program_id(0) // COLUMNS * BLOCK_M
    first_b = tl.program_id(0) % COLUMNS * BLOCK_N
    of_a, of_b = first_a + tl.arange(0, BLOCK_M), first_b + tl.arange(0, BLOCK_N)
    exist_a, exist_b = _inside(of_a, WIDTH_A, BLOCK_M), _inside(of_b, WIDTH_B, BLOCK_N)
    end_a, end_b = tl.load(live_a), tl.load(live_b)
    first, last = tl.load(ends + expert), tl.load(ends + expert + 1)
    dead = (end_a <= first_a) | (end_b <= first_b)
    last = tl.where(dead, first, last)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        places = start + tl.arange(0, BLOCK_K)
        inside = places < last
        tokens = tl.load(order + places, mask=inside, other=0) // C
        from_a = (tokens if GATHERED_A else places).to(tl.int64)[:, None] * WIDTH_A
        from_b = (tokens if GATHERED_B else places).to(tl.int64)[:, None] * WIDTH_B
        known = inside[:, None] & exist_a[None, :]
        part_a = tl.load(a + from_a + of_a[None, :], mask=known, other=0.0)
        known = inside[:, None] & exist_b[None, :]
        part_b = tl.load(b + from_b + of_b[None, :], mask=known, other=0.0)
        total = _dot(tl.trans(part_a), part_b, total)

    # Behind the last live channel operands may hold anything; it stays in its column.
    total = tl.where((of_a < end_a)[:, None] & (of_b < end_b)[None, :], total, 0.0)
    exists = exist_a[:, None] & exist_b[None, :]
    at = of_a[:, None] * WIDTH_B + of_b[None, :]
    out += expert.to(tl.int64) * (WIDTH_A * WIDTH_B)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=exists)
