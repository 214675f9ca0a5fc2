"""The report of one nested checkpoint, quantized: a page and a plot.

It takes plain rows and never parameters, as `report` does, whose looks it shares. Arms
are compared within a seed, and then over seeds: beside a mean stands its range.
"""

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from elastic_jax.report import PALETTE, STYLE
from elastic_jax.tables import (
    bullets,
    format_bytes,
    format_count,
    format_nats,
    format_several,
    format_share,
    listed,
    markdown_table,
)

PICTURE = "quantization.png"
CAPTION = (
    "Exact answers of every budget, cut from one checkpoint per arm: means and range"
)
REFERENCE = "bf16"
WAYS = {
    "ptq": "PTQ is rounding alone",
    "qad": "QAD is training by nested distillation, every budget from itself in BF16",
    "qat": "QAT is the same training with cross entropy on the data",
}
# What is kept of the 30B in BF16 (arXiv 2605.07182).
PUBLISHED = {"fp8_ptq": 0.9869, "nvfp4_ptq": 1 - 0.0412, "nvfp4_qad": 0.9779}
CLEAR_GAP = 0.005  # a loss below this share of the reference leaves nothing to recover
NEEDED = ("arms", "budgets", "seeds", "evaluation", "rounded", "table")

Results = Mapping[str, Any]


def write_quantization_report(directory: str | os.PathLike, results: Results) -> Path:
    """Writes `quantization.md` and its plot, over what an earlier report left.

    Args:
      results: plain values. `arms`, the reference "bf16" first; `budgets`, largest
        first; `seeds`, seed -> rows, each with `arm`, `budget`, `value`, `kl`, `parts`,
        `memory_bytes`, `disk_bytes`, `nested_disk_bytes` and `errors`; `table`, arm ->
        rows of `quantize.table`; `evaluation` as of the task; `rounded` in words.

    Returns:
      the path of `quantization.md`.

    Raises:
      ValueError: names what is missing.
    """
    missing = [name for name in NEEDED if not results.get(name)]
    if missing:
        raise ValueError(f"results cannot be reported, they lack {', '.join(missing)}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        plot_quantization(results).savefig(directory / PICTURE)
    path = directory / "quantization.md"
    path.write_text("\n\n".join(_text(results)) + "\n", encoding="utf-8")
    return path


def kept(results: Results, arm: str, budget: str) -> list[float] | None:
    """What an arm keeps of the reference's value, for every seed; None of nothing."""
    each = (values(results, name, budget) for name in (arm, REFERENCE))
    pairs = list(zip(*each, strict=True))
    return (
        [ours / theirs for ours, theirs in pairs]
        if all(pair[1] for pair in pairs)
        else None
    )


def recovered(results: Results, arm: str, budget: str) -> float | None:
    """Of what rounding alone lost at a budget, the share that an arm gives back.

    Means over seeds; None where rounding alone lost next to nothing.
    """
    alone = f"{arm.split('_')[0]}_ptq"
    if alone not in results["arms"]:
        return None
    whole, lost, ours = (
        statistics.fmean(values(results, name, budget))
        for name in (REFERENCE, alone, arm)
    )
    if whole - lost < CLEAR_GAP * whole:
        return None
    return (ours - lost) / (whole - lost)


def values(results: Results, arm: str, budget: str, name: str = "value") -> list[float]:
    """One number of an arm at a budget, for every seed."""
    return [row[name] for row in _rows(results, arm, budget)]


def _rows(results: Results, arm: str, budget: str) -> list[Mapping[str, Any]]:
    return [
        row
        for rows in results["seeds"].values()
        for row in rows
        if (row["arm"], row["budget"]) == (arm, budget)
    ]


# ------------------------------------------------------------------------------- text


def _text(results: Results) -> Iterator[str]:
    yield "# One nested checkpoint, quantized"
    if results.get("smoke"):
        yield "> A smoke run: it shows that everything works; its numbers mean little."
    yield _head(results)
    yield "## What is found"
    yield bullets(_findings(results))
    yield "## Every budget of every arm"
    yield f"![{CAPTION}]({PICTURE})\n\n{CAPTION}."
    yield _method(results)
    yield _table(results)
    if any(len(row["parts"]) > 1 for row in _rows(results, REFERENCE, _full(results))):
        yield "## By length of the problem"
        yield _parts(results)
    for arm in results["arms"][1:]:
        if arm.endswith("_ptq"):
            yield f"## What {called(arm)} stores, and how far off that is"
            yield _recipe(results, arm)


def _head(results: Results) -> str:
    seeds, asked = len(results["seeds"]), results["evaluation"]
    times = "once" if seeds == 1 else f"{seeds} times, with other seeds"
    what = "All products" if results.get("everything") else "What the recipe names"
    return (
        f"Elastic training was run {times}. Each time the elastic model was calibrated "
        "once and quantized as a whole by every arm; every budget is what that arm's "
        f"one nested checkpoint restores. {what} have {results['rounded']} rounded, "
        f"the rest is BF16. {_ways(results)} Trained arms start from the elastic model "
        f"and take {results['steps']} steps over all budgets. Every row answers "
        f"{format_count(asked['problems'])} held-out problems of {asked['min_steps']} "
        f"to {asked['max_steps']} steps. Measured on "
        f"{results.get('device') or 'an unknown device'}."
    )


def _ways(results: Results) -> str:
    ways = {arm.split("_")[1] for arm in results["arms"][1:]}
    return "; ".join(text for way, text in WAYS.items() if way in ways) + "."


def _findings(results: Results) -> Iterator[str]:
    full, budgets = _full(results), results["budgets"]
    for arm in results["arms"][1:]:
        each = [
            f"{_shares(kept(results, arm, budget))} at `{budget}`" for budget in budgets
        ]
        published = ""
        if arm in PUBLISHED:
            published = f" (published for the 30B: {PUBLISHED[arm]:.2%})"
        yield f"{called(arm)} keeps, of BF16, {listed(each)}{published}."
    for arm in results["arms"][1:]:
        if arm.endswith("_ptq"):
            continue
        back = {budget: recovered(results, arm, budget) for budget in budgets}
        said = [
            f"{share:.0%} at `{b}`" for b, share in back.items() if share is not None
        ]
        small = [f"`{b}`" for b, share in back.items() if share is None]
        if said:
            yield f"{called(arm)} gives back {listed(said)} of what PTQ lost."
        if small and f"{arm.split('_')[0]}_ptq" in results["arms"]:
            yield (
                f"At {listed(small)} PTQ lost less than {CLEAR_GAP:.1%} of BF16: too "
                f"little for {called(arm)} to be judged by."
            )
    pairs = [(a, a.replace("_qad", "_qat")) for a in results["arms"] if "_qad" in a]
    for ours, other in pairs:
        if other in results["arms"]:
            yield _beside(results, ours, other)
    base = _rows(results, REFERENCE, full)[0]
    for arm in results["arms"][1:]:
        row = _rows(results, arm, full)[0]
        share = row["memory_bytes"] / base["memory_bytes"]
        memory, disk = (
            format_bytes(row[name]) for name in ("memory_bytes", "nested_disk_bytes")
        )
        yield (
            f"{called(arm)}: {memory} in memory, {share:.0%} of BF16; all budgets "
            f"together take {disk} on disk."
        )


def _beside(results: Results, ours: str, other: str) -> str:
    """A method and its control, seed by seed."""
    said = []
    for budget in results["budgets"]:
        pairs = zip(
            values(results, ours, budget), values(results, other, budget), strict=True
        )
        apart = [100 * (a - b) for a, b in pairs]
        span = f" ({min(apart):+.1f} to {max(apart):+.1f})" if len(apart) > 1 else ""
        said.append(f"{statistics.fmean(apart):+.1f} points{span} at `{budget}`")
    return f"{called(ours)} against {called(other)}: {listed(said)}."


def _method(results: Results) -> str:
    several = len(results["seeds"]) > 1
    spread = " Means over seeds, and the range." if several else ""
    return (
        "*Of BF16* is the share of the reference's value that is kept; *gives back* is "
        "the share of what PTQ lost; *KL* is from the same budget before, "
        "in nats per token of held-out rows. Bytes are of the budget alone: in memory "
        f"its packed arrays, on disk a checkpoint of its own.{spread}"
    )


def _table(results: Results) -> str:
    keys = [(budget, arm) for budget in results["budgets"] for arm in results["arms"]]

    def several(name: str, form: Callable) -> Callable:
        return lambda key: format_several(values(results, key[1], key[0], name), form)

    def gives(key) -> str | None:
        budget, arm = key
        trained = arm != REFERENCE and not arm.endswith("_ptq")
        share = recovered(results, arm, budget) if trained else None
        return None if share is None else f"{share:.0%}"

    return markdown_table(
        keys,
        {
            "budget": lambda key: key[0],
            "weights": lambda key: called(key[1]),
            "exact answers": several("value", format_share),
            "of BF16": lambda key: _shares(kept(results, key[1], key[0])),
            "gives back": gives,
            "KL": several("kl", format_nats),
            "in memory": lambda k: format_bytes(_first(results, k, "memory_bytes")),
            "on disk": lambda k: format_bytes(_first(results, k, "disk_bytes")),
        },
    )


def _parts(results: Results) -> str:
    names = list(_rows(results, REFERENCE, _full(results))[0]["parts"])
    keys = [(budget, arm) for budget in results["budgets"] for arm in results["arms"]]

    def part(name: str) -> Callable:
        def mean(key) -> str:
            rows = _rows(results, key[1], key[0])
            return format_share(statistics.fmean(row["parts"][name] for row in rows))

        return mean

    columns = {"exact answers": lambda key: f"{key[0]}, {called(key[1])}"}
    return markdown_table(keys, columns | {name: part(name) for name in names})


def _recipe(results: Results, arm: str) -> str:
    """Bytes and errors of every kind of parameter, of the first seed."""
    errors = _rows(results, arm, _full(results))[0]["errors"]
    by_name: dict[str, list] = {}
    for error in errors:
        by_name.setdefault(error["name"], []).append(error)

    def worst(name: str, form: Callable) -> Callable:
        def largest(row) -> str | None:
            found = by_name.get(f"{row['kind']}/{row['parameter']}")
            return form(max(error[name] for error in found)) if found else None

        return largest

    return markdown_table(
        results["table"][arm],
        {
            "parameter": lambda row: f"{row['kind']}/{row['parameter']}",
            "stored as": lambda row: row["format"],
            "parameters": lambda row: format_count(row["parameters"]),
            "bytes": lambda row: format_bytes(row["bytes"]),
            "relative error": worst("relative", format_share),
            "of the worst expert": worst("worst", format_share),
            "saturated": worst("saturated", format_share),
            "became zero": worst("zeroed", format_share),
            "dead blocks": worst("dead_blocks", format_share),
        },
    )


def called(arm: str) -> str:
    """An arm as people call it: NVFP4 QAD."""
    return arm.replace("_", " ").upper()


def _shares(each: Sequence[float] | None) -> str:
    return format_several(each, format_share)


def _first(results: Results, key: tuple[str, str], name: str) -> int:
    """A number that is the same for every seed whose counts are."""
    return values(results, key[1], key[0], name)[0]


def _full(results: Results) -> str:
    return results["budgets"][0]


# ------------------------------------------------------------------------------- plot


def plot_quantization(results: Results) -> Figure:
    """One group per budget, one dot per arm, a line over the range of seeds."""
    arms, budgets = results["arms"], results["budgets"]
    figure = Figure(figsize=(2 + 1.8 * len(budgets), 4))
    ax = figure.subplots()
    for i, arm in enumerate(arms):
        at = [x + 0.12 * (i - (len(arms) - 1) / 2) for x in range(len(budgets))]
        each = [values(results, arm, budget) for budget in budgets]
        means = [statistics.fmean(v) for v in each]
        below = [m - min(v) for m, v in zip(means, each, strict=True)]
        above = [max(v) - m for m, v in zip(means, each, strict=True)]
        colour = PALETTE[i % len(PALETTE)]
        ax.errorbar(
            at, means, yerr=[below, above], fmt="o", color=colour, label=called(arm)
        )
    ax.set_xticks(range(len(budgets)), budgets)
    ax.set_xlim(-0.5, len(budgets) - 0.5)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_ylabel("problems answered exactly")
    figure.legend(loc="outside upper center", ncols=2)
    return figure
