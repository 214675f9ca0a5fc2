"""Triton kernels of the gated norm: one group of one token at a time, and its gradient.

    T time   G groups   W channels of a group, heads x head_dim

The gradient walks TOKENS tokens in a program, so that what is learnt from all of them,
scale and mask, is summed in registers.
"""

import triton
import triton.language as tl


@triton.jit
def _gated(y, z, mask, at, inside, mask_at, MASK: tl.constexpr):
    """y, silu(z), its slope, and the mask, of one group of one token."""
    ys = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    zs = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-zs))
    factors = tl.full(at.shape, 1.0, tl.float32)
    if MASK:
        factors = tl.load(mask + mask_at, mask=inside, other=0.0).to(tl.float32)
    return ys, zs * sigmoid, sigmoid * (1 + zs * (1 - sigmoid)), factors


@triton.jit
def forward_kernel(
    y, z, scale, mask, live, active, T,
    out,
    G: tl.constexpr, W: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr,
    MASK: tl.constexpr, COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = gated, masked, normalised and scaled.

    Args:
      MASK: 0 none, 1 one for all tokens, 2 one per token.
      COUNTS: as MASK, of `live`.
    """
    row = tl.program_id(0).to(tl.int64)  # of all batches
    group, batch = tl.program_id(1), row // T
    ws = tl.arange(0, BLOCK)
    inside = ws < tl.minimum(tl.load(active + batch) * P, W)
    at = (row * G + group) * W + ws
    mask_at = (row if MASK == 2 else batch) * W + ws
    ys, gates, _, factors = _gated(y, z, mask, at, inside, mask_at, MASK)
    u = ys * gates * factors
    count = tl.load(live + (row if COUNTS == 2 else batch))
    root = tl.rsqrt(tl.sum(u * u, 0) / count + EPS)
    scales = tl.load(scale + (batch * G + group) * W + ws, mask=inside, other=0.0)
    result = u * root * scales.to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=ws < W)


@triton.jit
def gradient_kernel(
    y, z, scale, mask, live, active, dout, T, parts,
    dy, dz, dscale, dmask, dlive,
    G: tl.constexpr, W: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr,
    MASK: tl.constexpr, COUNTS: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Gradients of y and z; those of scale [batch, part, G, W], of the mask, likewise
    or [row, G, W], and of live [row, G], for the caller to sum."""
    batch = (tl.program_id(0) // parts).to(tl.int64)
    part, group = tl.program_id(0) % parts, tl.program_id(1)
    ws = tl.arange(0, BLOCK)
    inside = ws < tl.minimum(tl.load(active + batch) * P, W)
    scales = tl.load(scale + (batch * G + group) * W + ws, mask=inside, other=0.0)
    scales = scales.to(tl.float32)
    dscales = tl.zeros((BLOCK,), tl.float32)
    dmasks = tl.zeros((BLOCK,), tl.float32)
    for t in range(part * TOKENS, tl.minimum(part * TOKENS + TOKENS, T)):
        row = batch * T + t
        at = (row * G + group) * W + ws
        mask_at = (row if MASK == 2 else batch) * W + ws
        ys, gates, slopes, factors = _gated(y, z, mask, at, inside, mask_at, MASK)
        open = ys * gates
        u = open * factors
        count = tl.load(live + (row if COUNTS == 2 else batch))
        squares = tl.sum(u * u, 0)
        root = tl.rsqrt(squares / count + EPS)
        douts = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        scaled = douts * scales
        along = tl.sum(scaled * u, 0) * root * root * root / count
        du = root * scaled - along * u
        dscales += douts * u * root
        tl.store(dlive + row * G + group, 0.5 * along * squares / count)
        back = du * factors * gates
        tl.store(dy + at, back.to(dy.dtype.element_ty), mask=ws < W)
        back = du * factors * ys * slopes
        tl.store(dz + at, back.to(dz.dtype.element_ty), mask=ws < W)
        if MASK == 2:
            tl.store(dmask + at, du * open, mask=ws < W)
        if MASK == 1:
            dmasks += du * open
    to = ((batch * parts + part) * G + group) * W + ws
    tl.store(dscale + to, dscales, mask=ws < W)
    if MASK == 1:
        tl.store(dmask + to, dmasks, mask=ws < W)
