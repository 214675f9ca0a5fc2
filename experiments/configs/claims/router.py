"""A learned router against shapes picked by hand, and a random order.

    python experiments/claims.py --claim=router --workdir=DIR

Every arm has sizes of the same active parameters, to 5%, and as many steps. The router
chooses while it trains, under soft masks that harden; the others know their sizes from
the start and train slices.
"""

from experiments.configs.claims import base

AXES = ("embed", "heads_per_group", "expert_ffn", "shared_ffn")
PAIRS = {  # arm -> budget -> sizes in the order of AXES, the same in all blocks
    "narrow": {"mid": (80, 7, 64, 64), "small": (64, 6, 64, 64)},
    "thin": {"mid": (96, 6, 48, 32), "small": (96, 4, 32, 16)},
    "even": {"mid": (80, 8, 48, 48), "small": (80, 5, 32, 48)},
}


def get_config():
    config = base.get_config(
        "A learned router against fixed shapes",
        axes=AXES,
        pairs=PAIRS,
        deadline=250,
    )
    config.elastic.update(
        {
            "heads_per_group": (8, 7, 6, 5, 4),
            "expert_ffn": (64, 48, 32, 16),
            "shared_ffn": (64, 48, 32, 16),
        }
    )
    config.budgets.targets = (1.0, 0.78, 0.58)
    config.router.fit_first = 0
    config.evaluation.examples = 256
    # Eight draws of a budget in every step, and a slow router: one that hurries, or
    # meets one budget at a time, settles before all of them are met.
    config.stages.short.update(
        {"steps": 200, "batch": 8, "micro_batch": 1, "router_learning_rate": 0.004}
    )
    config.when_smoke.update(
        {
            "router": {"fit_first": 300},
            # What the router met before training, three steps do not change.
            "elastic": {"heads_per_group": (8, 4), "expert_ffn": (64, 48, 32)},
            "stages": {"short": base.SMOKE_STAGE | {"router_learning_rate": 1e-5}},
        }
    )
    return config
