"""The claims of the method: what was published, what is asked, and what rows say.

Every claim has thresholds, which stand here and nowhere else, and two functions of its
rows: findings, each with a verdict, and cells, the numbers of its table and plot.
Where two arms are compared, `difference` and `ratio` pair their problems.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from elastic_jax import fronts
from elastic_jax.tables import listed
from elastic_jax.verdicts import (
    Estimate,
    Finding,
    Row,
    accuracy,
    at_all,
    closed,
    combined,
    difference,
    exactly,
    mean,
    of_seeds,
    ratio,
    right,
)

Rows = Sequence[Row]

ASKED = {  # by claim; never moved after a look at results
    "nested over separate at small": 0.20,
    "full under its parent": -0.02,
    "work of a family": 0.36,
    "router": 1.0,
    "long stage over control": {"full": 0.40, "mid": 0.30, "small": 0.08},
    "fp8_ptq": 0.99,
    "nvfp4_ptq": 0.93,
    "nvfp4_qad": 0.97,
    "gap closed": 0.5,
    "transplant under reading again": -0.04,
    "sizes between": 16,
}
ZONE = 0.05  # share of its target by which a budget's cost may miss it


@dataclass(frozen=True)
class Cell:
    """One number of a table and a plot.

    Attributes:
      group, series: its row and its column.
      at: where it stands on a numeric axis; None is among other groups.
    """

    group: str
    series: str
    found: Estimate | None
    at: float | None = None


@dataclass(frozen=True)
class Claim:
    """One claim, as its page tells it.

    Attributes:
      title, statement: what is claimed.
      published: the figures behind it, with their source.
      scope: what this measurement does not say.
      unit: of the cells.
      axis: what the cells are.
      findings, cells: of the claim's rows.
    """

    title: str
    statement: str
    published: str
    scope: str
    unit: str
    axis: str
    findings: Callable[[Rows], Iterator[Finding]]
    cells: Callable[[Rows], Iterator[Cell]]


def arms_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def budgets_of(rows: Rows) -> list[str]:
    named = (row["found"].get("budgets", {}) for row in rows)
    return list(dict.fromkeys(name for each in named for name in each))


def _answers(rows: Rows) -> Iterator[Cell]:
    """Every arm at every budget."""
    for budget in budgets_of(rows):
        for arm in arms_of(rows):
            yield Cell(budget, arm, accuracy(right(rows, arm, budget)))


# ------------------------------------------------------------------------ 1. nested


def _nested(rows: Rows) -> Iterator[Finding]:
    small = budgets_of(rows)[-1]
    at = lambda arm, budget: right(rows, arm, budget)
    for arm in ("separate, a third", "separate, all", "untrained"):
        asked = ASKED["nested over separate at small"] if "third" in arm else None
        yield Finding(
            f"nested minus {arm}, at `{small}`",
            difference(at("nested", small), _repeated(rows, arm, small)),
            asked,
        )
    yield Finding(
        "nested `full` minus its parent",
        difference(at("nested", "full"), _repeated(rows, "parent", "full")),
        ASKED["full under its parent"],
    )
    work = {row["arm"]: row["found"]["work"] for row in rows if "work" in row["found"]}
    whole = work.get("separate, all")
    share = work["nested"] / whole if whole and "nested" in work else None
    yield Finding(
        "training work of the family / of separate distillations, teacher included",
        exactly(share),
        ASKED["work of a family"],
        least=False,
        unit="ratio",
    )


def _repeated(rows: Rows, arm: str, budget: str):
    """An arm's answers; those that no training seed changes stand for all seeds."""
    ours = right(rows, arm, budget)
    if arm not in ("parent", "untrained"):
        return ours
    return at_all(right(rows, "nested", budget), ours)


# ------------------------------------------------------------------------ 2. router


def _router(rows: Rows) -> Iterator[Finding]:
    choices = [row["found"]["choices"] for row in rows if "choices" in row["found"]]
    checks = {
        "seeds with every budget in its zone at the deadline": _in_zone,
        "seeds with ordered budgets": _ordered,
        "seeds whose counts stayed in the last half": _unchanged,
    }
    for what, check in checks.items():
        held = [float(check(each)) for each in choices]
        found = exactly(statistics.fmean(held)) if held else None
        yield Finding(what, found, ASKED["router"], unit="percent")
    fixed = [arm for arm in arms_of(rows) if arm not in ("learned", "random order")]
    for budget in budgets_of(rows)[1:]:
        ours = right(rows, "learned", budget)
        each = {arm: right(rows, arm, budget) for arm in fixed}
        each = {arm: found for arm, found in each.items() if found}
        if each:
            best = max(each, key=lambda arm: mean(each[arm]))
            middle = combined(lambda *p: statistics.fmean(p), *each.values())
            yield Finding(
                f"learned minus the best fixed shape, `{best}`, at `{budget}`",
                difference(ours, each[best]),
            )
            yield Finding(
                f"learned minus the mean of {len(each)} fixed shapes, at `{budget}`",
                difference(ours, middle),
            )
        yield Finding(
            f"learned minus the same sizes in a random order, at `{budget}`",
            difference(ours, right(rows, "random order", budget)),
        )


def _at_deadline(choices):
    by = [step for step in choices["steps"] if step["step"] <= choices["deadline"]]
    return by[-1]


def _in_zone(choices) -> bool:
    last = _at_deadline(choices)
    return all(abs(share - 1) <= ZONE for share in last["cost_over_target"].values())


def _ordered(choices) -> bool:
    """By cost, the largest budget first, and no two alike."""
    ratios = _at_deadline(choices)["cost_over_target"]
    costs = [ratios[name] * target for name, target in choices["targets"].items()]
    return all(a > b for a, b in zip(costs, costs[1:], strict=False))


def _unchanged(choices) -> bool:
    half = choices["total_steps"] / 2
    late = [step["counts"] for step in choices["steps"] if step["step"] >= half]
    return all(counts == late[-1] for counts in late)


# ------------------------------------------------------------------------ 3. stages

CONTROL = "more"  # as many tokens, all of short problems


def _is_long(rows: Rows) -> tuple[Callable[[int], bool], str]:
    """Which problems are in the longest third, and how that is called."""
    asked = rows[0]["evaluation"]
    low, high = asked["min_steps"], asked["max_steps"]
    first = high - (high - low + 1) // 3 + 1
    first = min(first, high)
    return lambda n: n >= first, f"{first} to {high} steps"


def _stages(rows: Rows) -> Iterator[Finding]:
    is_long, called = _is_long(rows)
    for arm in ("uniform", "weighted"):
        for budget in budgets_of(rows):
            each = (right(rows, name, budget, is_long) for name in (arm, CONTROL))
            asked = ASKED["long stage over control"].get(budget)
            yield Finding(
                f"long stage ({arm}) minus more short ones, {called}, `{budget}`",
                difference(*each),
                asked if arm == "uniform" else None,
            )
    for budget in budgets_of(rows):
        each = (right(rows, name, budget, is_long) for name in ("weighted", "uniform"))
        yield Finding(
            f"weighted minus uniform sampling, {called}, `{budget}`", difference(*each)
        )
        each = (right(rows, name, budget, is_long) for name in (CONTROL, "short"))
        yield Finding(
            f"more short ones minus the short stage, {called}, `{budget}`",
            difference(*each),
        )


def _by_length(rows: Rows) -> Iterator[Cell]:
    is_long, called = _is_long(rows)
    bins = {"shorter": lambda n: not is_long(n), called: is_long}
    for name, steps in bins.items():
        for budget in budgets_of(rows):
            for arm in arms_of(rows):
                found = accuracy(right(rows, arm, budget, steps))
                yield Cell(f"{budget}, {name}", arm, found)


# ------------------------------------------------------------------ 4. quantization


def _quantization(rows: Rows) -> Iterator[Finding]:
    budgets = budgets_of(rows)
    least = {"fp8_ptq": True, "nvfp4_ptq": False, "nvfp4_qad": True, "nvfp4_qat": True}
    for arm, floor in least.items():
        each = (right(rows, name, budgets[0]) for name in (arm, "bf16"))
        yield Finding(
            f"`{budgets[0]}` of {_arm(arm)} / of BF16",
            ratio(*each),
            ASKED.get(arm),
            least=floor,
            unit="percent",
        )
    for budget in budgets[1:]:
        each = (right(rows, a, budget) for a in ("nvfp4_qad", "nvfp4_ptq", "bf16"))
        yield Finding(
            f"gap that QAD closed at `{budget}`",
            closed(*each),
            ASKED["gap closed"],
            unit="percent",
        )


def _arm(arm: str) -> str:
    return arm.replace("_", " ").upper()


# ----------------------------------------------------------------------- 5. control


def _control(rows: Rows) -> Iterator[Finding]:
    points = _points(rows)
    if not points:
        return
    largest = max(point.cap for point in points)
    ends = list(dict.fromkeys(point.stage for point in points))
    for stage in ends:
        for pair in ("S->L", "L->S"):
            both = [
                dict(enumerate(point.right))
                for how in ("transplant", "reprefill")
                for point in points
                if (point.stage, point.pair, point.hand_over, point.cap)
                == (stage, pair, how, largest)
            ]
            asked = ASKED["transplant under reading again"]
            decides = stage == ends[-1] and pair == "S->L"
            found = difference(*both) if len(both) == 2 else None
            yield Finding(
                f"{pair} by transplant minus by reading again, after `{stage}`",
                found,
                asked if decides else None,
            )
    last = [point for point in points if point.stage == ends[-1]]
    for kind, called in fronts.COSTS.items():
        if not all(getattr(point, kind) for point in last):
            continue
        best = {point.name for point in fronts.front(last, kind)}
        on = [
            name for name in ("S->L (transplant)", "S->L (reprefill)") if name in best
        ]
        where = listed(on) if on else "nowhere"
        yield Finding(
            f"S->L on the front of {called}, by means: {where}",
            exactly(float(bool(on))),
            unit="count",
        )


def _points(rows: Rows) -> list[fronts.Point]:
    """The sweep's points; a seed counts once all of its arms are there."""
    if not rows:
        return []
    found, arms = rows[0]["found"], set(arms_of(rows))
    seeds: dict = {}
    for row in rows:
        seeds.setdefault(str(row["seed"]), {"rows": [], "arms": set()})
        seeds[str(row["seed"])]["rows"] += row["found"]["rows"]
        seeds[str(row["seed"])]["arms"].add(row["arm"])
    whole = {seed: each for seed, each in seeds.items() if each["arms"] == arms}
    named = {"large": found["large"], "small": found["small"]}
    return fronts.points(named | {"seeds": whole})


def _pairs(rows: Rows) -> Iterator[Cell]:
    for point in _points(rows):
        found = accuracy(dict(enumerate(point.right)))
        yield Cell(f"{point.name}, at most {point.cap} tokens", point.stage, found)


# ------------------------------------------------------------------------- 6. depth


def _depth(rows: Rows) -> Iterator[Finding]:
    for parent in dict.fromkeys(arm.split(": ")[0] for arm in arms_of(rows)):
        for kind in ("width, equal total", "width, equal active"):
            each = (right(rows, f"{parent}: {k}", "small") for k in (kind, "depth"))
            yield Finding(f"{kind}, minus depth, {parent} parent", difference(*each))


def _by_parent(rows: Rows) -> Iterator[Cell]:
    for arm in arms_of(rows):
        parent, kind = arm.split(": ")
        yield Cell(f"{parent} parent", kind, accuracy(right(rows, arm, "small")))


# ----------------------------------------------------------------------- 7. experts


def _divergences(rows: Rows, arm: str, when: str) -> list[float]:
    return [row["found"][when]["kl"] for row in rows if row["arm"] == arm]


def _experts(rows: Rows) -> Iterator[Finding]:
    for parent in dict.fromkeys(arm.split(": ")[0] for arm in arms_of(rows)):
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
                )


def _orders(rows: Rows) -> Iterator[Cell]:
    for arm in arms_of(rows):
        parent, order = arm.split(": ")
        for when in ("untrained", "trained"):
            found = of_seeds(_divergences(rows, arm, when))
            yield Cell(f"{parent} parent, {when}", order, found)


# ------------------------------------------------------------------------ 8. memory


# GiB of Nemotron 3 Nano, where the published figure stands for the same thing.
PUBLISHED_GIB = {"bf16": 58.9, "fp8": 31.4, "nvfp4": 18.7}
PUBLISHED_SEPARATE_GIB = 126.1


def _memory(rows: Rows) -> Iterator[Finding]:
    for row in rows:
        nested, apart = row["found"]["nested"], row["found"]["separate"]
        if row["arm"] != "toy":
            each = {
                f"one nested checkpoint, {format.upper()}": (n, PUBLISHED_GIB[format])
                for format, n in nested.items()
            }
            whole = sum(apart.values()), PUBLISHED_SEPARATE_GIB
            each[f"{len(apart)} separate ones, BF16"] = whole
            for what, (n, published) in each.items():
                yield Finding(
                    f"{row['arm']}: {what} (published {published})",
                    exactly(n / 2**30),
                    unit="GiB",
                )
        share = nested["bf16"] / sum(apart.values())
        yield Finding(
            f"{row['arm']}: one nested checkpoint / {len(apart)} separate ones, BF16",
            exactly(share),
            unit="ratio",
        )


def _bytes(rows: Rows) -> Iterator[Cell]:
    for row in rows:
        nested, apart = row["found"]["nested"], row["found"]["separate"]
        sizes = {f"nested, {name}": n for name, n in nested.items()}
        sizes |= {f"separate, {name}": n for name, n in apart.items()}
        sizes["separate, all"] = sum(apart.values())
        for name, n in sizes.items():
            yield Cell(name, row["arm"], exactly(n / sum(apart.values())))


# ----------------------------------------------------------------------- 9. between


def _between(rows: Rows) -> Iterator[Finding]:
    sizes = {name for row in rows for name in row["found"]["between"]}
    yield Finding(
        "sizes between the trained ones",
        exactly(float(len(sizes))),
        ASKED["sizes between"],
        unit="count",
    )
    apart = []
    for row in rows:
        line = _line(row)
        each = row["found"]["between"].values()
        apart.append(
            statistics.fmean(e["value"] - line(e["active_params"]) for e in each)
        )
    yield Finding("accuracy minus the line through trained ones", of_seeds(apart))


def _line(row: Row) -> Callable[[float], float]:
    """Accuracy by active parameters, linear between a seed's trained sizes."""
    trained = row["found"]["budgets"].values()
    known = sorted((e["active_params"], e["value"]) for e in trained)

    def at(params: float) -> float:
        for (x, y), (x2, y2) in zip(known, known[1:], strict=False):
            if params <= x2:
                return y + (y2 - y) * (params - x) / (x2 - x)
        return known[-1][1]

    return at


def _sizes(rows: Rows) -> Iterator[Cell]:
    full = max(
        e["active_params"] for row in rows for e in row["found"]["budgets"].values()
    )
    for part, called in (("budgets", "trained"), ("between", "never trained")):
        params = {
            name: each["active_params"]
            for row in rows
            for name, each in row["found"][part].items()
        }
        for name, n in sorted(params.items(), key=lambda item: -item[1]):
            marks = {
                row["seed"]: [float(m) for m in row["found"][part][name]["right"]]
                for row in rows
            }
            share = n / full
            yield Cell(f"{share:.1%} ({name})", called, accuracy(marks), share)
            if part == "between":
                on = of_seeds([_line(row)(n) for row in rows])
                yield Cell(f"{share:.1%} ({name})", "the line", on, share)


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
        "percent",
        "bytes, of the separate checkpoints in BF16",
        _memory,
        _bytes,
    ),
    "nested": Claim(
        "One nested run against separate runs",
        "One run trains a whole family, for a fraction of what separate runs take.",
        "7 times fewer tokens than sequential compression, 360 times fewer than "
        "pretraining each (Star Elastic).",
        f"{TOY} Work counts active parameters times tokens, a backward pass as two; "
        "the full size is distilled separately too.",
        "percent",
        ANSWERS,
        _nested,
        _answers,
    ),
    "between": Claim(
        "Budgets never trained",
        "What lies between trained budgets can be cut too.",
        "None: the published method extracts trained budgets only (Nemotron Elastic).",
        f"{TOY} The models are those of the claim before.",
        "percent",
        ANSWERS,
        _between,
        _sizes,
    ),
    "router": Claim(
        "A learned router against fixed shapes",
        "A router learns, within one run, shapes that need no search.",
        "No comparison with fixed shapes at equal size was found.",
        f"{TOY} A fixed shape trains slices from the start, the router's arm only "
        "after its stage of soft masks; both take as many steps.",
        "percent",
        ANSWERS,
        _router,
        _answers,
    ),
    "stages": Claim(
        "Two stages",
        "A second stage with a long context is what long reasoning needs.",
        "AIME-25 after the second stage: 6B 56.9 to 68.1, 9B 68.8 to 75.4, 12B 72.9 to "
        "75.8; weights that favour the full model give the 12B 3.5 points more than "
        "uniform ones (Nemotron Elastic).",
        f"{TOY} All arms go on from the same weights with fresh optimiser states.",
        "percent",
        ANSWERS,
        _stages,
        _by_length,
    ),
    "experts": Claim(
        "Orders of experts",
        "REAP ranks experts better than chance.",
        "REAP is the published order; no ablation of it was found (Star Elastic).",
        f"{TOY} The lower the better. Half of 8 experts are kept, other axes whole.",
        "nats",
        "KL from the parent, nats per token",
        _experts,
        _orders,
    ),
    "quantization": Claim(
        "One quantized nested checkpoint",
        "Nested QAD gives back what NVFP4 loses, at every size, in one checkpoint.",
        "Of BF16, the 30B keeps 98.69% in FP8, 95.88% in NVFP4 by rounding alone and "
        "97.79% after nested QAD (Star Elastic).",
        f"{TOY} Everything that enters a product is rounded, which the released models "
        "do not do.",
        "percent",
        ANSWERS,
        _quantization,
        _answers,
    ),
    "control": Claim(
        "Who thinks and who answers",
        "A small model thinks, a large one answers: better and faster than either.",
        "Up to 16% more accurate and 1.9 times faster than one capped model, 23B to "
        "30B; transplanted caches cost 0.75 points on GSM8K (Star Elastic).",
        f"{TOY} Here answers are made the harder part, and the small model has 31% of "
        "the active parameters. Latency is of two cores.",
        "percent",
        ANSWERS,
        _control,
        _pairs,
    ),
    "depth": Claim(
        "Width against depth",
        "Cutting widths keeps more than dropping blocks.",
        "With 15% fewer parameters and 25B tokens, width keeps 98.1% of the baseline, "
        "depth 95.2% (Star Elastic).",
        f"{TOY} Parents of 6 and of 12 blocks; reported only.",
        "percent",
        ANSWERS,
        _depth,
        _by_parent,
    ),
}
