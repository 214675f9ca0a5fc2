"""Claims about what is dropped or rounded: bytes, formats, experts, blocks."""

import statistics
from collections.abc import Iterator, Sequence

from elastic_jax import fronts
from elastic_jax.claims.claim import (
    ASKED,
    BETTER,
    Cell,
    Rows,
    arms_of,
    budgets_of,
    longest,
)
from elastic_jax.verdicts import (
    Estimate,
    Finding,
    Row,
    accuracy,
    closed,
    difference,
    exactly,
    of_seeds,
    ratio,
    right,
)

# -------------------------------------------------------------------------- memory

# GiB of Nemotron 3 Nano, where the published figure stands for the same thing.
PUBLISHED_GIB = {"bf16": 58.9, "fp8": 31.4, "nvfp4": 18.7}
PUBLISHED_SEPARATE_GIB = 126.1
TOY = "toy"  # saved, each time a little otherwise; the others are accounted


def memory(rows: Rows) -> Iterator[Finding]:
    for arm, found in _by_arm(rows):
        apart = found[0]["separate"]
        if arm != TOY:
            each = {
                f"one nested checkpoint, {format.upper()}": (n, PUBLISHED_GIB[format])
                for format, n in found[0]["nested"].items()
            }
            whole = sum(apart.values()), PUBLISHED_SEPARATE_GIB
            each[f"{len(apart)} separate ones, BF16"] = whole
            for what, (n, published) in each.items():
                yield Finding(
                    f"{arm}: {what} (published {published})",
                    exactly(n / 2**30),
                    unit="GiB",
                )
        yield Finding(
            f"{arm}: one nested checkpoint / {len(apart)} separate ones, BF16",
            _of_saves(arm, [each["nested"]["bf16"] for each in found], found),
            unit="ratio",
            lesson=(
                f"{arm}: all sizes in one checkpoint take [more|less|no clearly less] "
                "room than in checkpoints of their own."
            ),
        )


def bytes(rows: Rows) -> Iterator[Cell]:
    for arm, found in _by_arm(rows):
        each = {
            f"{kind}, {name}": [one[kind][name] for one in found]
            for kind in ("nested", "separate")
            for name in found[0][kind]
        }
        each["separate, all"] = [sum(one["separate"].values()) for one in found]
        for name, sizes in each.items():
            yield Cell(name, arm, _of_saves(arm, sizes, found))


def _by_arm(rows: Rows) -> Iterator[tuple[str, list[Row]]]:
    for arm in arms_of(rows):
        yield arm, [row["found"] for row in rows if row["arm"] == arm]


def _of_saves(arm: str, sizes: Sequence[int], found: Sequence[Row]) -> Estimate:
    """Shares of the separate ones' bytes; accounting knows no chance."""
    shares = [
        n / sum(each["separate"].values()) for n, each in zip(sizes, found, strict=True)
    ]
    return of_seeds(shares) if arm == TOY else exactly(shares[0])


# -------------------------------------------------------------------- quantization

LOSSY = {
    "fp8_ptq": "FP8 by rounding alone",
    "nvfp4_ptq": "NVFP4 by rounding alone",
    "nvfp4_qad": "after nested QAD, NVFP4",
}
FORMATS = {  # lessons by arm; of the longest problems
    **{
        arm: (
            f"{what} [costs less than|costs more than|may cost more or less than] "
            f"{1 - ASKED[arm]:.0%}."
        )
        for arm, what in LOSSY.items()
    },
    "nvfp4_qat": f"QAT, which trains on the task itself, is {BETTER} BF16.",
}


def quantization(rows: Rows) -> Iterator[Finding]:
    """Of the longest problems, where every step can go wrong."""
    budgets, (is_long, called) = budgets_of(rows), longest(rows)
    at = lambda arm, budget: right(rows, arm, budget, is_long)
    for arm, lesson in FORMATS.items():
        yield Finding(
            f"`{budgets[0]}` of {_arm(arm)} / of BF16, {called}",
            ratio(at(arm, budgets[0]), at("bf16", budgets[0])),
            ASKED.get(arm),
            least=arm != "nvfp4_ptq",
            unit="percent",
            lesson=f"`{budgets[0]}`: {lesson}",
        )
    for budget in budgets[1:]:
        each = (at(arm, budget) for arm in ("nvfp4_qad", "nvfp4_ptq", "bf16"))
        yield Finding(
            f"gap that QAD closed at `{budget}`, {called}",
            closed(*each),
            ASKED["gap closed"],
            unit="percent",
            lesson=(
                f"`{budget}`: QAD gives back [more than half|less than half|perhaps "
                "half] of what rounding to NVFP4 took."
            ),
        )


def _arm(arm: str) -> str:
    return arm.replace("_", " ").upper()


# ------------------------------------------------------------------------- experts


def _divergences(rows: Rows, arm: str, when: str) -> list[float]:
    return [row["found"][when]["kl"] for row in rows if row["arm"] == arm]


def experts(rows: Rows) -> Iterator[Finding]:
    for parent in dict.fromkeys(arm.split(": ")[0] for arm in arms_of(rows)):
        loads = [
            row["found"]["largest_load"]
            for row in rows
            if row["arm"].startswith(f"{parent}: ") and "largest_load" in row["found"]
        ]
        yield Finding(
            f"largest share of a block's choices that falls on one expert, {parent}",
            exactly(max(loads, default=None)),
            unit="percent",
        )
        for when in ("untrained", "trained"):
            random = _divergences(rows, f"{parent}: random", when)
            for order in ("reap", "mass", "frequency", "reversed"):
                ours = _divergences(rows, f"{parent}: {order}", when)
                found = None
                if ours and len(random) > 1:
                    # Chance lies in the draws: the order itself is one.
                    value = statistics.fmean(random) - statistics.fmean(ours)
                    halves = [fronts.spread(e) or 0.0 for e in (random, ours)]
                    found = Estimate(value, sum(h * h for h in halves) ** 0.5)
                yield Finding(
                    f"KL of random orders minus that of {order}, {when}, {parent}",
                    found,
                    unit="nats",
                    lesson=(
                        f"{parent} parent, {when}: REAP's order is {BETTER} a random "
                        "one."
                        if order == "reap"
                        else ""
                    ),
                )


def orders(rows: Rows) -> Iterator[Cell]:
    for arm in arms_of(rows):
        parent, order = arm.split(": ")
        for when in ("untrained", "trained"):
            found = of_seeds(_divergences(rows, arm, when))
            yield Cell(f"{parent} parent, {when}", order, found)


# --------------------------------------------------------------------------- depth


def depth(rows: Rows) -> Iterator[Finding]:
    for parent in dict.fromkeys(arm.split(": ")[0] for arm in arms_of(rows)):
        for kind in ("width, equal total", "width, equal active"):
            each = (right(rows, f"{parent}: {k}", "small") for k in (kind, "depth"))
            yield Finding(
                f"{kind}, minus depth, {parent} parent",
                difference(*each),
                lesson=(
                    f"{parent} parent, {kind.partition(', ')[2]} parameters: narrower "
                    f"is {BETTER} shallower."
                ),
            )


def by_parent(rows: Rows) -> Iterator[Cell]:
    for arm in arms_of(rows):
        parent, kind = arm.split(": ")
        yield Cell(f"{parent} parent", kind, accuracy(right(rows, arm, "small")))
