"""RMSNorm of gated heads inside each group: what follows the scan of a Mamba-2 layer.

    b batch   t time   g groups   r heads_per_group   p head_dim

The gate, the masks, the norm and its scale are one pass over memory.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from elastic_kernels.dispatch import lazy, select
from elastic_kernels.gated_norm import reference


def gated_rms_norm(
    y: Float[Array, "b t g r p"],
    z: Float[Array, "b t g r p"],
    scale: Float[Array, "g r p"],
    *,
    live: Array | float | int,
    eps: float,
    mask: Float[Array, "*bt r p"] | None = None,
    active: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> Float[Array, "b t g r p"]:
    """Normalises `u = y silu(z) mask` over the heads and channels of each group:

        u / sqrt(sum(u ** 2) / live + eps) * scale

    Differentiable in `y`, `z`, `scale`, `mask` and `live`.

    Args:
      live: how many channels of a group count, a number or an array, [] or [b, t].
      mask: factors on heads and channels, [r p] for all tokens or [b t r p].
      active: how many heads of each group are read, traced or not; those behind them
        count as zeros. The Triton form costs what they cost.
      implementation: "reference", "xla", "triton", or None for the device's default.

    Returns:
      In the dtype of `y`; computed in at least float32.

    Raises:
      ValueError: shapes do not fit, or `active` exceeds the heads.
    """
    _check(y, z, scale, live, mask, active)
    portable = _masking(reference.gated_rms_norm)
    available = {
        "reference": portable,
        "xla": portable,  # XLA makes the same passes over memory of it on its own
        "triton": lazy("elastic_kernels.gated_norm.triton", "gated_rms_norm"),
    }
    run = select("gated_rms_norm", implementation, available)
    return run(y, z, scale, live=live, eps=eps, mask=mask, active=active)


def _masking(norm):
    """Gives a count of active heads to a form that has none, by zeros behind them."""

    def call(y, z, scale, *, active, **options):
        if active is None:
            return norm(y, z, scale, **options)
        heads = (jnp.arange(y.shape[3]) < active)[:, None]
        y, z = jnp.where(heads, y, 0), jnp.where(heads, z, 0)
        return jnp.where(heads, norm(y, z, scale, **options), 0)

    return call


def _check(y, z, scale, live, mask, active):
    b, t, _, r, p = y.shape
    expected = {"z": (z, [y.shape]), "scale": (scale, [y.shape[2:]])}
    if mask is not None:
        expected["mask"] = mask, [(r, p), (b, t, r, p)]
    if not isinstance(live, float | int):
        expected["live"] = live, [(), (b, t)]
    wrong = [
        f"{name} {a.shape}, expected {' or '.join(map(str, shapes))}"
        for name, (a, shapes) in expected.items()
        if a.shape not in shapes
    ]
    if wrong:
        raise ValueError(f"gated_rms_norm: for y {y.shape}: " + "; ".join(wrong))
    if isinstance(active, int) and not 0 < active <= r:
        raise ValueError(
            f"gated_rms_norm: {active} active heads, expected 1 to {r}, the heads of "
            "each group"
        )
