"""Orders of experts, before and after training, with and without load balancing.

    python experiments/claims.py --claim=experts --workdir=DIR

Half of the experts are kept. Random orders are one per seed, the others the same for
all of them, as the parents are. A balanced parent was trained with a bias for experts
that do too little.
"""

from experiments.configs.claims import base


def get_config():
    config = base.get_config(
        "Orders of experts", seeds=6, own_parents=False, repeats=2, kept=4
    )
    config.budgets.update({"names": ("full", "small"), "targets": (1.0, 0.62)})
    config.stages.short.update(
        {"steps": 150, "batch": 4, "micro_batch": 4, "sampling": (0.0, 1.0)}
    )
    config.orders.update({"rows": 64})
    config.evaluation.examples = 256
    config.when_smoke.claim.update({"seeds": 2, "repeats": 1})
    return config
