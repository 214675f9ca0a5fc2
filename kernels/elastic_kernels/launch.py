"""Starts a Triton kernel on JAX arrays: through jax-triton, or in the interpreter.

Where `TRITON_INTERPRET=1` was set before the kernels were imported, they run as plain
Python on the host, inside the same jitted program: all that surrounds a kernel is then
tested without a GPU. Everything here is imported on first use, as neither triton nor
jax-triton is part of the base installation.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_kernels import dispatch

NUM_WARPS, NUM_STAGES = 4, 2
_ONE_AT_A_TIME = threading.Lock()  # the interpreter keeps its place in globals


def launch(
    kernel: Any,
    inputs: Sequence[jax.Array | int],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    num_warps: int = NUM_WARPS,
    num_stages: int = NUM_STAGES,
    zeroed: Sequence[int] = (),
    aliases: Mapping[int, int] | None = None,
    **constants: Any,
) -> list[jax.Array]:
    """Runs `kernel[grid](*inputs, *outputs, **constants)`; returns the outputs.

    Args:
      inputs: arrays, and Python integers, which do not make another compilation.
      outputs: what is allocated for the kernel to write.
      num_warps, num_stages: compiler options of Triton.
      zeroed: outputs that are zeros when the kernel starts.
      aliases: input -> output that may take its buffer.
      constants: the kernel's `tl.constexpr` arguments.
    """
    options = {
        "kernel": kernel,
        "out_shape": list(outputs),
        "grid": grid,
        "zeroed_outputs": tuple(zeroed),
    }
    if interpreted(kernel):
        results = _interpret(inputs, **options, **constants)
    else:
        results = _jax_triton().triton_call(
            *inputs,
            **options,
            num_warps=num_warps,
            num_stages=num_stages,
            compute_capability=dispatch.forced_capability(),
            input_output_aliases=dict(aliases or {}),
            **constants,
        )
    axes = _varying(inputs)
    return [_vary(result, axes) for result in results]


def _jax_triton():
    """jax-triton; importing it turns off the cache of all other use of Triton."""
    cache = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    if cache is None:
        os.environ.pop("TRITON_CACHE_DIR", None)
    else:
        os.environ["TRITON_CACHE_DIR"] = cache
    return jax_triton


def interpreted(kernel: Any) -> bool:
    """Whether a `triton.jit` function was decorated under TRITON_INTERPRET=1."""
    return type(kernel).__name__ == "InterpretedFunction"


def batch_parallel(function: Callable) -> Callable:
    """Lets `jax.vmap` map over a function whose every array leads with a batch.

    A kernel call has no batching rule; a mapped axis joins the batch instead.
    """
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(axis_size, in_batched, *args):
        def joined(a, batched):
            if not batched:
                a = jnp.broadcast_to(a, (axis_size, *a.shape))
            return a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])

        results = mapped(*jax.tree.map(joined, args, tuple(in_batched)))
        apart = lambda a: a.reshape(axis_size, len(a) // axis_size, *a.shape[1:])
        return jax.tree.map(apart, results), jax.tree.map(lambda _: True, results)

    return mapped


def alike(*arrays: jax.Array | None) -> list[jax.Array | None]:
    """The same arrays, each varying over every mesh axis that any of them varies over.

    Inside `jax.shard_map` the gradient of an operand varies like the others. What is
    replicated is made to vary before a custom VJP sees it, and its gradient is summed
    over devices by JAX.
    """
    axes = _varying(arrays)
    return [None if a is None else _vary(a, axes) for a in arrays]


def _varying(arrays) -> frozenset:
    of = (a for a in arrays if isinstance(a, jax.Array))
    return frozenset().union(*map(_axes, of))


def _axes(a: jax.Array) -> frozenset:
    """The mesh axes over which `a` varies; the attribute has had two names in JAX."""
    kind = jax.typeof(a)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def _vary(a: jax.Array, axes: frozenset) -> jax.Array:
    missing = tuple(axes - _axes(a))
    return jax.lax.pcast(a, missing, to="varying") if missing else a


def _interpret(inputs, *, kernel, out_shape, grid, zeroed_outputs, **constants):
    arrays = [a for a in inputs if isinstance(a, jax.Array)]

    def run(*arrays):
        arrays = iter(arrays)
        tensors = [
            _HostTensor(np.ascontiguousarray(next(arrays)))
            if isinstance(a, jax.Array)
            else a
            for a in inputs
        ]
        # What a kernel leaves unwritten must show: NaN, not a lucky zero.
        results = [
            np.zeros(o.shape, o.dtype) if i in zeroed_outputs else _unwritten(o)
            for i, o in enumerate(out_shape)
        ]
        with _ONE_AT_A_TIME:
            kernel[grid](*tensors, *map(_HostTensor, results), **constants)
        return results

    return jax.pure_callback(run, out_shape, *arrays, vmap_method="sequential")


def _unwritten(like) -> np.ndarray:
    floats = jnp.issubdtype(like.dtype, jnp.floating)
    return np.full(like.shape, np.nan if floats else -1, like.dtype)


class _HostTensor:
    """As much of a torch tensor as Triton's interpreter asks of its arguments."""

    device = "cpu"

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, np.dtype(array.dtype).name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_Storage":
        return _Storage(self.array)

    def new_empty(self, *_, **__) -> "_HostTensor":
        return _HostTensor(self.array)

    def set_(self, *_) -> "_HostTensor":
        return self

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)


class _Storage:
    def __init__(self, array: np.ndarray):
        self.array = array

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def cpu(self) -> "_Storage":
        return self

    def copy_(self, _) -> "_Storage":
        return self
