"""The claims of the method in words: what was published, what a toy can say of it."""

from elastic_jax.claims import compression, control, training
from elastic_jax.claims.claim import Claim, answers, answers_by_length

SIZE = "A hybrid of 389 thousand parameters on generated arithmetic"
TOY = f"{SIZE}; every seed has a parent of its own."
ANSWERS = "problems answered exactly"
CLAIMS = {  # the cheap ones first
    "memory": Claim(
        title="Memory",
        statement="One nested checkpoint takes the place of separate ones.",
        published=(
            "58.9 for one nested checkpoint against 126.1 for three separate ones in "
            "BF16; 31.4 in FP8 and 18.7 in NVFP4 (Star Elastic; the unit is GiB)."
        ),
        scope=(
            "The toy's bytes are of files, chunks and metadata included, which are a "
            "little different in every save; Nano's are computed from its shapes. All "
            "are shares of the separate checkpoints in BF16."
        ),
        tried="",
        unit="percent",
        axis="bytes, of the separate checkpoints in BF16",
        findings=compression.memory,
        cells=compression.bytes,
    ),
    "nested": Claim(
        title="One nested run against separate runs",
        statement=(
            "One run trains a whole family, for a fraction of what separate runs take."
        ),
        published=(
            "7 times fewer tokens than sequential compression, 360 times fewer than "
            "pretraining each (Star Elastic)."
        ),
        scope=(
            f"{TOY} Work counts active parameters times tokens, a backward pass as "
            "two; the full size is distilled separately too. 240 steps are few: the "
            "small size is not done."
        ),
        tried=(
            "512 problems first, which left `full` undecided; so 1,024. With one "
            "parent for three seeds nested was ahead of a third by 44.3 points ± 5.7 "
            "and, on another processor with another such parent, by 42.8 ± 2.8; `full` "
            "was above its parent by 0.4 ± 0.8, and below by 0.4 ± 2.0. All that at "
            "150 steps. There, with a parent for every seed, four of them gave 36.6 ± "
            "18.6 and five 30.4 ± 21.4: with one parent the smallest size had hardly "
            "begun to learn. So 240 steps, and the four seeds that ten minutes allow."
        ),
        unit="percent",
        axis=ANSWERS,
        findings=training.nested,
        cells=answers,
    ),
    "between": Claim(
        title="Budgets never trained",
        statement="What lies between trained budgets can be cut too.",
        published=(
            "None: the published method extracts trained budgets only (Nemotron "
            "Elastic)."
        ),
        scope=(
            f"{TOY} The models are those of the claim before. A router that has "
            "learned is sure: its answer to a blend of two budgets is the mean count "
            "of every axis. There are few such answers; other sizes between the same "
            "neighbours fill up."
        ),
        tried="",
        unit="percent",
        axis=ANSWERS,
        findings=training.between,
        cells=training.sizes,
    ),
    "router": Claim(
        title="A learned router against fixed shapes",
        statement="A router learns, within one run, shapes that need no search.",
        published="No comparison with fixed shapes at equal size was found.",
        scope=(
            f"{TOY} A fixed shape trains its slices from the start, the router's arm "
            "under soft masks that harden while it chooses; both take as many steps. "
            "The best fixed shape is the best in hindsight, at each budget."
        ),
        tried=(
            "With one budget drawn per step some budget ended outside its zone in the "
            "first seed, by 2 to 18% of its target, with a weight of the budget loss "
            "of 10, of 50, and of 30 with a slower router; a weight of 30 overshoots. "
            "More draws per step helped most. At the published rate of 0.01 and a "
            "weight of 10 all budgets ended in their zones with four draws in 6 of 6 "
            "seeds at 250 steps, 5 of 5 at 160 and 4 of 6 at 120; with eight in 11 of "
            "12 at 120 steps, 5 of 6 at 130 and 18 of 19 at 160: the choices froze "
            "within 40 of them. A slower router looks longer. With eight draws and a "
            "rate of 0.004 it was 6 of 6 at 160 steps and at 200, ordered and sure by "
            "half; with 0.006 5 of 6 at 200; with 0.0025 6 of 6 at 160, of which two "
            "changed late. A seed whose router misses keeps its choices, and has no "
            "answers."
        ),
        unit="percent",
        axis=ANSWERS,
        findings=training.router,
        cells=answers,
    ),
    "stages": Claim(
        title="Two stages",
        statement="A second stage with a long context is what long reasoning needs.",
        published=(
            "AIME-25 after the second stage: 6B 56.9 to 68.1, 9B 68.8 to 75.4, 12B "
            "72.9 to 75.8; weights that favour the full model give the 12B 3.5 points "
            "more than uniform ones (Nemotron Elastic)."
        ),
        scope=(
            f"{TOY} All arms go on from the same weights with fresh optimiser states. "
            "The parent can answer long problems; a stage of short ones alone makes "
            "even its own size forget them, and the long stage brings that back."
        ),
        tried=(
            "Steps were chosen with one run of one seed on 280 problems. With one "
            "parent for three seeds the long stage was ahead by 86.0 points ± 7.4, "
            "81.8 ± 8.9 and 37.4 ± 7.3, largest budget first, and, on another "
            "processor with another such parent, by 58.6 ± 24.9, 63.9 ± 25.6 and 29.2 "
            "± 6.8; so four seeds, and a parent for each."
        ),
        unit="percent",
        axis=ANSWERS,
        findings=training.stages,
        cells=answers_by_length,
    ),
    "experts": Claim(
        title="Orders of experts",
        statement="REAP ranks experts better than chance.",
        published=(
            "REAP is the published order; no ablation of it was found (Star Elastic)."
        ),
        scope=(
            f"{SIZE}; all seeds start from one parent of each kind. The lower the "
            "better. Half of 8 experts are kept, other axes whole."
        ),
        tried="",
        unit="nats",
        axis="KL from the parent, nats per token",
        findings=compression.experts,
        cells=compression.orders,
    ),
    "quantization": Claim(
        title="One quantized nested checkpoint",
        statement=(
            "Nested QAD gives back what NVFP4 loses, at every size, in one checkpoint."
        ),
        published=(
            "Of BF16, the 30B keeps 98.69% in FP8, 95.88% in NVFP4 by rounding alone "
            "and 97.79% after nested QAD (Star Elastic)."
        ),
        scope=(
            f"{TOY} Everything that enters a product is rounded, which the released "
            "models do not do, and verdicts are of the longest problems that were "
            "trained, where every step can go wrong."
        ),
        tried=(
            "A toy hardly feels NVFP4 once it has learned its task, and before that it "
            "feels FP8 too. Of BF16, in this order, FP8, NVFP4 by rounding and after "
            "QAD kept, all seeds from one parent, 98.9% ± 1.5, 93.4% ± 2.5 and 98.0% ± "
            "1.0 with longer nested training and twice the batch, four seeds; 99.4% ± "
            "1.0, 91.8% ± 2.4 and 98.1% ± 2.1 with some steps more than here and 1,200 "
            "problems, four seeds; 99.2% ± 1.4, 93.0% ± 8.1 and 97.3% ± 2.2 with a "
            "parent trained to 100%, three seeds. With these very sizes and four "
            "seeds, three parents gave 99.3% ± 0.8, 91.1% ± 4.0 and 99.6% ± 1.9; 99.7% "
            "± 0.6, 94.8% ± 5.0 and 100.0% ± 1.6; 99.1% ± 1.0, 93.9% ± 1.3 and 98.2% ± "
            "2.0. So a parent for every seed: four of them left the gap at 71.0% ± "
            "25.7; so six. Other such parents, one seed each, kept 100% and 96.6% by "
            "rounding on chains of up to 8 steps, 98.3% and 94.7% of up to 9, 96.8% "
            "and 52.9% of up to 10. Half or two thirds of the width, no weight decay "
            "or 343 codes moved NVFP4 by a few points at most."
        ),
        unit="percent",
        axis=ANSWERS,
        findings=compression.quantization,
        cells=answers_by_length,
    ),
    "control": Claim(
        title="Who thinks and who answers",
        statement=(
            "A small model thinks, a large one answers: better and faster than either."
        ),
        published=(
            "Up to 16% more accurate and 1.9 times faster than one capped model, 23B "
            "to 30B; transplanted caches cost 0.75 points on GSM8K (Star Elastic)."
        ),
        scope=(
            f"{TOY} Here answers are made the harder part, and the small model has 31% "
            "of the active parameters. Latency is of two cores."
        ),
        tried=(
            "80 steps with mixed prefixes of a batch of 32, one seed and 256 problems "
            "first, which came out next to what was asked. Then three seeds: 1.6 "
            "points ± 3.0 below reading again after 120 steps of mixed prefixes and as "
            "many without; 0.7 ± 0.6 after 160 and 120, in eleven minutes; 1.4 ± 1.0 "
            "after 160 and 70; 1.6 ± 2.6 after 150 and 50. So half of the batch, and "
            "more steps: 0.8 ± 1.7 and 0.2 ± 1.0 with two parents, one for all seeds."
        ),
        unit="percent",
        axis=ANSWERS,
        findings=control.control,
        cells=control.pairs,
        across="measured latency, of L->L with whole thoughts",
    ),
    "depth": Claim(
        title="Width against depth",
        statement="Cutting widths keeps more than dropping blocks.",
        published=(
            "With 15% fewer parameters and 25B tokens, width keeps 98.1% of the "
            "baseline, depth 95.2% (Star Elastic)."
        ),
        scope=(
            f"{TOY} So large is the shallow one, which loses 2 of 6 blocks; the deep "
            "one loses 3 of 8. Reported only."
        ),
        tried=(
            "12 blocks against 6 and 100 steps first, where width was ahead by 3 to 4 "
            "points in the shallow parent and the deep ones were all near the ceiling. "
            "Then 9 blocks, of which 3 were dropped, and 60 steps: width ahead by 4.8 "
            "± 2.2 and 5.0 ± 2.0 points in the deep parent, 5.3 ± 3.4 and 8.7 ± 3.7 in "
            "the shallow one, in twelve minutes; so 8 and 45. Which blocks matter "
            "least is up to the parent. With one of each kind for all seeds width was "
            "ahead, at equal total, by 31.8 ± 3.6 points in a deep one and by 41.7 ± "
            "3.9 in another, and in three shallow ones by 87.4 ± 1.9, 88.3 ± 3.0 and "
            "3.5 ± 3.3."
        ),
        unit="percent",
        axis=ANSWERS,
        findings=compression.depth,
        cells=compression.by_parent,
    ),
}
