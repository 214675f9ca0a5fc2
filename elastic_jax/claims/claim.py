"""What a claim is: its words, and what it makes of the rows of its arms."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from elastic_jax.verdicts import Estimate, Finding, Row, accuracy, right

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
BETTER = "[better than|worse than|not clearly different from]"  # of lessons


@dataclass(frozen=True)
class Cell:
    """One number of a table and a plot.

    Attributes:
      group, series: its row and its column.
      at: where it stands on a numeric axis; None is among other groups, or in the
        table alone where others do have a place.
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
      tried: how its sizes were chosen, and what was tried where an effect did not come.
      unit: of the cells.
      axis: what the cells are.
      findings, cells: of the claim's rows.
      across: what `Cell.at` is.
    """

    title: str
    statement: str
    published: str
    scope: str
    tried: str
    unit: str
    axis: str
    findings: Callable[[Rows], Iterator[Finding]]
    cells: Callable[[Rows], Iterator[Cell]]
    across: str = "active parameters, of the full model"


def arms_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def budgets_of(rows: Rows) -> list[str]:
    named = (row["found"].get("budgets", {}) for row in rows)
    return list(dict.fromkeys(name for each in named for name in each))


def answers(rows: Rows) -> Iterator[Cell]:
    """Every arm at every budget."""
    for budget in budgets_of(rows):
        for arm in arms_of(rows):
            yield Cell(budget, arm, accuracy(right(rows, arm, budget)))


def longest(rows: Rows) -> tuple[Callable[[int], bool], str]:
    """Which problems are in the longest third, and how that is called."""
    asked = rows[0]["evaluation"]
    low, high = asked["min_steps"], asked["max_steps"]
    first = high - max(1, (high - low + 1) // 3) + 1
    span = f"{first} to {high}" if first < high else f"{high}"
    return lambda n: n >= first, f"{span} steps"


def answers_by_length(rows: Rows) -> Iterator[Cell]:
    """The same, of the longest third of the problems and of the others."""
    is_long, called = longest(rows)
    bins = {"shorter": lambda n: not is_long(n), called: is_long}
    for name, steps in bins.items():
        for budget in budgets_of(rows):
            for arm in arms_of(rows):
                found = accuracy(right(rows, arm, budget, steps))
                yield Cell(f"{budget}, {name}", arm, found)
