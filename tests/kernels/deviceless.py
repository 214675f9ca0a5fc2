"""Lowers or compiles a whole train step for a GPU that is not here; run by test_aot.

    python tests/kernels/deviceless.py lower | compile

Prints one JSON line: how many kernels the program calls, and, compiled, its bytes.
"""

import json
import sys

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import elastic_jax as ej
from elastic_jax import train
from elastic_kernels import dispatch

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


def main(what: str) -> None:
    shapes = arguments()
    with dispatch.target(90):
        if what == "lower":
            traced = jax.jit(step).trace(*shapes)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            print(json.dumps({"kernels": text.count("@triton_kernel_call")}))
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
        with jax.set_mesh(mesh):
            lowered = jax.jit(step).lower(*shapes)
            compiled = lowered.compile()
        print(
            json.dumps(
                {
                    "kernels": lowered.as_text().count("@triton_kernel_call"),
                    "temporaries_bytes": compiled.memory_analysis().temp_size_in_bytes,
                }
            )
        )


if __name__ == "__main__":
    main(sys.argv[1])
