"""The story on real text: the Python standard library's own sources, byte by byte.

    python experiments/run.py --config=experiments/configs/text.py --workdir=DIR

Nothing is downloaded: the text is on every machine that has Python, though not the
same for every version. Documents are whole modules; a tenth of them is held out.

Hardware: 2 CPU cores, shared with other work: 8 min 30 s with Python 3.11.7 and JAX
0.10.2. The parent takes 2 min 25 s of it, elastic training 2 min 50 s, its control
1 min 10 s. Bits per byte of held-out modules, and KL from the parent in nats per token:

                          trained            untrained      random order, trained
    parent                                    2.513
    full                  2.542   0.030       2.513   0      2.537
    mid, 77% active       2.634   0.104       3.155   0.45   2.652
    small, 56% active     2.886   0.269       4.046   1.03   2.919

A parent of 280 thousand active parameters after 400 steps is a poor model of Python:
the numbers say that nested training works on text, not that the text is learned.
"""

import pathlib
import sysconfig

from experiments.configs import base

STDLIB = pathlib.Path(sysconfig.get_paths()["stdlib"])


def get_config():
    config = base.get_config()
    config.title = "Star Elastic on the sources of Python's standard library"
    config.log_every = 10
    config.data.update(
        {"source": "files", "files": (str(STDLIB / "*.py"),), "held_out": 0.1}
    )
    config.model.vocab = 259  # 256 bytes, and what stands around documents
    training = {"context": 128, "batch": 16, "micro_batch": 8, "warmup_steps": 20}
    config.parent_training.update(
        training
        | {
            "steps": 400,
            "learning_rate": 4e-3,
            "weight_decay": 0.1,
            "target": 2.0,  # bits per byte
            "floor": 3.5,
            "check_every": 100,
        }
    )
    main_axes = ("embed", "heads_per_group", "expert_ffn", "shared_ffn")
    config.orders.update({"axes": main_axes, "random": 2})
    config.stages.short.update(training | {"steps": 120})
    config.stages.long.update(training | {"steps": 80})
    config.evaluation.update({"context": 128, "examples": 256})
    stage = {"batch": 4, "micro_batch": 2, "warmup_steps": 2, "context": 64}
    config.when_smoke.update(
        {
            "model": {"pattern": "ME"},
            "log_every": 2,
            "parent_training": {
                "steps": 4,
                "context": 64,
                "batch": 4,
                "micro_batch": 4,
                "warmup_steps": 2,
                "floor": 20.0,
                "check_every": 4,
            },
            "calibration": {"rows": 8, "batch": 8},
            "orders": {"axes": ("expert_ffn",), "random": 1, "rows": 8},
            "router": {"fit_first": 300},
            "budgets": {"names": ("full", "small"), "targets": (1.0, 0.58)},
            "stages": {
                "short": stage | {"steps": 4},
                "long": stage | {"steps": 2, "sampling": (1.0, 1.0)},
            },
            "evaluation": {"examples": 32, "context": 64},
            "controls": "none",
        }
    )
    return config
