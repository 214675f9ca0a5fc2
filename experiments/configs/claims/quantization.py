"""One nested checkpoint, quantized: by rounding, after nested QAD, after QAT.

    python experiments/claims.py --claim=quantization --workdir=DIR

What `experiments/quantization.py` measures, with fewer steps. Everything that enters a
product is rounded, weights and activations, and only the longest problems of the
training are asked: a toy hardly feels anything less.
"""

from experiments.configs.claims import base


def get_config():
    config = base.get_config("One quantized nested checkpoint", seeds=6)
    each = {"batch": 16, "micro_batch": 8, "context": 96}
    config.stages.names = ("short", "long")
    config.stages.short.update(each | {"steps": 40, "max_steps": 6})
    config.stages.long.update(each | {"steps": 60, "max_steps": 8, "sampling": ()})
    # One combination alone meets the small target: all seeds have the same sizes, and
    # what was compiled for one serves the others.
    config.elastic.update(
        {
            "embed": (96, 80),
            "heads_per_group": (8, 6),
            "expert_ffn": (64, 48),
            "shared_ffn": (64, 32),
        }
    )
    config.budgets.update({"names": ("full", "small"), "targets": (1.0, 0.65)})
    config.evaluation.update({"examples": 1600, "min_steps": 7, "context": 96})
    config.quantization.update(
        {
            "arms": ("fp8_ptq", "nvfp4_ptq", "nvfp4_qad", "nvfp4_qat"),
            "rules": (("*", "arm"),),
        }
    )
    config.quantization.stage.update(each | {"steps": 90, "max_steps": 8})
    config.when_smoke.update(
        {
            "stages": {
                "short": dict(base.SMOKE_STAGE),
                "long": dict(base.SMOKE_STAGE),
            },
            "quantization": {"stage": dict(base.SMOKE_STAGE)},
            "budgets": {"targets": (1.0, 0.65)},
        }
    )
    return config
