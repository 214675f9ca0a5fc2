"""The whole story on a laptop: parent, scores, nested training, slices, report.

    python experiments/run.py --config=experiments/configs/tiny.py --workdir=DIR

Hardware: 2 CPU cores. The measured minutes and numbers are in the README.
"""

from experiments.configs import base


def get_config():
    config = base.get_config()
    config.when_smoke.update(
        {
            "model": {"pattern": "ME*"},
            "log_every": 2,
            "parent_training": {
                "steps": 6,
                "batch": 8,
                "micro_batch": 8,
                "warmup_steps": 2,
                "floor": 0.0,
                "check_every": 6,
                "examples": 16,  # as many as evaluated: one shape, one compilation
            },
            "calibration": {"rows": 16, "batch": 8},
            "orders": {"axes": ("expert_ffn",), "random": 1, "rows": 8},
            "router": {"fit_first": 300},
            "budgets": {"names": ("full", "small"), "targets": (1.0, 0.58)},
            "stages": {
                "short": {"steps": 6, "batch": 8, "micro_batch": 4, "warmup_steps": 2},
                "long": {
                    "steps": 4,
                    "context": 96,
                    "batch": 8,
                    "micro_batch": 4,
                    "warmup_steps": 2,
                    "sampling": (1.0, 1.0),
                },
            },
            "evaluation": {"examples": 16},
        }
    )
    return config
