"""Chooses the implementation of an operation, and says why one was refused.

The choice is made while tracing, from the default device; deviceless compilation
and tests force it by name. An implementation declines by raising
`NotImplementedError`; nothing then falls through silently.
"""

from collections.abc import Callable, Mapping

import jax

PREFERENCE = {"cpu": ("xla",), "gpu": ("scaled", "triton", "xla"), "tpu": ("xla",)}


def select(
    operation: str, implementation: str | None, available: Mapping[str, Callable]
) -> Callable:
    """Returns the function that implements `operation`.

    Args:
      operation: name used in the error.
      implementation: one of `available`, or None for the first of the default
        device's `PREFERENCE` that exists.
      available: implementation name -> function.

    Raises:
      ValueError: the name is not one of `available`.
    """
    if implementation is None:
        order = PREFERENCE.get(jax.default_backend(), ("xla",))
        implementation = next(name for name in order if name in available)
    if implementation not in available:
        raise ValueError(
            f"{operation}: implementation {implementation!r} does not exist; "
            f"choose one of {sorted(available)} or None for the device's default"
        )
    return available[implementation]
