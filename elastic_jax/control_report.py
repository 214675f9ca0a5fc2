"""The report of thinking with one size and answering with another: a page and a plot.

It takes plain rows and never parameters, as `report` does, whose looks it shares; the
text is in `control_findings`. A pair of budgets has one colour; a hand-over has its own
line and marker; the front is the wide pale line behind them.
"""

import os
import statistics
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from elastic_jax import control_findings, fronts
from elastic_jax.fronts import COSTS, OWN_CACHE, Point, Results
from elastic_jax.report import PALE, PALETTE, STYLE

PICTURE = "budget_control.png"
CAPTION = (
    "Exact answers against cost, one line over caps for each pair and hand-over, with "
    "95% intervals; the pale line behind is the front, by means"
)
AXES = {
    "latency": "measured latency, relative to L->L at the largest cap",
    "work": "active parameters x tokens, relative to the same",
}
COLOURS = dict(zip(("L->L", "S->S", "S->L", "L->S"), PALETTE, strict=False))
LOOKS = {  # of a hand-over
    OWN_CACHE: {"ls": "-", "marker": "o"},
    "transplant": {"ls": "-", "marker": "^"},
    "reprefill": {"ls": ":", "marker": "s", "mfc": "white"},
}
NEEDED = ("large", "small", "stages", "mixed", "evaluation", "repeats", "seeds")


def write_control_report(directory: str | os.PathLike, results: Results) -> Path:
    """Writes `budget_control.md` and its plot, over what an earlier report left.

    Args:
      results: plain values. `large` and `small` name the budgets; `stages` are those at
        whose end was measured, the last with seconds; `mixed` those with mixed
        prefixes; `device` may be missing; `evaluation` has `problems`, `min_steps` and
        `max_steps`; `seeds` has, for every seed, `active_params` of both budgets, and
        `rows`: a `stage`, `think`, `answer`, `hand_over`, `cap`, `right` as one 0 or 1
        per problem, `seconds` per problem or None, `work`, `thought_tokens`,
        `answer_tokens` and `capped`.

    Returns:
      the path of `budget_control.md`.

    Raises:
      ValueError: names what is missing.
    """
    missing = [name for name in NEEDED if name not in results]
    missing += [name for name in ("stages", "seeds") if results.get(name) in ([], {})]
    if missing:
        raise ValueError(f"results cannot be reported, they lack {', '.join(missing)}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        plot_control(results).savefig(directory / PICTURE)
    seen = f"![{CAPTION}]({PICTURE})\n\n{CAPTION}."
    path = directory / "budget_control.md"
    text = "\n\n".join(control_findings.control_text(results, seen))
    path.write_text(text + "\n", encoding="utf-8")
    return path


def plot_control(results: Results) -> Figure:
    """Accuracy at the end of the last stage against every cost that was measured."""
    last = results["stages"][-1]
    each = [p for p in fronts.points(results) if p.stage == last]
    kinds = [kind for kind in COSTS if all(getattr(p, kind) for p in each)]
    figure = Figure(figsize=(1 + 4.5 * len(kinds), 5))
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for kind, ax in zip(kinds, panels, strict=True):
        best = fronts.front(each, kind)
        ax.plot(
            [point.cost(kind) for point in best],
            [point.accuracy for point in best],
            color=PALE,
            lw=9,
            solid_capstyle="round",
            zorder=0,
        )
        for name in dict.fromkeys(point.name for point in each):
            _curve(ax, [point for point in each if point.name == name], kind)
        ax.set(xlabel=AXES[kind], xlim=(0, None))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0].set_ylabel("problems answered exactly")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def _curve(ax, curve: list[Point], kind: str) -> None:
    """One pair and hand-over over its caps."""
    curve = sorted(curve, key=lambda point: point.cap)
    first = curve[0]
    costs = [getattr(point, kind) for point in curve]
    ax.errorbar(
        [statistics.fmean(each) for each in costs],
        [point.accuracy for point in curve],
        xerr=[fronts.spread(each) or 0.0 for each in costs],
        yerr=[fronts.interval(point.right) for point in curve],
        color=COLOURS[first.pair],
        lw=1.6,
        ms=6,
        elinewidth=0.8,
        label=first.name,
        **LOOKS[first.hand_over],
    )
