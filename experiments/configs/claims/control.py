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
    config.claim = {"seeds": 3}
    config.save_every = 500
    config.parent_training.steps = 900
    for name, steps in {"short": 60, "long": 60, "mixed": 160}.items():
        config.stages[name].update({"steps": steps})
    config.control.update(
        {"caps": (18, 31), "stages": ("long", "mixed"), "problems": 512}
    )
    config.when_smoke.update({"claim": {"seeds": 2}, "save_every": 500})
    config.when_smoke.stages.update(
        {name: dict(base.SMOKE_STAGE) for name in config.stages.names}
    )
    return config
