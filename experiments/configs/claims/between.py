"""Sizes that were never trained, cut from between those that were.

    python experiments/claims.py --claim=between --workdir=DIR

The models are those of the claim `nested`, which are read back where they are there.
The router is asked for blends of two neighbouring budgets, and each answer is cut.
"""

from experiments.configs.claims import nested


def get_config():
    config = nested.get_config()
    config.title = "Budgets never trained"
    config.claim.update({"trained_in": "nested", "sizes": 16})
    config.when_smoke.claim.sizes = 2
    return config
