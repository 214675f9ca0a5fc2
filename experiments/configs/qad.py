"""One quantized nested checkpoint, before and after nested distillation.

    python experiments/run.py --config=experiments/configs/qad.py --workdir=DIR

Toy models forgive a lot: with the layers of the Nano v3 recipe in NVFP4, problems of 2
to 8 steps lose half a point. So everything that enters a product is rounded here,
attention, router and head too, weights and activations; problems are long, and budgets
so small that nested training leaves them nothing to spare.
"""

from experiments.configs import base


def get_config():
    config = base.get_config()
    config.title = "Nested quantization on a synthetic reasoning task"
    config.controls = "none"
    config.save_every = 200
    config.parent_training.update(
        {"steps": 1400, "max_steps": 10, "target": 0.98, "floor": 0.9}
    )
    config.orders.update({"axes": ("embed",), "random": 2, "rows": 32})
    config.elastic.update({"expert_ffn": (64, 32, 16), "shared_ffn": (64, 32, 16)})
    config.router.fit_first = 300
    config.budgets.update({"targets": (1.0, 0.55, 0.31)})
    stage = {"context": 96, "max_steps": 10}
    config.stages.short.update(stage | {"steps": 150})
    config.stages.long.update(stage | {"steps": 100, "sampling": ()})
    config.evaluation.update(
        {"examples": 256, "min_steps": 6, "max_steps": 10, "context": 96}
    )
    config.quantization.update(
        {
            "arms": ("fp8_ptq", "nvfp4_ptq", "nvfp4_qad", "nvfp4_qat"),
            "rules": (("*", "arm"),),
            "seeds": 3,
        }
    )
    config.quantization.stage.update(stage)
    smoke_stage = {"batch": 4, "micro_batch": 2, "warmup_steps": 1}
    config.when_smoke.update(
        {
            "model": {"pattern": "ME"},
            "log_every": 2,
            "parent_training": {
                "steps": 4,
                "batch": 4,
                "micro_batch": 4,
                "warmup_steps": 2,
                "floor": 0.0,
                "check_every": 4,
                "examples": 8,
            },
            "calibration": {"rows": 8, "batch": 8},
            "orders": {"random": 1, "rows": 8},
            "router": {"fit_first": 300},
            "budgets": {"names": ("full", "small"), "targets": (1.0, 0.55)},
            "stages": {
                "short": smoke_stage | {"steps": 3},
                "long": smoke_stage | {"steps": 2},
            },
            "evaluation": {"examples": 8},
            "quantization": {
                "arms": ("nvfp4_ptq", "nvfp4_qad", "nvfp4_qat"),
                "seeds": 2,
                "stage": smoke_stage | {"steps": 2},
            },
        }
    )
    return config
