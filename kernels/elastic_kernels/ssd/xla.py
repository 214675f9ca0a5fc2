"""The chunked scan in plain XLA, with a backward pass written by hand.

    b batch   t time   q token of a chunk that reads   s token of a chunk that writes
    g ssm_groups   r heads_per_group   p ssm_head_dim   n ssm_state   c chunks

Inside a chunk the recurrence is a masked matrix product, between chunks a state is
handed on (arXiv 2405.21060, section 6). What makes it fast on a CPU:

* One loop over chunks of 32 tokens, so that nothing bigger than a chunk and its
  state is alive and the work stays in cache. A whole-sequence form writes decay
  blocks of t x chunk x heads to memory, and automatic differentiation does it again.
* The state is kept `n (r p)`: every product with B or C is then one large product
  for all heads of a group, without expanding B or C.
* The backward pass keeps the inputs, y and the state at each chunk's entry. It gets
  the gradient of the decays without reducing any q x s block (`_chunk_backward`).
* Sums, running sums too, are products with ones. On CPU, XLA fuses a reduction with
  what it sums, and the end of a cumsum into each of its readers, at several times
  the price.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

CHUNK = 32  # tokens; any value computes the same function


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
    chunk: int = CHUNK,
) -> tuple[Float[Array, "b t g r p"], Float[Array, "b g r p n"]]:
    """Scans chunks of `chunk` tokens; all else as in `elastic_kernels.ssd`."""
    b, t, g, r, p = x.shape
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((b, g, r, p, B.shape[-1]), dtype)
    state, A, D = (a.astype(dtype) for a in (initial_state, A, D))
    if t == 1:
        return _single_step(x, dt, A, B, C, D, state, resets)
    y, state = _scan(chunk, x, dt, A, B, C, D, jnp.moveaxis(state, -1, 2), resets)
    return y, jnp.moveaxis(state, 2, -1)


def _single_step(x, dt, A, B, C, D, state, resets):
    """Decoding: the recurrence itself, on its one token."""
    x_, dt, B, C = (a[:, 0].astype(state.dtype) for a in (x, dt, B, C))
    decay = jnp.exp(dt * A)
    if resets is not None:
        decay = jnp.where(resets[:, :, None], 0, decay)
    written = (dt[..., None] * x_)[..., None] * B[:, :, None, None, :]
    state = decay[..., None, None] * state + written
    y = jnp.einsum("bgrpn,bgn->bgrp", state, C) + D[..., None] * x_
    return y[:, None].astype(x.dtype), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(chunk, x, dt, A, B, C, D, state, resets):
    return _scan_forward(chunk, x, dt, A, B, C, D, state, resets)[0]


def _scan_forward(chunk, x, dt, A, B, C, D, state, resets):
    full, tail = divmod(x.shape[1], chunk)

    def step(start, length, carry):
        state, y, entries = carry
        cut = functools.partial(_cut, start=start, length=length, dtype=state.dtype)
        entries = lax.dynamic_update_index_in_dim(entries, state, start // chunk, 0)
        update, state = _chunk_forward(
            cut(x), cut(dt), A, cut(B), cut(C), D, state, _cut(resets, start, length)
        )
        return state, _put(y, update, start), entries

    y = jnp.zeros(x.shape, state.dtype)
    entries = jnp.zeros((full + (tail > 0), *state.shape), state.dtype)
    carry = (state, y, entries)
    if full:
        carry = lax.fori_loop(0, full, lambda i, c: step(i * chunk, chunk, c), carry)
    if tail:
        carry = step(full * chunk, tail, carry)
    final, y, entries = carry
    saved = (x, dt, A, B, C, D, resets, y, entries, final)
    return (y.astype(x.dtype), final), saved


def _scan_backward(chunk, saved, cotangents):
    x, dt, A, B, C, D, resets, y, entries, final = saved
    dy, dstate = cotangents
    full, tail = divmod(x.shape[1], chunk)

    def step(start, length, carry):
        dstate, end, dx, ddt, dA, dB, dC, dD = carry
        cut = functools.partial(_cut, start=start, length=length, dtype=y.dtype)
        entry = entries[start // chunk]
        gradients = _chunk_backward(
            cut(x), cut(dt), A, cut(B), cut(C), D, entry, _cut(resets, start, length),
            cut(y), cut(dy), dstate, end,
        )  # fmt: skip
        dx_, ddt_, dA_, dB_, dC_, dD_, dstate, end = gradients
        return (
            dstate, end, _put(dx, dx_, start), _put(ddt, ddt_, start), dA + dA_,
            _put(dB, dB_, start), _put(dC, dC_, start), dD + dD_,
        )  # fmt: skip

    # Each gradient that has a time is overwritten chunk by chunk, so any start will
    # do. Equal zeros would be one buffer to XLA, shared with y, and copied.
    carry = (dstate, _inner(dstate, final), x, dt, jnp.zeros_like(A), B, C,
             jnp.zeros_like(D))  # fmt: skip
    if tail:
        carry = step(full * chunk, tail, carry)
    if full:
        carry = lax.fori_loop(
            0, full, lambda i, c: step((full - 1 - i) * chunk, chunk, c), carry
        )
    dstate, _, dx, ddt, dA, dB, dC, dD = carry
    return dx, ddt, dA, dB, dC, dD, dstate, None


_scan.defvjp(_scan_forward, _scan_backward)


def _chunk_forward(x, dt, A, B, C, D, state, resets):
    """Returns y [b q g r p] of one chunk, and the state it leaves [b g n r p]."""
    between, entry, leave, whole = _decays(dt, A, resets)
    xd = _group_major(x * dt[..., None])  # b g s r p
    B, C = _group_major(B), _group_major(C)
    Bt = _transpose(B)

    inside = (between * (C @ Bt)[:, :, None]) @ _head_major(xd)  # b g r q p
    across = _unflat(C @ _flat(state), xd) * _rows(entry)  # b g q r p
    y = _group_major(_head_major(inside) + across) + D[..., None] * x
    written = _unflat(Bt @ _flat(xd * _rows(leave)), xd)
    return y, whole[:, :, None, :, None] * state + written


def _chunk_backward(x, dt, A, B, C, D, state, resets, y, dy, dstate, end):
    """Pulls the cotangents of one chunk back to its arguments.

    With cs the running sum of dt A, y_i holds exp(cs_i) as a factor of all its
    terms, and whatever token i writes, to y or to the state it leaves, holds
    exp(-cs_i). So the gradient of cs_i is  dy_i . y_i - xd_i . dxd_i  without a sum
    over pairs of tokens, where xd = dt x and y excludes the skip D x. The last cs is
    also a factor of the whole leaving state: that adds  end = <dstate, state left>.
    Resets cut terms out of those sums, and change nothing else.

    Args:
      state: at the entry of the chunk.
      dstate, end: for the state that the chunk leaves: its cotangent, and the inner
        product of the two over n and p [b g r].

    Returns:
      Gradients of x, dt, A, B, C, D and the entry state; `end` for the chunk before.
    """
    between, entry, leave, whole = _decays(dt, A, resets)
    between = _transpose(between)  # b g r s q
    xd, dyg = _group_major(x * dt[..., None]), _group_major(dy)  # b g t r p
    xd_t, dy_t = jnp.moveaxis(xd, 2, -1), jnp.moveaxis(dyg, 2, -1)  # b g r p t
    Bg, Cg = _group_major(B), _group_major(C)
    Ct = _transpose(Cg)

    inside = (between * (Bg @ Ct)[:, :, None]) @ _head_major(dyg)  # b g r s p
    across = _unflat(Bg @ _flat(dstate), xd) * _rows(leave)
    dxd = _group_major(_head_major(inside) + across)  # b s g r p

    # The gradient of the group's s x q products B C^T, summed over its heads.
    pairs = _sum_third((_head_major(xd) @ dy_t) * between)
    read = _flat(state) @ _tall(dy_t * entry[..., None, :])  # b g n q
    kept = _flat(dstate) @ _tall(xd_t * leave[..., None, :])  # b g n s
    dB = pairs @ Cg + _transpose(kept)
    dC = _transpose(pairs) @ Bg + _transpose(read)

    written = _unflat(Ct @ _flat(dyg * _rows(entry)), xd)
    dstate = whole[:, :, None, :, None] * dstate + written

    dx_x = _sum_last(dxd * x)  # b t g r
    dcs = _sum_last(dy * (y - D[..., None] * x)) - dt * dx_x
    later = np.tri(dt.shape[1], dtype=bool)
    da = _running_sum(jnp.moveaxis(dcs, 1, -1), later) + end[..., None]
    da = jnp.moveaxis(da, -1, 1)
    dx = dt[..., None] * dxd + D[..., None] * dy
    dA, dD = (dt * da).sum((0, 1)), _sum_last(dy * x).sum((0, 1))
    return (
        dx, dx_x + A * da, dA, _group_major(dB), _group_major(dC), dD,
        dstate, _inner(dstate, state),
    )  # fmt: skip


def _decays(dt, A, resets):
    """How much survives from token s to q, from entry to q, from s to the end, and
    from entry to the end: [b g r q s], [b g r q], [b g r s], [b g r]."""
    visible = np.tri(dt.shape[1], dtype=bool)
    cs = _running_sum(jnp.moveaxis(dt * A, 1, -1), visible.T)
    between = cs[..., :, None] - cs[..., None, :]
    entry, leave, whole = cs, cs[..., -1:] - cs, cs[..., -1]
    if resets is not None:
        document = jnp.cumsum(resets, 1)[:, None, None]  # b 1 1 t, 0 goes on from entry
        last = document[..., -1:]
        visible = visible & (document[..., :, None] == document[..., None, :])
        entry = jnp.where(document == 0, entry, -jnp.inf)
        leave = jnp.where(document == last, leave, -jnp.inf)
        whole = jnp.where(last[..., 0] == 0, whole, -jnp.inf)
    # Masked before the exponential: above the diagonal it could overflow.
    between = jnp.where(visible, between, -jnp.inf)
    return tuple(jnp.exp(a) for a in (between, entry, leave, whole))


def _inner(dstate, state):
    """Inner product over n and p of two states [b g n r p], per head."""
    return _sum_last(dstate * state).sum(2)


def _running_sum(a, counted):
    """Sums over the last axis, each of those entries whose rows are `counted`."""
    return jnp.matmul(a, counted.astype(a.dtype), precision=lax.Precision.HIGHEST)


def _sum_last(a):
    return a @ jnp.ones(a.shape[-1], a.dtype)


def _sum_third(a):
    rows = a.reshape(*a.shape[:3], -1)
    return (jnp.ones(a.shape[2], a.dtype) @ rows).reshape(*a.shape[:2], *a.shape[3:])


def _cut(a, start, length, dtype=None):
    if a is None:
        return None
    return lax.dynamic_slice_in_dim(a, start, length, 1).astype(dtype or a.dtype)


def _put(a, update, start):
    return lax.dynamic_update_slice_in_dim(a, update.astype(a.dtype), start, 1)


def _flat(a):
    return a.reshape(*a.shape[:-2], -1)  # ... r p -> ... (r p)


def _unflat(a, like):
    return a.reshape(*a.shape[:-1], *like.shape[-2:])


def _tall(a):
    return a.reshape(*a.shape[:2], -1, a.shape[-1])  # b g r p t -> b g (r p) t


def _group_major(a):
    return jnp.swapaxes(a, 1, 2)  # b t g ... <-> b g t ...


def _head_major(a):
    return jnp.swapaxes(a, 2, 3)  # b g t r ... <-> b g r t ...


def _rows(decay):
    return jnp.swapaxes(decay, -1, -2)[..., None]  # b g r t -> b g t r 1


def _transpose(a):
    return jnp.swapaxes(a, -1, -2)
