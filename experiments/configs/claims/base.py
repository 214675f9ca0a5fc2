"""What the claims share: parents, batches that two cores take in a blink, seeds.

A claim's config has a group `claim`: how many `seeds`, whether each has a parent of its
own, and what its arms need beside the fields of every experiment. Claims whose parents
are alike train them between them.
"""

from experiments.configs import base

CLAIM = {"seeds": 3, "own_parents": True}  # where a claim says nothing else
# Of a smoke run: everything works, and no number means anything.
SMOKE_STAGE = {"steps": 3, "batch": 4, "micro_batch": 2, "warmup_steps": 1}


def get_config(title: str, **claim):
    """The shared fields; `claim` fills the group of that name."""
    config = base.get_config()
    config.title = title
    config.controls = "none"
    config.save_every = 500
    config.claim = CLAIM | claim
    # Three sizes with room between them, and no axis that the budgets cannot steer.
    config.elastic.update(
        {
            "embed": (96, 80, 64, 48),
            "heads_per_group": (8, 6, 4),
            "expert_ffn": (64, 48, 32),
            "shared_ffn": (64, 48, 32),
        }
    )
    config.budgets.targets = (1.0, 0.62, 0.33)
    config.router.fit_first = 300
    config.evaluation.examples = 1024
    config.stages.names = ("short",)
    config.stages.short.update(
        {"steps": 150, "batch": 16, "micro_batch": 8, "max_steps": 8}
    )
    config.when_smoke.update(
        {
            "model": {"pattern": "ME"},
            "log_every": 1,
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
            "orders": {"random": 2, "rows": 8},
            "budgets": {"names": ("full", "small"), "targets": (1.0, 0.58)},
            "stages": {"short": dict(SMOKE_STAGE)},
            "evaluation": {"examples": 8},
            "claim": {"seeds": 2},
        }
    )
    return config
