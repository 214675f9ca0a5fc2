"""Every field an experiment has, with its default. A config file changes some.

Budgets are fractions of the parent's cost, largest first. `stages.names` is the order
of the stages; each has a group of its own. `when_smoke` is laid over the rest by
`--config.smoke=True`.
"""

from ml_collections import config_dict


def training(**changes):
    """Fields as of `elastic_jax.curriculum.Stage`; `min_steps` and `max_steps` are the
    length of chains, with `data.source="reasoning"` only."""
    fields = {
        "steps": 300,
        "context": 96,
        "batch": 32,
        "micro_batch": 16,
        "learning_rate": 1e-3,
        "warmup_steps": 20,
        "final_learning_rate": 0.1,
        "min_steps": 2,
        "max_steps": 6,
    }
    return config_dict.create(**(fields | changes))


def stage(**changes):
    """A stage of elastic training: one that has budgets and a router."""
    fields = {
        "sampling": (),  # () is uniform
        "router": "train",
        "router_learning_rate": 1e-2,
        "budget_loss_weight": 10.0,
        "mixed_prefixes": 0.0,  # with router="frozen" only
    }
    return training(**(fields | changes))


def get_config():
    config = config_dict.ConfigDict()
    config.title = "Star Elastic on a synthetic reasoning task"
    config.seed = 0
    config.smoke = False
    config.save_every = 100
    config.log_every = 10
    config.on_nonfinite = "stop"

    # Problems that are generated ("reasoning"), or text or tokens in "files": paths and
    # patterns, mixed with `weights` (none: as much of each as there is). A tokenizer is
    # a tokenizer.json; none takes bytes. `held_out` is the share of documents that is
    # never trained on: half of it for calibration, half for evaluation.
    config.data = config_dict.create(
        source="reasoning", files=(), weights=(), tokenizer="", held_out=0.02
    )
    config.modulus = 11  # of the reasoning task
    config.code_values = 1  # that an answer encodes; more make answers the harder part

    # A Hugging Face directory to import; "" trains a toy of the sizes in `model`, which
    # an imported parent does not use.
    config.parent = ""
    config.model = config_dict.create(
        pattern="MEM*ME",
        vocab=64,
        embed=96,
        ssm_groups=1,
        heads_per_group=8,
        ssm_head_dim=16,
        ssm_state=32,
        conv_width=4,
        kv_heads=2,
        q_per_kv=2,
        head_dim=16,
        experts=8,
        expert_ffn=64,
        shared_ffn=64,
        ffn=128,
        top_k=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.5,
        norm_eps=1e-5,
    )
    # Of the toy; an imported parent is calibrated with its context and chains.
    config.parent_training = training(
        steps=800, learning_rate=6e-3, warmup_steps=30, max_steps=8
    )
    config.parent_training.weight_decay = 0.5  # lets units that are not needed fade
    config.parent_training.target = 0.98  # ends training, in the measure of the data
    config.parent_training.floor = 0.95  # a parent that is worse fails the run
    config.parent_training.check_every = 100
    config.parent_training.examples = 256  # problems to check it by; rows: evaluation's

    config.calibration = config_dict.create(rows=128, batch=32)
    config.orders = config_dict.create(axes=(), random=5, rows=64)  # () is all

    config.elastic = config_dict.create(
        embed=(96, 80, 64, 48),
        heads_per_group=(8, 7, 6, 5, 4),
        expert_ffn=(64, 48, 32, 16),
        shared_ffn=(64, 48, 32, 16),
        per_layer=(),
    )
    config.router = config_dict.create(fit_first=0, hard_probability=0.004)
    config.budgets = config_dict.create(
        kind="active_params", names=("full", "mid", "small"), targets=(1.0, 0.78, 0.58)
    )
    # With budgets.kind="latency_seconds", targets are shares of the parent's latency on
    # this device, or "12ms". The table is measured once per workdir. `phase` is one
    # "prefill" of the prompt, one token of "decode", or an "answer" of `new_tokens`.
    config.latency = config_dict.create(
        phase="answer", batch=1, prompt=64, new_tokens=64, repeats=5
    )
    config.stages = config_dict.create(
        names=("short", "long"),
        short=stage(),
        long=stage(
            steps=200,
            router="frozen",
            context=128,
            max_steps=8,
            sampling=(5.0, 3.0, 2.0),
        ),
    )
    # `examples` are problems to answer, or rows of held-out text to read.
    config.evaluation = config_dict.create(
        examples=512, min_steps=2, max_steps=8, context=128
    )
    # One of `budgets`, large and small, thinks and one answers: exact answers against
    # measured seconds, for thoughts of at most `caps` tokens, and `grace` more to end a
    # line. No caps, no measurement. Weights are those at the end of `stages`; seconds
    # are taken, as the median of `repeats`, with the last. Every seed but the first
    # trains all stages anew.
    config.control = config_dict.create(
        caps=(),
        budgets=("full", "small"),
        hand_overs=("reprefill", "transplant"),
        stages=("long",),
        seeds=1,
        problems=256,
        repeats=3,
        grace=3,
        max_answer=6,
    )
    # The nested checkpoint, quantized: by rounding alone ("ptq"), after distillation
    # from itself ("qad"), or after training on the data ("qat"). No arms, no
    # quantization. `rules` are (pattern, format) on top of the Nano v3 recipe, see
    # `elastic_jax.quantize`; the format "arm" is that of the arm. Without `activations`
    # weights alone are rounded. Every seed but the first trains all stages anew.
    config.quantization = config_dict.create(
        arms=(),  # of "fp8_ptq", "nvfp4_ptq", "nvfp4_qad", "nvfp4_qat", ...
        rules=(),
        block_scale="max",
        activations=True,
        scales="recomputed",
        teacher="same_budget",
        seeds=1,
        stage=stage(
            steps=100,
            router="frozen",
            context=128,
            max_steps=8,
            learning_rate=3e-4,
            warmup_steps=10,
        ),
    )
    config.controls = "one"
    config.when_smoke = config_dict.ConfigDict()
    return config
