"""One nested checkpoint against separate ones, in bytes.

    python experiments/claims.py --claim=memory --workdir=DIR

On disk for the toy, whose weights need no training for this; by accounting for
Nemotron 3 Nano, with the sizes that the README names and the recipe of its quantized
releases.
"""

from experiments.configs.claims import base


def get_config():
    return base.get_config(
        "One nested checkpoint against separate ones",
        family={  # sizes that differ from the parent's
            "30B": {},
            "23B": {"embed": 2016},
            "12B": {"embed": 1920, "expert_ffn": 960},
        },
    )
