"""What a budget costs in training: sliced, masked, and how long steps compile.

    python experiments/bench_training.py [--json PATH]

One core, one thread, candidates alternating in one process. Three ratios:

* the gradient of a slice of the parent, landing in the parent's tree, against the
  gradient of a model that was built at that size;
* the masked gradient of the whole parent against the unmasked one;
* seconds to compile a step of 52 blocks against one of 12.

The teacher and the optimizer update are left out on both sides.
"""

import argparse
import json
import os
import pathlib
import sys
import time

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
)
REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import elastic_jax as ej  # noqa: E402
from elastic_jax.distill import cross_entropy_loss  # noqa: E402
from elastic_kernels.timing import alternate  # noqa: E402

ROWS, CONTEXT = 2, 512
BARS = {"sliced / built": 1.10, "masked / unmasked": 1.25, "52 / 12 blocks": 5.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()

    times, compiled = gradients(options.rounds), compilation()
    found = {
        "seconds": times,
        "compile_seconds": compiled,
        "ratios": {
            "sliced / built": times["sliced"] / times["built"],
            "masked / unmasked": times["masked"] / times["unmasked"],
            "52 / 12 blocks": compiled[52] / compiled[12],
        },
    }
    print(f"\n{'ratio':<20}{'measured':>10}{'bar':>8}")
    for name, ratio in found["ratios"].items():
        bar = BARS[name]
        verdict = "" if ratio <= bar else "  missed"
        print(f"{name:<20}{ratio:>10.2f}{bar:>8.2f}{verdict}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def gradients(rounds: int) -> dict[str, float]:
    """Processor seconds of one gradient, by candidate."""
    cfg = model("MEM*ME")
    specs, params = ej.param_specs(cfg), weights(cfg)
    counts = ej.counts(
        cfg, embed=192, heads_per_group=3, expert_ffn=128, shared_ffn=128
    )
    small_cfg = ej.slice_config(cfg, counts)
    small = jax.tree.map(jnp.copy, ej.slice_params(params, specs, counts))
    masks = ej.masks_from_counts(cfg, counts)

    def sliced(p, tokens):
        return loss(ej.slice_params(p, specs, counts), tokens, small_cfg)

    def masked(p, tokens, masks):
        return loss(p, tokens, cfg, masks)

    tokens = jnp.asarray(
        np.random.default_rng(0).integers(0, cfg.vocab, (ROWS, CONTEXT))
    )
    built = jax.jit(jax.grad(lambda p, t: loss(p, t, small_cfg)))
    whole = jax.jit(jax.grad(lambda p, t: loss(p, t, cfg)))
    sliced, masked = jax.jit(jax.grad(sliced)), jax.jit(jax.grad(masked))
    times = alternate(
        {
            "built": lambda: built(small, tokens),
            "sliced": lambda: sliced(params, tokens),
            "unmasked": lambda: whole(params, tokens),
            "masked": lambda: masked(params, tokens, masks),
        },
        rounds=rounds,
    )
    for name, timing in times.items():
        low, middle = 1e3 * timing.min_seconds, 1e3 * timing.median_seconds
        print(f"{name:<12} min {low:8.1f} ms   median {middle:8.1f} ms")
    return {name: timing.min_seconds for name, timing in times.items()}


def compilation() -> dict[int, float]:
    """Processor seconds to compile the gradient of 12 and of 52 blocks."""
    seconds = {}
    for pattern in ("MEMEM*EMEM*E", ej.presets.nemotron3_nano().pattern):
        cfg = model(pattern)
        shapes = jax.eval_shape(lambda: ej.init_params(jax.random.key(0), cfg))  # noqa: B023
        tokens = jax.ShapeDtypeStruct((ROWS, CONTEXT), jnp.int32)
        start = time.process_time()
        jax.jit(jax.grad(lambda p, t: loss(p, t, cfg))).lower(shapes, tokens).compile()  # noqa: B023
        seconds[len(pattern)] = time.process_time() - start
        print(f"{len(pattern)} blocks: {seconds[len(pattern)]:.1f} s to compile")
    return seconds


def model(pattern: str) -> ej.ModelConfig:
    """About 10 million parameters at 12 blocks: products large enough to matter."""
    return ej.ModelConfig(
        pattern=pattern, vocab=512, embed=256, ssm_groups=2, heads_per_group=4,
        ssm_head_dim=64, ssm_state=64, kv_heads=2, q_per_kv=4, head_dim=32, experts=16,
        expert_ffn=256, shared_ffn=256, ffn=512, top_k=2, routed_scaling_factor=2.5,
    )  # fmt: skip


def weights(cfg: ej.ModelConfig):
    return jax.jit(ej.init_params, static_argnums=1)(jax.random.key(0), cfg)


def loss(params, tokens, cfg, masks=None):
    hidden = ej.hidden_states(params, tokens, cfg, masks=masks)
    weights = jnp.ones(tokens.shape)
    return cross_entropy_loss(hidden, params["lm_head"], tokens, weights=weights)


if __name__ == "__main__":
    main()
