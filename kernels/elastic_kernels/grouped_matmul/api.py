"""Products in which every row chooses its own matrix: dropless mixture of experts.

    m tokens   c choices (top_k)   e experts   d embed   f expert_ffn

`grouped_matmul` is the single product, for statistics that need every intermediate.
`expert_mlp` fuses the two products, the activation and the gated sum, so that only
one hidden activation per (token, choice) is ever kept, and only for the gradient.
Every row is computed exactly, however unevenly the rows choose.

Quantized matrices become arrays one expert at a time, and get no gradient; those in
training get that of the exact ones. Where a matrix knows the scale of its inputs, rows
are rounded by that of the expert they chose.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from elastic_kernels.dispatch import lazy, select
from elastic_kernels.grouped_matmul import reference, xla
from elastic_kernels.products import FakeQuant, Observed
from elastic_kernels.quant_array import QuantArray

Width = Int[Array, ""] | int | None


def grouped_matmul(
    x: Float[Array, "m c d"],
    w: Float[Array | QuantArray | FakeQuant | Observed, "e d f"],
    experts: Int[Array, "m c"],
    *,
    implementation: str | None = None,
) -> Float[Array, "m c f"]:
    """Multiplies each row by its expert's matrix: `x[m, c] @ w[experts[m, c]]`.

    Args:
      x: one row per (token, choice).
      w: one matrix per expert; used in the dtype of `x`.
      experts: which matrix, in [0, e). Not checked: the values are traced.
      implementation: see `elastic_kernels.dispatch.select`. "mosaic", for Hopper, is
        experimental and runs only where it is named.

    Returns:
      The products, in the dtype of `x`, accumulated in at least float32.
      Differentiable in `x` and `w`; a matrix nobody chose gets a zero gradient.

    Raises:
      ValueError: shapes do not fit, or `experts` is not an integer array.
    """
    _check_experts("grouped_matmul", experts, x.shape[:2], w.shape[0])
    _check_shape("grouped_matmul", "w", w, (w.shape[0], x.shape[2], w.shape[-1]))
    available = {
        "reference": reference.grouped_matmul,
        "xla": xla.grouped_matmul,
        "triton": lazy("elastic_kernels.grouped_matmul.triton", "grouped_matmul"),
        "mosaic": lazy("elastic_kernels.grouped_matmul.mosaic", "grouped_matmul"),
    }
    chosen = select("grouped_matmul", implementation, available)
    if isinstance(w, Observed):
        w.see(x, experts)
        w = w.weight
    return chosen(x, w, experts)


def expert_mlp(
    x: Float[Array, "m d"],
    up: Float[Array | QuantArray | FakeQuant, "e d f"],
    down: Float[Array | QuantArray | FakeQuant, "e f d"],
    experts: Int[Array, "m c"],
    gates: Float[Array, "m c"],
    *,
    hidden_mask: Float[Array, "*m f"] | None = None,
    active: tuple[Width, Width] = (None, None),
    implementation: str | None = None,
) -> Float[Array, "m d"]:
    """Sends each token through its chosen experts and sums their outputs by gate.

    Equivalent, for one token, to

        sum(g * (relu(x @ up[e]) ** 2 * hidden_mask) @ down[e]
            for e, g in zip(experts, gates))

    The squared-ReLU expert without a gate projection is Nemotron-H's
    (arXiv:2504.03624).

    Args:
      x: tokens.
      up, down: one pair of matrices per expert; used in the dtype of `x`.
      experts: the chosen experts, in [0, e). Not checked: the values are traced.
      gates: the weight of each choice.
      hidden_mask: factors on the hidden channels, [f] for all tokens or [m f].
      active: how many hidden channels and how many channels of `x` count, traced or
        not; None is all. Those behind are as if the arrays ended there: read as zeros,
        and results and gradients, of the hidden mask as well, are exact zeros. The
        Triton form costs what these widths cost; the others cost the full ones.
      implementation: see `elastic_kernels.dispatch.select`.

    Returns:
      [m d] in the dtype of `x`, accumulated in at least float32. Differentiable in
      `x`, `up`, `down`, `gates` and `hidden_mask`; an expert nobody chose gets a zero
      gradient.

    Raises:
      ValueError: shapes do not fit, or `experts` is not an integer array.
    """
    (m, d), (e, _, f) = x.shape, up.shape
    _check_experts("expert_mlp", experts, (m, experts.shape[-1]), e)
    _check_shape("expert_mlp", "up", up, (e, d, f))
    _check_shape("expert_mlp", "down", down, (e, f, d))
    _check_shape("expert_mlp", "gates", gates, experts.shape)
    if hidden_mask is not None:
        whole = (f,) if hidden_mask.ndim == 1 else (m, f)
        _check_shape("expert_mlp", "hidden_mask", hidden_mask, whole)
    _check_active(active, (f, d))
    available = {
        "reference": _masking(reference.expert_mlp),
        "xla": _masking(xla.expert_mlp),
        "triton": lazy("elastic_kernels.grouped_matmul.triton", "expert_mlp"),
    }
    chosen = select("expert_mlp", implementation, available)
    return chosen(x, up, down, experts, gates, hidden_mask, active)


def _masking(expert_mlp: Callable) -> Callable:
    """Gives active widths to a form that has none, by zeros in what lies behind."""

    def call(x, up, down, experts, gates, mask, active):
        f, d = active
        if f is not None:
            one = jnp.ones((), x.dtype)
            live = jnp.arange(up.shape[2]) < f
            mask = jnp.where(live, one if mask is None else mask, 0)
        if d is None:
            return expert_mlp(x, up, down, experts, gates, mask)
        live = jnp.arange(up.shape[1]) < d
        y = expert_mlp(jnp.where(live, x, 0), up, down, experts, gates, mask)
        return jnp.where(live, y, 0)

    return call


def _check_active(active: tuple, widths: tuple[int, int]) -> None:
    names = "expert_ffn", "embed"
    for name, n, width in zip(names, active, widths, strict=True):
        if isinstance(n, int) and not 0 < n <= width:
            raise ValueError(
                f"expert_mlp: active {name} is {n}, expected 1 to {width}, the width "
                "of the matrices"
            )


def _check_shape(operation: str, name: str, a: jax.Array, expected: tuple) -> None:
    if a.shape != tuple(expected):
        raise ValueError(
            f"{operation}: {name} has shape {a.shape}, expected {tuple(expected)}; "
            "make it fit the other arguments"
        )


def _check_experts(operation: str, experts: jax.Array, rows: tuple, count: int) -> None:
    """Rows are numbered together with their expert in one uint32: see `xla`."""
    _check_shape(operation, "experts", experts, rows)
    if not jnp.issubdtype(experts.dtype, jnp.integer):
        raise ValueError(
            f"{operation}: experts has dtype {experts.dtype}, expected integers; "
            "pass the indices that top_k returns"
        )
    if experts.size * (count + 1) >= 2**32:
        raise ValueError(
            f"{operation}: {experts.size} rows x {count} experts is too many to "
            "number in 32 bits; split the tokens into several calls"
        )
