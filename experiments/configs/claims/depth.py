"""Width against depth, at equal total and at equal active parameters.

    python experiments/claims.py --claim=depth --workdir=DIR

Of each parent the blocks that matter least are dropped; the other arm keeps all blocks
and is made narrower until it has as many parameters. Each is distilled alone, for as
many steps. The deep parent has a third more blocks than the shallow one.
"""

from experiments.configs.claims import base


def get_config():
    config = base.get_config(
        "Width against depth",
        seeds=4,
        patterns={"shallow": "MEM*ME", "deep": "MEM*MEME"},
        dropped={"shallow": 2, "deep": 3},
        orders=("equal_total", "equal_active"),
    )
    config.elastic.update(
        {
            "heads_per_group": (8, 7, 6, 5, 4),
            "expert_ffn": (64, 48, 32, 16),
            "shared_ffn": (64, 48, 32, 16),
        }
    )
    config.budgets.update({"names": ("full", "small"), "targets": (1.0, 0.62)})
    config.stages.short.update({"steps": 45, "sampling": (0.0, 1.0)})
    config.evaluation.examples = 512
    config.when_smoke.claim.update(
        {
            "patterns": {"shallow": "ME", "deep": "MEME"},
            "dropped": {"shallow": 1, "deep": 2},
        }
    )
    return config
