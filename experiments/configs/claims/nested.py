"""One nested run against separate runs for every size.

    python experiments/claims.py --claim=nested --workdir=DIR

All runs have the same sizes, which a router finds before any training, the same data
and the same rate. A separate run distils one size alone: with a third of the steps, so
that three of them together see the tokens of the nested one, or with all of them.
"""

from experiments.configs.claims import base


def get_config():
    config = base.get_config("One nested run against separate runs", seeds=4)
    config.stages.short.steps = 240
    return config
