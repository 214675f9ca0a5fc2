"""State space duality (Mamba-2): the selective scan as one operation.

    b batch   t time   g ssm_groups   r heads_per_group   p ssm_head_dim   n ssm_state

The heads of a group share B and C, and no implementation ever expands them to
heads: that sharing is most of what makes the chunked form cheap.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from elastic_kernels.dispatch import lazy, select
from elastic_kernels.ssd import reference, xla


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
    implementation: str | None = None,
) -> tuple[Float[Array, "b t g r p"], Float[Array, "b g r p n"]]:
    """Runs the recurrence of arXiv 2405.21060 over every token of `x`.

    In plain JAX, for one batch row, group and head:

        for t in range(time):
            state = where(resets[t], 0, state)
            state = exp(dt[t] * A) * state + dt[t] * outer(x[t], B[t])
            y[t] = state @ C[t] + D * x[t]

    Computed in float32, or in float64 where `x` is float64. Differentiable (in
    reverse) in every float argument, through both results.

    Args:
      x: inputs of the heads.
      dt: step sizes, already positive (after softplus). A token with dt = 0 leaves
        the state as it was, which is how padding is expressed.
      A: decay rates, negative.
      B: input directions, shared by the heads of a group.
      C: output directions, shared by the heads of a group.
      D: weights of the skip from `x` to `y`.
      initial_state: the state before the first token; None is zeros.
      resets: True where a token starts a new document: the state is zeroed before
        that token, at t = 0 as well, where it drops `initial_state`.
      implementation: "reference", "xla", "triton", or None for the device's default.

    Returns:
      `y` in the dtype of `x`, and the state after the last token.

    Raises:
      ValueError: a shape disagrees, or there is no token.
    """
    _check(x, dt, A, B, C, D, initial_state, resets)
    available = {
        "reference": reference.ssd,
        "xla": xla.ssd,
        "triton": lazy("elastic_kernels.ssd.triton", "ssd"),
    }
    run = select("ssd", implementation, available)
    return run(x, dt, A, B, C, D, initial_state=initial_state, resets=resets)


def _check(x, dt, A, B, C, D, initial_state, resets):
    if x.ndim != 5 or x.shape[1] == 0 or B.ndim != 4:
        raise ValueError(
            "ssd: expected x[b t g r p] with at least one token and B[b t g n], got "
            f"x {x.shape} and B {B.shape}"
        )
    b, t, g, r, p = x.shape
    n = B.shape[-1]
    expected = {
        "dt": (dt, (b, t, g, r)),
        "A": (A, (g, r)),
        "B": (B, (b, t, g, n)),
        "C": (C, (b, t, g, n)),
        "D": (D, (g, r)),
        "initial_state": (initial_state, (b, g, r, p, n)),
        "resets": (resets, (b, t)),
    }
    wrong = [
        f"{name} {a.shape}, expected {shape}"
        for name, (a, shape) in expected.items()
        if a is not None and a.shape != shape
    ]
    if wrong:
        raise ValueError(f"ssd: for x {x.shape}: " + "; ".join(wrong))
    if resets is not None and resets.dtype != jnp.bool_:
        raise ValueError(
            f"ssd: resets must be bool (True where a document starts), got "
            f"{resets.dtype}; from segment ids, compare neighbours"
        )
