"""One nested checkpoint, quantized: by rounding, after nested QAD, after QAT.

    python experiments/claims.py --claim=quantization --workdir=DIR

What `experiments/quantization.py` measures. Everything that enters a product is
rounded, weights and activations: a toy hardly feels the recipe of the released models.
"""

from experiments.configs.claims import base


def get_config():
    config = base.get_config("One quantized nested checkpoint")
    config.stages.names = ("short", "long")
    config.stages.short.update({"steps": 60})
    config.stages.long.update(
        {"steps": 60, "batch": 16, "micro_batch": 8, "context": 96, "sampling": ()}
    )
    config.budgets.targets = (1.0, 0.78, 0.62)
    config.evaluation.update({"examples": 448, "min_steps": 2, "context": 96})
    config.quantization.update(
        {
            "arms": ("fp8_ptq", "nvfp4_ptq", "nvfp4_qad", "nvfp4_qat"),
            "rules": (("*", "arm"),),
            "seeds": 3,
        }
    )
    config.quantization.stage.update(
        {"steps": 80, "batch": 16, "micro_batch": 8, "context": 96}
    )
    config.when_smoke.update(
        {
            "stages": {
                "short": dict(base.SMOKE_STAGE),
                "long": dict(base.SMOKE_STAGE),
            },
            "quantization": {"stage": dict(base.SMOKE_STAGE), "seeds": 2},
        }
    )
    return config
