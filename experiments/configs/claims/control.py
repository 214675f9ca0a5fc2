"""Who thinks and who answers, before and after prefixes were mixed.

    python experiments/claims.py --claim=control --workdir=DIR

What `experiments/control.py` measures, with its parent and its sizes: see the config
`budget_control` for why answers are the harder part of this task.
"""

from experiments.configs import budget_control
from experiments.configs.claims import base


def get_config():
    config = budget_control.get_config()
    config.title = "Who thinks and who answers"
    config.claim = dict(base.CLAIM)
    config.save_every = 500
    config.parent_training.steps = 900
    config.stages.names = ("short", "mixed")
    each = {"batch": 16, "micro_batch": 8}
    config.stages.short.update(each | {"steps": 100, "sampling": (1.0, 3.0)})
    config.stages.mixed.update(each | {"steps": 280})
    config.control.update(
        {"caps": (18, 31), "stages": ("short", "mixed"), "problems": 512, "repeats": 2}
    )
    config.when_smoke.update({"claim": {"seeds": 2}, "save_every": 500})
    config.when_smoke.control.stages = ("short", "mixed")
    config.when_smoke.stages.update(
        {name: dict(base.SMOKE_STAGE) for name in config.stages.names}
    )
    return config
