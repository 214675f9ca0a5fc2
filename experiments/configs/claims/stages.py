"""Two stages: short problems first, then long ones, or short ones for as long.

    python experiments/claims.py --claim=stages --workdir=DIR

All arms go on from the weights at the end of one short stage, with equal numbers of
tokens: more short problems, long ones with all budgets equally often, or long ones
with the published weights, which favour the full model.
"""

from experiments.configs.base import stage
from experiments.configs.claims import base


def get_config():
    config = base.get_config("Two stages", seeds=4)
    short = {"steps": 100, "context": 48, "batch": 32, "micro_batch": 16}
    config.stages.names = ("short", "more", "uniform", "weighted")
    config.stages.short.update(short | {"max_steps": 4})
    config.stages.more = _stage(**short, max_steps=4)
    long = {"steps": 100, "context": 96, "batch": 16, "micro_batch": 8}
    config.stages.uniform = _stage(**long, max_steps=8)
    config.stages.weighted = _stage(**long, max_steps=8, sampling=(0.5, 0.3, 0.2))
    config.when_smoke.stages = {
        name: dict(base.SMOKE_STAGE) for name in config.stages.names
    }
    config.when_smoke.stages.weighted.sampling = (0.7, 0.3)
    return config


def _stage(**changes):
    return stage(router="frozen", **changes)
