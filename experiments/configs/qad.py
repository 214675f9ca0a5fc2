"""One quantized nested checkpoint, before and after nested distillation.

    python experiments/run.py --config=experiments/configs/qad.py --workdir=DIR

Toy models forgive a lot: with the layers of the Nano v3 recipe in NVFP4, the tiny run's
budgets lose half a point on problems of 2 to 8 steps. So everything that enters a
product is rounded here, attention, router and head too, weights and activations; and
only the longest problems of the training are asked, where every step can go wrong.

Hardware: 2 CPU cores, shared with much other work: 27 min for the arms of three seeds,
6 min for the nested trainings, with Python 3.11.7 and JAX 0.10.2. The README has the
table.
"""

from experiments.configs import base


def get_config():
    config = base.get_config()
    config.title = "Nested quantization on a synthetic reasoning task"
    config.controls = "none"
    config.save_every = 200
    config.orders.update({"axes": ("embed",), "random": 2, "rows": 32})
    config.stages.short.update({"steps": 100})
    config.stages.long.update({"steps": 60, "context": 96, "sampling": ()})
    config.router.fit_first = 300
    config.evaluation.update({"examples": 384, "min_steps": 7})
    config.quantization.update(
        {
            "arms": ("fp8_ptq", "nvfp4_ptq", "nvfp4_qad", "nvfp4_qat"),
            "rules": (("*", "arm"),),
            "seeds": 3,
        }
    )
    config.quantization.stage.update({"steps": 200, "context": 96})
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
