"""What a kernel takes of a GPU, read from its machine code; no GPU is needed.

`recorded` traces a function and keeps what it would launch; `compiled` turns a launch
into machine code for one GPU generation and asks the tools that come with Triton.
"""

import contextlib
import dataclasses
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from elastic_kernels import launch as launching

# Bytes that a block may have at most, by compute capability (CUDA programming guide).
SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
_SCALARS = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "int32": "i32",
    "uint8": "u8",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call of `elastic_kernels.launch.launch`."""

    kernel: Any
    arguments: tuple  # a dtype name per array, an int per scalar
    constants: dict[str, Any]
    grid: tuple[int, ...]
    aliases: dict[int, int]
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of one kernel on one GPU generation."""

    registers: int  # a thread
    spilled_bytes: int  # a thread
    shared_bytes: int  # a block


def recorded(function: Callable, *arguments) -> list[Launch]:
    """The kernels that `function(*arguments)` would launch, in order.

    Only shapes matter; nothing is computed, and `arguments` may be ShapeDtypeStructs.
    """
    with _recording() as launches:
        jax.eval_shape(lambda *a: function(*a), *arguments)
    return launches


def compiled(launch: Launch, capability: int) -> Resources:
    """Compiles one launch for a compute capability (80, 90, 100, 120).

    Raises:
      RuntimeError: the compiler's report cannot be read.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    given = dict(zip(names, launch.arguments, strict=False))
    signature = {
        name: "constexpr"
        if name in launch.constants
        else "i32"
        if isinstance(given[name], int)
        else f"*{_SCALARS[given[name]]}"
        for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
    }
    source = ASTSource(
        fn=launch.kernel,
        signature=signature,
        constexprs={n: launch.constants[n] for n in names if n in launch.constants},
        attrs=aligned,
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    target = GPUTarget("cuda", capability, 32)
    with _cache(triton):
        kernel = triton.compile(source, target=target, options=options)

    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if not found:
        raise RuntimeError(f"cuobjdump did not report registers: {report!r}")
    return Resources(int(found[1]), int(found[2]), kernel.metadata.shared)


@contextlib.contextmanager
def _cache(triton: Any) -> Iterator[None]:
    """A folder for Triton's cache, which others of this process may have turned off."""
    if triton.knobs.cache.dir:
        yield
        return
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        yield


@contextlib.contextmanager
def _recording() -> Iterator[list[Launch]]:
    launches = []

    def record(kernel, inputs, outputs, *, grid, **options) -> list:
        arguments = tuple(
            a if isinstance(a, int) else jnp.dtype(a.dtype).name
            for a in (*inputs, *outputs)
        )
        launches.append(
            Launch(
                kernel,
                arguments,
                {name: options[name] for name in options if name in kernel.arg_names},
                grid,
                dict(options.get("aliases") or {}),
                options.get("num_warps", launching.NUM_WARPS),
                options.get("num_stages", launching.NUM_STAGES),
            )
        )
        return [jnp.zeros(o.shape, o.dtype) for o in outputs]

    original, launching.launch = launching.launch, record
    try:
        yield launches
    finally:
        launching.launch = original
