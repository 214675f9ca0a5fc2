"""The claims of the method in words: what was published, what a toy can say of it."""

from elastic_jax.claims import compression, control, training
from elastic_jax.claims.claim import Claim, answers, answers_by_length

TOY = (
    "A hybrid of 389 thousand parameters on generated arithmetic; seeds are of nested "
    "training, all from one parent."
)
ANSWERS = "problems answered exactly"
CLAIMS = {  # the cheap ones first
    "memory": Claim(
        "Memory",
        "One nested checkpoint takes the place of separate ones.",
        "58.9 for one nested checkpoint against 126.1 for three separate ones in BF16; "
        "31.4 in FP8 and 18.7 in NVFP4 (Star Elastic; the unit is GiB).",
        "The toy's bytes are of files, chunks and metadata included; Nano's are "
        "computed from its shapes. All are shares of the separate checkpoints in BF16.",
        "",
        "percent",
        "bytes, of the separate checkpoints in BF16",
        compression.memory,
        compression.bytes,
    ),
    "nested": Claim(
        "One nested run against separate runs",
        "One run trains a whole family, for a fraction of what separate runs take.",
        "7 times fewer tokens than sequential compression, 360 times fewer than "
        "pretraining each (Star Elastic).",
        f"{TOY} Work counts active parameters times tokens, a backward pass as two; "
        "the full size is distilled separately too.",
        "",
        "percent",
        ANSWERS,
        training.nested,
        answers,
    ),
    "between": Claim(
        "Budgets never trained",
        "What lies between trained budgets can be cut too.",
        "None: the published method extracts trained budgets only (Nemotron Elastic).",
        f"{TOY} The models are those of the claim before.",
        "",
        "percent",
        ANSWERS,
        training.between,
        training.sizes,
    ),
    "router": Claim(
        "A learned router against fixed shapes",
        "A router learns, within one run, shapes that need no search.",
        "No comparison with fixed shapes at equal size was found.",
        f"{TOY} A fixed shape trains slices from the start, the router's arm only "
        "after its stage of soft masks; both take as many steps.",
        "",
        "percent",
        ANSWERS,
        training.router,
        answers,
    ),
    "stages": Claim(
        "Two stages",
        "A second stage with a long context is what long reasoning needs.",
        "AIME-25 after the second stage: 6B 56.9 to 68.1, 9B 68.8 to 75.4, 12B 72.9 to "
        "75.8; weights that favour the full model give the 12B 3.5 points more than "
        "uniform ones (Nemotron Elastic).",
        f"{TOY} All arms go on from the same weights with fresh optimiser states.",
        "",
        "percent",
        ANSWERS,
        training.stages,
        answers_by_length,
    ),
    "experts": Claim(
        "Orders of experts",
        "REAP ranks experts better than chance.",
        "REAP is the published order; no ablation of it was found (Star Elastic).",
        f"{TOY} The lower the better. Half of 8 experts are kept, other axes whole.",
        "",
        "nats",
        "KL from the parent, nats per token",
        compression.experts,
        compression.orders,
    ),
    "quantization": Claim(
        "One quantized nested checkpoint",
        "Nested QAD gives back what NVFP4 loses, at every size, in one checkpoint.",
        "Of BF16, the 30B keeps 98.69% in FP8, 95.88% in NVFP4 by rounding alone and "
        "97.79% after nested QAD (Star Elastic).",
        f"{TOY} Everything that enters a product is rounded, which the released models "
        "do not do.",
        "",
        "percent",
        ANSWERS,
        compression.quantization,
        answers_by_length,
    ),
    "control": Claim(
        "Who thinks and who answers",
        "A small model thinks, a large one answers: better and faster than either.",
        "Up to 16% more accurate and 1.9 times faster than one capped model, 23B to "
        "30B; transplanted caches cost 0.75 points on GSM8K (Star Elastic).",
        f"{TOY} Here answers are made the harder part, and the small model has 31% of "
        "the active parameters. Latency is of two cores.",
        "",
        "percent",
        ANSWERS,
        control.control,
        control.pairs,
    ),
    "depth": Claim(
        "Width against depth",
        "Cutting widths keeps more than dropping blocks.",
        "With 15% fewer parameters and 25B tokens, width keeps 98.1% of the baseline, "
        "depth 95.2% (Star Elastic).",
        f"{TOY} Parents of 6 and of 12 blocks; reported only.",
        "",
        "percent",
        ANSWERS,
        compression.depth,
        compression.by_parent,
    ),
}
