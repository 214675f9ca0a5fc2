"""Claims about nested training: one run, its router, its stages, sizes between."""

import statistics
from collections.abc import Callable, Iterator

from elastic_jax.claims.claim import (
    ASKED,
    BETTER,
    ZONE,
    Cell,
    Rows,
    arms_of,
    budgets_of,
    longest,
)
from elastic_jax.verdicts import (
    Finding,
    Row,
    accuracy,
    combined,
    difference,
    exactly,
    mean,
    of_seeds,
    right,
)

# -------------------------------------------------------------------------- nested

SMALL = {  # lessons by the arm that nested training is held against
    "separate, a third": (
        "for as many tokens in all, one nested run [is far better|is not far better|"
        "may be far better] than one run per size."
    ),
    "separate, all": (
        "separate runs that take all of the tokens each are [worse|better|neither "
        "clearly better nor worse] than one nested run."
    ),
    "untrained": (
        "a good order of the weights [is not|is|may be] enough: slices [have to|need "
        "not|may have to] be trained."
    ),
}
FAMILY = (
    "One run [does not save|saves|may save] about two thirds of the work of separate "
    "distillations."
)


def nested(rows: Rows) -> Iterator[Finding]:
    small = budgets_of(rows)[-1]
    at = lambda arm, budget: right(rows, arm, budget)
    for arm, lesson in SMALL.items():
        asked = ASKED["nested over separate at small"] if "third" in arm else None
        yield Finding(
            f"nested minus {arm}, at `{small}`",
            difference(at("nested", small), at(arm, small)),
            asked,
            lesson=f"`{small}`: {lesson}",
        )
    yield Finding(
        "nested `full` minus its parent",
        difference(at("nested", "full"), at("parent", "full")),
        ASKED["full under its parent"],
        lesson=(
            "To share its weights with smaller ones [does not cost|costs|may cost] "
            "the full model two points."
        ),
    )
    work = {row["arm"]: row["found"]["work"] for row in rows if "work" in row["found"]}
    if whole := work.pop("separate, all", None):
        for arm, spent in work.items():
            yield Finding(
                f"training work of {arm} / of separate, all, teachers included",
                exactly(spent / whole),
                ASKED["work of a family"] if arm == "nested" else None,
                least=False,
                unit="ratio",
                lesson=FAMILY if arm == "nested" else "",
            )


# -------------------------------------------------------------------------- router


def router(rows: Rows) -> Iterator[Finding]:
    choices = [row["found"]["choices"] for row in rows if "choices" in row["found"]]
    checks = {
        "seeds with every budget in its zone at the deadline": (
            _in_zone,
            "[Every router found|Not every router found] sizes that cost what was "
            "asked[|: look before you train on].",
        ),
        "seeds with ordered budgets": (
            _ordered,
            "[All of them kept|Not all of them kept] larger budgets larger.",
        ),
        "seeds whose counts stayed in the last half": (
            _unchanged,
            "[All were|Not all were] sure by half of the steps.",
        ),
    }
    for what, (check, lesson) in checks.items():
        held = [float(check(each)) for each in choices]
        found = exactly(statistics.fmean(held)) if held else None
        yield Finding(what, found, ASKED["router"], unit="percent", lesson=lesson)
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
                lesson=(
                    f"`{budget}`: what the router chose is {BETTER} the best shape "
                    "picked by hand, known in hindsight."
                ),
            )
            yield Finding(
                f"learned minus the mean of {len(each)} fixed shapes, at `{budget}`",
                difference(ours, middle),
            )
        yield Finding(
            f"learned minus the same sizes in a random order, at `{budget}`",
            difference(ours, right(rows, "random order", budget)),
            lesson=(
                f"`{budget}`: after training, ranked weights are {BETTER} weights in a "
                "random order."
            ),
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


# -------------------------------------------------------------------------- stages

CONTROL = "more"  # as many tokens, all of short problems


def stages(rows: Rows) -> Iterator[Finding]:
    is_long, called = longest(rows)
    for budget in budgets_of(rows):
        at = lambda arm, budget=budget: right(rows, arm, budget, is_long)
        yield Finding(
            f"long stage (uniform) minus more short ones, {called}, `{budget}`",
            difference(at("uniform"), at(CONTROL)),
            ASKED["long stage over control"].get(budget),
            lesson=(
                f"`{budget}`: on long problems, training on long ones is [far better|"
                "not far better|perhaps far better] than as many tokens of short ones."
            ),
        )
        yield Finding(
            f"long stage (weighted) minus more short ones, {called}, `{budget}`",
            difference(at("weighted"), at(CONTROL)),
        )
        yield Finding(
            f"weighted minus uniform sampling, {called}, `{budget}`",
            difference(at("weighted"), at("uniform")),
            lesson=(
                f"`{budget}`: to draw larger budgets more often [helps|hurts|makes no "
                "clear difference]."
            ),
        )
        yield Finding(
            f"more short ones minus the short stage, {called}, `{budget}`",
            difference(at(CONTROL), at("short")),
        )


# ------------------------------------------------------------------------- between


def between(rows: Rows) -> Iterator[Finding]:
    sizes = {name for row in rows for name in row["found"]["between"]}
    yield Finding(
        "sizes between the trained ones",
        exactly(float(len(sizes))),
        ASKED["sizes between"],
        unit="count",
    )
    whose = {
        "": (
            lambda e: True,
            "Sizes between trained ones are [better than|worse than|about] what a "
            "straight line between these says[|: train what you want to serve|].",
        ),
        ", the router's sizes alone": (
            _from_router,
            "Those that an interpolated router asks for are [better than|worse than|"
            "about] that line.",
        ),
    }
    for called, (chosen, lesson) in whose.items():
        apart = []
        for row in rows:
            line, each = _line(row), row["found"]["between"].values()
            over = [e["value"] - line(e["active_params"]) for e in each if chosen(e)]
            apart += [statistics.fmean(over)] if over else []
        yield Finding(
            f"accuracy minus the line through trained ones{called}",
            of_seeds(apart),
            lesson=lesson,
        )


def _from_router(each: Row) -> bool:
    """Whether a size is the router's answer to a blend; others only lie between."""
    return each.get("from_router", False)


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


def sizes(rows: Rows) -> Iterator[Cell]:
    """By active parameters, largest first; what was trained and what was not."""
    called = {"budgets": "trained", "between": "never trained"}
    params = {
        (part, name): each["active_params"]
        for row in rows
        for part in called
        for name, each in row["found"][part].items()
    }
    full = max(params.values())
    for (part, name), n in sorted(params.items(), key=lambda item: -item[1]):
        marks = {
            row["seed"]: [float(m) for m in row["found"][part][name]["right"]]
            for row in rows
        }
        group, share = f"{n / full:.1%} ({name})", n / full
        yield Cell(group, called[part], accuracy(marks), share)
        if part == "between":
            on = of_seeds([_line(row)(n) for row in rows])
            yield Cell(group, "the line", on, share)
