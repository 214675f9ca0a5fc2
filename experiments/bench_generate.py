"""Generation and training against transformers, and what each way of running costs.

    python experiments/bench_generate.py [--json PATH] [--only peer|size|draft|memory]

One core, one thread, candidates alternating in one process; processor seconds, best
of the rounds. Needs `pip install elastic_jax[hf]`.

* peer: the same 12 million random weights, float32, in transformers' NemotronH and
  here: a prompt of 512 tokens to its first token; tokens per second behind a prompt
  of 128 at batch 1 and 8, transformers by its own cached step in a plain loop; a
  training step with AdamW. Greedy tokens must be equal.
* size: tokens per second of submodels at a size where weights dominate, over the ratio
  of the bytes that they read per token. 1 is time proportional to bytes. Twice: cut
  before, and cut inside the call.
* draft: a round of drafts by its parts: what the draft reads, what verifying costs by
  width, how many drafts are accepted, and the speed that comes of it.
* memory: what one compiled call needs beside the parent's weights: the parent itself,
  a submodel cut inside the call, a copy of the submodel, masks.
"""

import argparse
import functools
import gc
import json
import os
import pathlib
import sys
import tempfile
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
from elastic_jax import decoding, objectives, train  # noqa: E402
from elastic_jax.curriculum import Stage  # noqa: E402
from elastic_jax.sampling import sampling  # noqa: E402
from elastic_jax.stopping import at_stop, stops  # noqa: E402
from elastic_kernels.timing import alternate  # noqa: E402

PROMPT, READ, NEW = 128, 512, 64
BARS = {
    "first token of 512": 2.0,
    "decode, batch 1": 3.0,
    "decode, batch 8": 1.5,
    "training step": 1.2,
}
PROPORTIONAL = 0.85


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=PARTS, action="append")
    options = parser.parse_args()
    found = {}
    for name in options.only or PARTS:
        found[name] = PARTS[name](options.rounds)
        jax.clear_caches()
        gc.collect()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


# ---------------------------------------------------------------------------- peer


def peer(rounds: int) -> dict[str, float]:
    """Our speed over that of transformers, on the same weights."""
    import torch

    torch.set_num_threads(1)
    cfg = model("MEM*EMEM*EME", vocab=4096)
    params = weights(cfg)
    theirs = exported(params, cfg)
    total = ej.cost(ej.param_specs(cfg), cfg).total_params
    print(f"{total:,} parameters, pattern {cfg.pattern}")
    tokens = np.random.default_rng(0).integers(0, cfg.vocab, (8, READ))
    found = {"first token of 512": first_token(params, cfg, theirs, tokens, rounds)}
    for rows in (1, 8):
        name = f"decode, batch {rows}"
        prompts = tokens[:rows, :PROMPT]
        found[name] = decode(params, cfg, theirs, prompts, rounds)
    found["training step"] = training(params, cfg, theirs, tokens, rounds)
    print(f"\n{'over transformers':<22}{'measured':>10}{'bar':>8}")
    for name, ratio in found.items():
        verdict = "" if ratio >= BARS[name] else "  missed"
        print(f"{name:<22}{ratio:>10.2f}{BARS[name]:>8.2f}{verdict}")
    return found


def exported(params, cfg):
    """The same weights in transformers."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "model"
        ej.to_hf(path, params, cfg)
        found = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32
        )
    for module in found.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return found.eval()


def first_token(params, cfg, theirs, tokens, rounds: int) -> float:
    import torch

    text = torch.tensor(tokens[:1])

    @torch.inference_mode()
    def there():
        out = theirs(input_ids=text, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    def here():
        return int(ej.generate(params, tokens[:1], cfg, max_new_tokens=1).tokens[0, 0])

    assert there() == here(), "the first tokens differ"
    return compared(here, there, rounds)


def decode(params, cfg, theirs, prompts, rounds: int) -> float:
    """Seconds behind the prompt alone, on both sides."""
    import torch

    text, spent = torch.tensor(prompts), {}

    @torch.inference_mode()
    def there():
        out = theirs(input_ids=text, use_cache=True, logits_to_keep=1)
        token, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        written, start = [token], time.process_time()
        for _ in range(NEW - 1):
            out = theirs(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            written.append(token)
        spent.setdefault("there", []).append(time.process_time() - start)
        return torch.cat(written, 1).numpy()

    def here():
        written, seconds = writing(params, prompts, decoding.Submodel(cfg))
        spent.setdefault("here", []).append(seconds)
        return np.asarray(written.tokens[:, :NEW])

    equal = (here() == there()).mean()
    assert equal == 1, f"only {equal:.1%} of the greedy tokens are equal"
    spent.clear()
    for _ in range(rounds):
        here(), there()
    rate = {name: min(seconds) for name, seconds in spent.items()}
    rate["there"] *= NEW / (NEW - 1)  # its first token came with the prompt
    for name, seconds in rate.items():
        speed = len(prompts) * NEW / seconds
        print(f"decode {len(prompts)} {name}: {speed:8.1f} tok/s")
    return rate["there"] / rate["here"]


def training(params, cfg, theirs, tokens, rounds: int) -> float:
    """Cross entropy, its gradient and an update with AdamW, at batch 2 of 512."""
    import torch

    theirs = theirs.train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-5, betas=(0.9, 0.98))
    text = torch.tensor(tokens[:2])

    def there():
        logits = theirs(input_ids=text, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, cfg.vocab), text[:, 1:].reshape(-1)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    stage = Stage("bench", READ, 2, 2, 1e-5, steps=1)
    objective = objectives.language_objective(cfg, stage)
    transformation = train.optimizer(ej.param_specs(cfg))
    state = [train.init_state(params, transformation)]
    batch = {
        "tokens": tokens[:2].astype(np.int32),
        "targets": np.roll(tokens[:2], -1, axis=1).astype(np.int32),
        "segment_ids": np.ones((2, READ), np.int32),
        "weights": np.ones((2, READ), np.float32),
    }
    batch["weights"][:, -1] = 0
    rates = {"rate/params": 1e-5, "rate/router": 0.0}

    def here():
        gradients, losses = objective.gradients(state[0], batch, 0)
        state[0], _ = train.update(transformation, state[0], gradients, rates, True)
        return losses[0][1]

    ours, other = here(), there()
    assert abs(ours - other) < 1e-3 * other, (ours, other)
    return compared(here, there, rounds)


def compared(here, there, rounds: int) -> float:
    times = alternate({"here": here, "transformers": there}, rounds=rounds)
    for name, timing in times.items():
        low, middle = 1e3 * timing.min_seconds, 1e3 * timing.median_seconds
        print(f"{name:<14} min {low:8.1f} ms   median {middle:8.1f} ms")
    return times["transformers"].min_seconds / times["here"].min_seconds


# ---------------------------------------------------------------------------- size


def size(rounds: int) -> dict[str, dict[str, float]]:
    """Speed over what the bytes read per token promise, by submodel.

    The submodel is a copy that was cut before, or is cut inside the call of `NEW`
    tokens, which then pays for a copy of its own.
    """
    cfg = large()
    specs, params = ej.param_specs(cfg), weights(cfg)
    whole = read_bytes(specs, cfg, ej.counts(cfg))
    print(f"\nparent: {whole / 2**20:.0f} MiB read per token, float32, batch 1")
    prompt = np.random.default_rng(0).integers(0, cfg.vocab, (1, 16))
    cut = jax.jit(ej.slice_params, static_argnums=(1, 2))
    runs = {}
    for name, counts in CUTS.items():
        kept = ej.counts(cfg, **counts)
        copy = decoding.Submodel(ej.slice_config(cfg, kept))
        runs[name, "copy"] = cut(params, specs, kept), prompt, copy
        runs[name, "inside"] = params, prompt, decoding.Submodel(cfg, kept)
    spent: dict = {key: [] for key in runs}
    for _ in range(rounds + 1):
        for key, given in runs.items():
            spent[key].append(writing(*given)[1])
    best = {key: min(seconds[1:]) for key, seconds in spent.items()}
    print(f"{'':<15}{'bytes':>8}{'ms/token':>10}{'of ideal':>10}{'inside':>10}{'':>10}")
    found = {}
    for name, counts in CUTS.items():
        share = read_bytes(specs, cfg, ej.counts(cfg, **counts)) / whole
        row = f"{name:<15}{share:>8.2f}"
        found[name] = {}
        for mode in ("copy", "inside"):
            seconds = best[name, mode]
            found[name][mode] = best["parent", "copy"] / seconds * share
            row += f"{1e3 * seconds / NEW:>10.2f}{found[name][mode]:>10.2f}"
        print(row + ("" if found[name]["copy"] >= PROPORTIONAL else "  missed"))
    return found


def read_bytes(specs, cfg, counts) -> int:
    """Bytes of weights that one token reads: of the embedding, one row."""
    cost = ej.cost(specs, cfg, counts=counts)
    embed = ej.slice_config(cfg, counts).embed
    return 4 * (cost.active_params - (cfg.vocab - 1) * embed)


CUTS = {
    "parent": {},
    "three fourths": {"embed": 768, "expert_ffn": 1536, "shared_ffn": 1536},
    "half": {"embed": 512, "heads_per_group": 3},
    "quarter": {
        "embed": 512,
        "heads_per_group": 2,
        "expert_ffn": 1024,
        "shared_ffn": 1024,
    },
}


# --------------------------------------------------------------------------- draft


def draft(rounds: int) -> dict[str, dict]:
    """The parts of a round with drafts, and what comes of them."""
    cfg = large()
    specs, params = ej.param_specs(cfg), weights(cfg)
    counts = ej.counts(cfg, embed=256, heads_per_group=1, expert_ffn=512)
    whole = read_bytes(specs, cfg, ej.counts(cfg))
    share = read_bytes(specs, cfg, counts) / whole
    prompt = np.random.default_rng(0).integers(0, cfg.vocab, (1, 16))
    step = jax.jit(lambda p, x, cache: ej.extend(p, x, cache, cfg, tentative=True)[0])
    cache = ej.init_cache(cfg, 1, 128)
    widths = (1, 2, 4, 8)
    texts = {k: jnp.asarray(prompt[:, :k], jnp.int32) for k in widths}
    times = alternate(
        {str(k): lambda k=k: step(params, texts[k], cache) for k in widths},
        rounds=rounds,
    )
    verify = {k: times[str(k)].min_seconds / times["1"].min_seconds for k in widths}
    print(f"\ndraft reads {share:.2f} of the parent's bytes per token")
    for k, ratio in verify.items():
        print(f"verifying {k} tokens costs {ratio:.2f} of reading one")
    found = {"draft_share": share, "verify": verify, "speed": {}}
    plain = speed(params, prompt, cfg, rounds)
    drafts = {"untrained draft": counts, "perfect draft": ej.counts(cfg)}
    for name, who in drafts.items():
        for k in (1, 3):
            drafter = decoding.Draft(decoding.Submodel(cfg, who), k)
            seconds, accepted = speed(params, prompt, cfg, rounds, drafter)
            found["speed"][f"{name}, {k}"] = plain[0] / seconds
            print(
                f"{name}, {k} tokens at a time: {accepted:.0%} accepted, "
                f"{plain[0] / seconds:.2f} of the speed without"
            )
    return found


def speed(params, prompt, cfg, rounds: int, draft=None) -> tuple[float, float]:
    """Seconds for `NEW` tokens, and the share of drafts that were accepted."""
    spent = []
    for _ in range(rounds + 1):
        written, seconds = writing(params, prompt, decoding.Submodel(cfg), draft)
        spent.append(seconds)
    calls = float(written.rounds[0])
    drafted = calls * draft.tokens if draft else 1
    return min(spent[1:]), (NEW - calls) / drafted


# -------------------------------------------------------------------------- memory


def memory(rounds: int) -> dict[str, float]:
    """MiB that a call of `decode` needs beside the parent's weights, as compiled."""
    cfg = large()
    specs = ej.param_specs(cfg)
    params = jax.eval_shape(lambda: ej.init_params(jax.random.key(0), cfg))
    counts = ej.counts(cfg, **CUTS["half"])
    masks = jax.eval_shape(lambda: ej.masks_from_counts(cfg, counts))
    small_cfg = ej.slice_config(cfg, counts)
    small = jax.eval_shape(lambda p: ej.slice_params(p, specs, counts), params)
    whole, part = (
        sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
        for tree in (params, small)
    )
    parent, cut, copied = (
        decoding.Submodel(*which) for which in ((cfg,), (cfg, counts), (small_cfg,))
    )
    cases = {
        "parent": (params, parent, None, 0),
        "submodel, cut inside the call": (params, cut, None, 0),
        "submodel, a copy kept beside": (small, copied, None, part),
        "submodel, masks on the parent": (params, parent, masks, 0),
    }
    print(f"\nweights: parent {whole / 2**20:.0f} MiB, submodel {part / 2**20:.0f} MiB")
    print(f"{'MiB beside the weights':<34}{'kept':>8}{'in a call':>11}")
    found = {}
    for name, (weights, submodel, masks, kept) in cases.items():
        call = called(weights, submodel, masks)
        found[name] = {"kept": kept / 2**20, "call": call / 2**20}
        print(f"{name:<34}{kept / 2**20:>8.0f}{call / 2**20:>11.0f}")
    return found


def called(params, submodel, masks) -> int:
    """Bytes of temporaries of one call that writes at batch 1 in a cache of 128."""
    cache = jax.eval_shape(lambda: ej.init_cache(submodel.cut_cfg, 1, 128))
    row = jax.ShapeDtypeStruct((1,), jnp.int32)
    asked = decoding.Asked(sampling(1), row, row, stops(submodel.cfg.vocab), row)
    compiled = decoding._write.lower(
        params,
        decoding.Text(cache, row),
        asked,
        masks,
        np.int32(0),
        submodel=submodel,
        capacity=128,
        rule=at_stop,
        draft=None,
        heard=False,
        keep_logits=False,
    ).compile()
    return compiled.memory_analysis().temp_size_in_bytes


# -------------------------------------------------------------------------- writing


def writing(params, prompts, submodel, draft=None) -> tuple[decoding.Written, float]:
    """`NEW` tokens behind every prompt; the processor seconds without the prompts."""
    rows, time_ = prompts.shape
    capacity = decoding.length_bucket(time_ + NEW)
    reading = functools.partial(
        decoding.read, params, prompts, np.full(rows, time_), capacity=capacity
    )
    text = reading(submodel=submodel)
    if draft is not None:
        text = text._replace(drafter=reading(submodel=draft.submodel).cache)
    jax.block_until_ready(text)
    nothing, ending = jnp.zeros(rows, jnp.int32), stops(submodel.cfg.vocab)
    asked = decoding.Asked(sampling(rows), nothing + NEW, nothing, ending, nothing)
    options = {"submodel": submodel, "capacity": capacity, "rule": at_stop}
    start = time.process_time()
    written, _ = decoding.write(params, text, asked, draft=draft, **options)
    return written, time.process_time() - start


# --------------------------------------------------------------------------- models


def model(pattern: str, **sizes) -> ej.ModelConfig:
    """About 10 million parameters at 12 blocks, as transformers builds them too."""
    given = dict(
        pattern=pattern, vocab=512, embed=256, ssm_groups=2, heads_per_group=4,
        ssm_head_dim=64, ssm_state=64, kv_heads=2, q_per_kv=4, head_dim=32, experts=16,
        expert_ffn=160, shared_ffn=160, ffn=512, top_k=2, routed_scaling_factor=2.5,
    )  # fmt: skip
    return ej.ModelConfig(**(given | sizes))


def large() -> ej.ModelConfig:
    """A model whose weights are far larger than any cache of a processor."""
    return ej.ModelConfig(
        pattern="MEM*ME", vocab=2048, embed=1024, ssm_groups=2, heads_per_group=4,
        ssm_head_dim=256, ssm_state=128, kv_heads=2, q_per_kv=4, head_dim=128,
        experts=8, expert_ffn=2048, shared_ffn=2048, ffn=4096, top_k=2,
        routed_scaling_factor=2.5,
    )  # fmt: skip


def weights(cfg: ej.ModelConfig):
    return jax.jit(ej.init_params, static_argnums=1)(jax.random.key(0), cfg)


PARTS = {"peer": peer, "size": size, "draft": draft, "memory": memory}

if __name__ == "__main__":
    main()
