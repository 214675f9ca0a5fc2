"""Lowers or compiles for a GPU that is not here; run by tests.

    python tests/kernels/deviceless.py lower | compile train | scan | mosaic

`train` is a whole train step with Triton's kernels, in a toy's sizes; `scan` and
`mosaic` are the scan by Triton's and the grouped product by Mosaic's, with gradients,
in those of Nemotron 3 Nano. Prints one JSON line: how many kernels the program calls,
and, compiled, its bytes.
"""

import contextlib
import functools
import json
import sys

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import elastic_jax as ej
from elastic_jax import train
from elastic_kernels import dispatch, ssd
from elastic_kernels.grouped_matmul.api import grouped_matmul

# XLA's description of a GPU, in its text form; numbers of an H100 with 80 GB.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 } device_description_str: "NVIDIA H100 80GB HBM3"
"""

cfg = ej.presets.tiny("ME*M-")
optimizer = train.optimizer(ej.param_specs(cfg))


def step(state, batch, masks):
    """A masked train step in bfloat16: loss, gradients, update."""

    def loss(params):
        params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        options = {"masks": masks, "segment_ids": batch["segment_ids"]}
        logits = ej.apply(params, batch["tokens"], cfg, **options)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.mean(each)

    value, gradients = jax.value_and_grad(loss)(state.params)
    rates = {"rate/params": 1e-3, "rate/router": 0.0}
    total = {"params": gradients, "router": {}}
    return train.update(optimizer, state, total, rates, True), value


def arguments():
    """Shapes of the arguments of `step`."""

    def make():
        params = ej.init_params(jax.random.key(0), cfg)
        counts = ej.counts(cfg, embed=cfg.embed // 2, expert_ffn=cfg.expert_ffn // 2)
        tokens = jnp.zeros((2, 128), jnp.int32)
        batch = {"tokens": tokens, "targets": tokens, "segment_ids": tokens}
        state = train.TrainState(
            jnp.zeros((), jnp.int32),
            params,
            {},
            optimizer.init({"params": params, "router": {}}),
        )
        return state, batch, ej.masks_from_counts(cfg, counts)

    return jax.eval_shape(make)


def scan(*inputs):
    y, pull = jax.vjp(lambda *a: ssd(*a, implementation="triton")[0], *inputs)
    return y, pull(y)


def scan_arguments():
    of, (b, t, g, r, p, n) = jax.ShapeDtypeStruct, (2, 8192, 8, 8, 64, 128)
    heads, narrow, wide = of((g, r), jnp.float32), jnp.bfloat16, jnp.float32
    x, dt, shared = (b, t, g, r, p), (b, t, g, r), (b, t, g, n)
    B = C = of(shared, narrow)
    return of(x, narrow), of(dt, wide), heads, B, C, heads


def mosaic(x, w, experts):
    product = functools.partial(grouped_matmul, implementation="mosaic")
    y, pull = jax.vjp(lambda x, w: product(x, w, experts), x, w)
    return y, pull(y)


def mosaic_arguments():
    of = jax.ShapeDtypeStruct
    rows, weights = (2048, 6, 2688), (128, 2688, 1856)
    return (
        of(rows, jnp.bfloat16),
        of(weights, jnp.bfloat16),
        of(rows[:2], jnp.int32),
    )


PROGRAMS = {  # the function, its arguments, what calls of its kernels look like
    "train": (step, arguments, "@triton_kernel_call"),
    "scan": (scan, scan_arguments, "@triton_kernel_call"),
    "mosaic": (mosaic, mosaic_arguments, "@mosaic_gpu_v2"),
}


def abstract_gpu():
    """Names the device to JAX; before 0.11 it does not ask, and has no name for one."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    kind = {"device_kind": "NVIDIA H100 80GB HBM3", "num_cores": 132, "platform": "gpu"}
    device = jax.sharding.AbstractDevice(**kind)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def main(what: str, which: str) -> None:
    function, make, call = PROGRAMS[which]
    shapes = make()
    if what == "lower":
        with dispatch.target(90), abstract_gpu():
            traced = jax.jit(function).trace(*shapes)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        print(json.dumps({"kernels": text.count(call)}))
        return
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), shapes
    )
    with dispatch.target(90), jax.set_mesh(mesh):
        lowered = jax.jit(function).lower(*shapes)
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    found = {
        "kernels": lowered.as_text().count(call),
        "temporaries_bytes": memory.temp_size_in_bytes,
        "given_bytes": memory.argument_size_in_bytes + memory.output_size_in_bytes,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
