"""Grouped products as a loop over row blocks, each the business of one expert.

    m tokens   c choices (top_k)   e experts   d embed   f expert_ffn
    n rows = m c   b block of rows

Rows are sorted by expert; a loop walks down them, taking up to b rows of one expert at
a time. How many blocks that is depends on the data, so the loop has a traced bound, no
row is dropped, and an expert without rows costs nothing. `lax.ragged_dot` expands
to masked products over all experts on the backends this form is for.

Autodiff of such a loop would stack one weight-sized gradient per block, so each product
has its own VJP that adds into the weight gradients in place. The gradient of a gate is
`hidden . (down @ dy)`, both at hand there, so no output row is kept: only the
rectified `x @ up`, in sorted order.

Few rows read a whole expert for little work. XLA copies what is cut from a stack before
it multiplies; cut in strips that stay in the processor's cache, the copy costs next to
nothing, and decoding reads the weights from memory once instead of three times.

A quantized matrix is dequantized for its block of rows, and rows are rounded as its
inputs are: again in the backward pass, where that is cheaper than keeping them.

A block that an expert does not fill is closed with row number n. That row lies outside
every array, so reading it gives zeros and writing to it does nothing.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from elastic_kernels.products import FakeQuant, met
from elastic_kernels.quant_array import QuantArray

LARGEST_BLOCK = 256
FEW_ROWS = 16
STRIP_BYTES = 2**20

Keys = UInt32[Array, "keys"]


def grouped_matmul(
    x: Float[Array, "m c d"],
    w: Float[Array | QuantArray | FakeQuant, "e d f"],
    experts: Int[Array, "m c"],
) -> Float[Array, "m c f"]:
    y = _rows_matmul(x.reshape(-1, x.shape[-1]), w, experts.reshape(-1))
    return y.reshape(*experts.shape, -1)


def expert_mlp(
    x: Float[Array, "m d"],
    up: Float[Array | QuantArray | FakeQuant, "e d f"],
    down: Float[Array | QuantArray | FakeQuant, "e f d"],
    experts: Int[Array, "m c"],
    gates: Float[Array, "m c"],
    hidden_mask: Float[Array, "*m f"] | None = None,
) -> Float[Array, "m d"]:
    return _expert_mlp(x, up, down, experts, gates, hidden_mask)


def block_size(rows: int, experts: int) -> int:
    """The fewest equal blocks for an expert one standard deviation busier than most.

    With balanced routing, rows per expert scatter like counts around their mean. A
    block just above that reads each weight once and leaves little of itself empty: a
    quarter faster on a CPU core than the mean itself, which most experts exceed by a
    little and then need two blocks for. Decoding one token gives blocks of 1.
    """
    mean = max(1, rows) / experts
    busy = mean + math.sqrt(mean)
    block = math.ceil(busy / math.ceil(busy / LARGEST_BLOCK))
    return block if block <= 8 else 8 * math.ceil(block / 8)


def _sorted_keys(experts: Int[Array, " n"], count: int, block: int) -> Keys:
    """`expert n + row`, sorted: one unsigned integer sorts far faster than a pair.

    A block of keys of an expert that does not exist closes the last real block.
    """
    n = experts.size
    keys = experts.astype(jnp.uint32) * n + jnp.arange(n, dtype=jnp.uint32)
    return jnp.pad(jnp.sort(keys), (0, block), constant_values=count * n)


def _over_blocks(keys: Keys, n: int, body: Callable, carry):
    """Folds `body(start, expert, row numbers [b], carry) -> carry` over the blocks."""

    def step(state):
        start, carry = state
        taken = jax.lax.dynamic_slice_in_dim(keys, start, keys.size - n)
        expert = taken // n
        mine = expert == expert[0]
        carry = body(start, expert[0], jnp.where(mine, taken % n, n), carry)
        return start + jnp.sum(mine, dtype=start.dtype), carry

    start = jnp.zeros((), keys.dtype)
    return jax.lax.while_loop(lambda state: state[0] < n, step, (start, carry))[1]


def _take(a: Array, rows: UInt32[Array, " b"]) -> Array:
    return a.at[rows].get(mode="fill", fill_value=0)


def _add(a: Array, rows: UInt32[Array, " b"], value: Array) -> Array:
    return a.at[rows].add(value.astype(a.dtype), mode="drop")


def _mask_rows(mask: Array | None, tokens: UInt32[Array, " b"]) -> Array | float:
    if mask is None:
        return 1.0
    return _take(mask, tokens) if mask.ndim > 1 else mask


def _times(
    x: Float[Array, "b d"],
    w: Float[Array | QuantArray | FakeQuant, "e d f"],
    e: UInt32[Array, ""],
) -> Float[Array, "b f"]:
    """`x @ w[e]` in at least float32, in strips of `w[e]` where rows are few."""
    d, f = w.shape[1:]
    strip = _strip(d, f * w.dtype.itemsize)
    if len(x) > FEW_ROWS or strip == d or isinstance(w, QuantArray | FakeQuant):
        return _dot("bd,df->bf", _met(x, w, e), w[e].astype(x.dtype))

    def body(i, y):
        at = (e.astype(i.dtype), i * strip, 0)
        part = jax.lax.dynamic_slice(w, at, (1, strip, f))[0].astype(x.dtype)
        rows = jax.lax.dynamic_slice_in_dim(x, i * strip, strip, axis=1)
        return y + _dot("bd,df->bf", rows, part)

    zeros = jnp.zeros((len(x), f), _wide(x))
    return jax.lax.fori_loop(0, d // strip, body, zeros)


def _met(x: Float[Array, "b d"], w, e: UInt32[Array, ""]) -> Float[Array, "b d"]:
    """The rows as expert `e` multiplies them."""
    return met(x, w[e]) if isinstance(w, QuantArray | FakeQuant) else x


def _strip(rows: int, row_bytes: int) -> int:
    """The most rows of equal strips that stay in cache; all, if strips got thin."""
    most = max(1, STRIP_BYTES // row_bytes)
    if rows <= most:
        return rows
    strip = next(n for n in range(most, 0, -1) if rows % n == 0)
    return strip if strip >= 16 else rows


def _dot(equation: str, x: Array, y: Array) -> Array:
    """Einsum that accumulates in at least float32, and returns that."""
    return jnp.einsum(equation, x, y, preferred_element_type=_wide(x))


def _wide(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


@jax.custom_vjp
def _rows_matmul(
    x: Float[Array, "n d"],
    w: Float[Array | QuantArray | FakeQuant, "e d f"],
    experts: Int[Array, " n"],
) -> Float[Array, "n f"]:
    return _rows_matmul_forward(x, w, experts)[0]


def _rows_matmul_forward(x, w, experts):
    keys = _sorted_keys(experts, len(w), block_size(len(x), len(w)))

    def body(_, e, row, y):
        return _add(y, row, _times(_take(x, row), w, e))

    zeros = jnp.zeros((len(x), w.shape[-1]), x.dtype)
    return _over_blocks(keys, len(x), body, zeros), (x, w, keys)


def _rows_matmul_backward(saved, dy):
    x, w, keys = saved

    def body(_, e, row, carry):
        dx, dw = carry
        dy_b = _take(dy, row)
        dx = _add(dx, row, _dot("bf,df->bd", dy_b, w[e].astype(x.dtype)))
        return dx, _learnt(dw, e, "bd,bf->df", _met(_take(x, row), w, e), dy_b)

    zeros = jnp.zeros_like(x), _no_gradient(w, _wide(x))
    dx, dw = _over_blocks(keys, len(x), body, zeros)
    return dx, _gradient(dw, w), None


def _no_gradient(w: Array | QuantArray | FakeQuant | None, dtype) -> Array | None:
    """Zeros to add to; None where nothing is learnt."""
    if w is None or isinstance(w, QuantArray):
        return None
    return jnp.zeros(w.shape, dtype)


def _gradient(g: Array | None, w: Array | QuantArray | FakeQuant | None):
    """The sum as what `custom_vjp` expects beside `w`."""
    if g is None:
        return None
    g = g.astype(w.dtype)
    return FakeQuant(g, None) if isinstance(w, FakeQuant) else g


def _learnt(dw: Array | None, e, equation: str, x: Array, y: Array) -> Array | None:
    return None if dw is None else dw.at[e].add(_dot(equation, x, y))


_rows_matmul.defvjp(_rows_matmul_forward, _rows_matmul_backward)


@jax.custom_vjp
def _expert_mlp(x, up, down, experts, gates, mask):
    return _mlp(x, up, down, experts, gates, mask, keep=False)[0]


def _mlp(x, up, down, experts, gates, mask, *, keep: bool):
    """The output; the sorted keys; where `keep`, the rectified x @ up of each."""
    n, c, f = experts.size, experts.shape[-1], up.shape[-1]
    block = block_size(n, len(up))
    keys = _sorted_keys(experts.reshape(-1), len(up), block)

    def body(start, e, row, carry):
        y, kept = carry
        active = jax.nn.relu(_times(_take(x, row // c), up, e)).astype(x.dtype)
        if keep:
            # An unfilled tail is overwritten by the next block, which starts there.
            kept = jax.lax.dynamic_update_slice_in_dim(kept, active, start, axis=0)
        hidden = active.astype(_wide(x)) ** 2 * _mask_rows(mask, row // c)
        out = _times(hidden.astype(x.dtype), down, e)
        return _add(y, row // c, out * _take(gates.reshape(-1, 1), row)), kept

    zeros = jnp.zeros_like(x, _wide(x)), jnp.zeros((keep * (n + block), f), x.dtype)
    y, kept = _over_blocks(keys, n, body, zeros)
    return y.astype(x.dtype), (keys, kept)


def _mlp_forward(x, up, down, experts, gates, mask):
    y, saved = _mlp(x, up, down, experts, gates, mask, keep=True)
    return y, (x, up, down, gates, mask, *saved)


def _mlp_backward(saved, dy):
    x, up, down, gates, mask, keys, kept = saved
    n, c, wide = gates.size, gates.shape[-1], _wide(x)

    def body(start, e, row, carry):
        dx, dup, ddown, dgates, dmask = carry
        dy_b, gate = _take(dy, row // c), _take(gates.reshape(-1, 1), row).astype(wide)
        active = jax.lax.dynamic_slice_in_dim(kept, start, len(row)).astype(wide)
        mask_b = _mask_rows(mask, row // c)
        hidden = active**2 * mask_b
        met_hidden = _met(hidden.astype(x.dtype), down, e).astype(wide)

        dhidden = _dot("bd,fd->bf", dy_b, down[e].astype(x.dtype))
        dgates = _add(dgates, row, jnp.sum(dhidden * met_hidden, axis=-1))
        if mask is not None:
            dmask_b = gate * dhidden * active**2
            dmask = (
                _add(dmask, row // c, dmask_b)
                if mask.ndim > 1
                else dmask + jnp.sum(dmask_b, axis=0)
            )
        dactive = (2 * gate * active * mask_b * dhidden).astype(x.dtype)
        dx = _add(dx, row // c, _dot("bf,df->bd", dactive, up[e].astype(x.dtype)))
        met_rows = _met(_take(x, row // c), up, e)
        dup = _learnt(dup, e, "bd,bf->df", met_rows, dactive)
        gated = (gate * met_hidden).astype(x.dtype)
        ddown = _learnt(ddown, e, "bf,bd->fd", gated, dy_b)
        return dx, dup, ddown, dgates, dmask

    of = (x, up, down, gates.reshape(-1), mask)
    zeros = tuple(_no_gradient(a, wide) for a in of)
    dx, dup, ddown, dgates, dmask = _over_blocks(keys, n, body, zeros)
    dgates = dgates.reshape(gates.shape)
    grads = dx, dup, ddown, None, dgates, dmask
    like = x, up, down, None, gates, mask
    return tuple(map(_gradient, grads, like))


_expert_mlp.defvjp(_mlp_forward, _mlp_backward)
