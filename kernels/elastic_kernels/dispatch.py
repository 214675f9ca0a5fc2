"""Chooses the implementation of an operation, and says why one was refused.

The choice is made while tracing, from the default device; deviceless compilation
and tests force it by name. An implementation declines by raising
`NotImplementedError`. One that was named must run, so the caller gets the error; of
those that were not, the next is tried under a warning that gives the reason.
"""

import contextlib
import contextvars
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping

import jax

PREFERENCE = {"cpu": ("xla",), "gpu": ("scaled", "triton", "xla"), "tpu": ("xla",)}
SMALLEST_CAPABILITY = 80  # Ampere: bfloat16 and asynchronous copies

_capability = contextvars.ContextVar("capability", default=None)


def select(
    operation: str, implementation: str | None, available: Mapping[str, Callable]
) -> Callable:
    """Returns the function that implements `operation`.

    Args:
      operation: name used in the error.
      implementation: one of `available`, or None for the first of the default
        device's `PREFERENCE` that exists and does not decline.
      available: implementation name -> function.

    Raises:
      ValueError: the name is not one of `available`.
      NotImplementedError: the implementation that was named declines; or, without a
        name, all do. Raised by the function that is returned.
    """
    if implementation is None:
        backend = "gpu" if forced_capability() else jax.default_backend()
        order = PREFERENCE.get(backend, ("xla",))
        order = [name for name in order if name in available]
        return _first_willing(operation, order, available)
    if implementation not in available:
        raise ValueError(
            f"{operation}: implementation {implementation!r} does not exist; "
            f"choose one of {sorted(available)} or None for the device's default"
        )
    return available[implementation]


def lazy(module: str, function: str) -> Callable:
    """`function` of `module`, imported when it is called.

    Raises:
      NotImplementedError: (by the result) what the module needs is not installed.
    """

    def call(*args, **kwargs):
        try:
            found = getattr(importlib.import_module(module), function)
        except ImportError as error:
            raise NotImplementedError(
                f"{module} cannot be imported: {error}; install elastic_jax[gpu]"
            ) from error
        return found(*args, **kwargs)

    return call


@contextlib.contextmanager
def target(capability: int) -> Iterator[None]:
    """What is traced inside is for a GPU that is not here: 80, 90, 100, 120.

    For compiling without a device: the default device is then this one. Trace afresh:
    what `jax.jit` traced before, for another target, it would use again.
    """
    token = _capability.set(capability)
    try:
        yield
    finally:
        _capability.reset(token)


def forced_capability() -> int | None:
    """Of the enclosing `target`; None leaves it to the device."""
    return _capability.get()


def capability() -> int | None:
    """Ten times the compute capability of the target GPU; None where there is none."""
    if forced_capability() is not None:
        return forced_capability()
    if jax.default_backend() != "gpu":
        return None
    number = getattr(jax.devices()[0], "compute_capability", None)
    return None if number is None else round(10 * float(number))


def require_capability(operation: str, least: int = SMALLEST_CAPABILITY) -> None:
    """Declines a GPU that is too old for a kernel.

    Raises:
      NotImplementedError: its compute capability is below `least`.
    """
    found = capability()
    if found is not None and found < least:
        raise NotImplementedError(
            f"{operation}: the kernel needs compute capability {least / 10}, this GPU "
            f"has {found / 10}; use implementation='xla'"
        )


def _first_willing(operation, order, available):
    def call(*args, **kwargs):
        for name in order[:-1]:
            try:
                return available[name](*args, **kwargs)
            except NotImplementedError as reason:
                warnings.warn(
                    f"{operation}: {name} declined ({reason}); {order[-1]} runs "
                    "instead and may be far slower",
                    stacklevel=3,
                )
        return available[order[-1]](*args, **kwargs)

    return call
