"""The report of one run: a page of tables and plots that a person wants to look at.

It takes plain rows, what a run wrote down as JSON, and never parameters, so that a
report can be made again from its numbers alone. The text is in `findings`; here are
the plots. A budget has one colour in all of them, told apart also by colour-blind
readers; black is ours, grey is what it is compared with.
"""

import itertools
import math
import operator
import os
import statistics
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from elastic_jax import findings
from elastic_jax.findings import Results
from elastic_jax.measures import DIVERGENCE, MEASURES

REQUIRED = {  # of every row of a part that is there
    "budgets": ("name", "active_params", "counts"),
    "orders": ("axis", "kept", "full", "ours", "random"),
    "metrics": ("step",),
}
ZONE = 0.05  # share of its target by which an accepted budget's cost may miss it
DECADES = 4  # of a logarithmic axis, at most
WHOLE_STEPS = {"nbins": "auto", "integer": True, "steps": (1, 2, 5, 10)}
SPARSE = 20  # fewer points on a curve are marked

INK, GREY, PALE = "#222222", "#808080", "#e4e4e4"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.dpi": 200,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 10,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
}


def write_report(directory: str | os.PathLike, results: Results) -> Path:
    """Writes `report.md`, and its plots as PNG files beside it.

    What an earlier report left there is replaced.

    Args:
      results: plain values, as JSON holds them. Required are `title`, `measure`, the
        name of one of `MEASURES`, and `budgets`: largest budget first, each with
        `name`, `active_params` and `counts`. Where another part is missing, the
        report says so.

    Returns:
      the path of `report.md`, a text that depends on `results` alone.

    Raises:
      ValueError: names every required part that is missing, or an unknown measure.
    """
    missing = [key for key in ("title", "measure", "budgets") if not results.get(key)]
    for part, keys in REQUIRED.items():
        for i, row in enumerate(results.get(part) or ()):
            lacking = (key for key in keys if row.get(key) in (None, []))
            missing += [f"{part}[{i}].{key}" for key in lacking]
    if missing:
        raise ValueError(f"results cannot be reported, they lack {', '.join(missing)}")
    if results["measure"] not in MEASURES:
        known = ", ".join(MEASURES)
        raise ValueError(f"measure {results['measure']!r}: expected one of {known}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    seen = {}
    with matplotlib.rc_context(STYLE):
        for name, (plot, caption, absent) in PLOTS.items():
            path = directory / f"{name}.png"
            path.unlink(missing_ok=True)
            figure = plot(results)
            seen[name] = f"*No plot: {absent}.*"
            if figure is not None:
                figure.savefig(path)
                seen[name] = f"![{caption}]({path.name})\n\n{caption}."
    parts = [
        *findings.head(results),
        *findings.quality(results, seen["budgets"]),
        *findings.against_random(results),
        *findings.router(results, seen["router"]),
        *findings.latency(results),
        *findings.importance(results, seen["importance"], seen["orders"]),
        *findings.training(results, seen["losses"]),
        *findings.times(results),
    ]
    path = directory / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def plot_budgets(results: Results) -> Figure | None:
    """Every budget and its controls, as measured, against active parameters."""
    budgets, colours = results["budgets"], _colours(results)
    if all(budget.get("value") is None for budget in budgets):
        return None
    figure = Figure(figsize=(8, 4.6))
    ax = figure.subplots()
    parent = (results.get("parent") or {}).get("value")
    if parent is not None:
        ax.axhline(parent, color=INK, lw=1, ls=(0, (1, 2)), label="parent")
    for key, label, ls, look in (
        ("untrained_value", "untrained slice", "--", dict(marker="s", mfc="white")),
        ("random_values", "random order, trained", "-", dict(marker="D")),
        ("value", "importance order, trained", "-", dict(marker="o", color=INK)),
    ):
        points = {}
        for budget in budgets:
            if budget.get(key) not in (None, []):
                value = budget[key]
                points[budget["name"], budget["active_params"]] = (
                    value if isinstance(value, list) else [value]
                )
        if not points:
            continue
        look = {"color": GREY, "ms": 5.5} | look
        means = [statistics.fmean(values) for values in points.values()]
        ax.plot([x for _, x in points], means, ls=ls, lw=1.2, label=label, **look)
        for (name, x), values in points.items():
            ax.plot([x] * len(values), values, ls="none", **look)
            if key == "value":
                colour, at = colours[name], (x, *values)
                ax.plot(*at, "o", color=colour, ms=11, mec="white", zorder=4)
                ax.annotate(
                    name, at, (0, 9), textcoords="offset points", ha="center",
                    color=colour, weight="bold",
                )
    ax.margins(x=0.12)
    measure = findings.measure(results)
    ax.set(xlabel="active parameters", ylabel=measure.axis)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    if math.isfinite(measure.high):  # a share
        ax.set(ylim=(-0.04, 1.1), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def plot_router(results: Results) -> Figure | None:
    """The chosen count on every axis, and the cost, over steps that recorded them."""
    colours = _colours(results)
    series, offered = _router_series(results, colours)
    if not series:
        return None
    figure, axes = _grid(series, "training step")
    for (panel, by_budget), ax in zip(series.items(), axes, strict=True):
        ticks = sorted(offered.get(panel, ()))
        gap = min((b - a for a, b in itertools.pairwise(ticks)), default=0)
        for i, (name, points) in enumerate(by_budget.items()):
            steps, values = zip(*points, strict=True)
            if not ticks:
                marker = "." if len(steps) < SPARSE else ""
                ax.plot(steps, values, color=colours[name], lw=1.8, marker=marker)
                continue
            aside = 0.06 * gap * ((len(by_budget) - 1) / 2 - i)  # no line hides another
            values, ends = [v + aside for v in values], [*steps[1:], steps[-1] + 1]
            ax.plot(steps, values, color=colours[name], lw=0.7, ds="steps-post")
            held = zip(values, steps, ends, strict=True)
            for value, spans in itertools.groupby(held, key=operator.itemgetter(0)):
                (_, start, end), *later = spans
                end = later[-1][2] if later else end
                ax.plot([start, end], [value] * 2, color=colours[name], lw=2.4)
        if ticks:
            ax.set(title=panel, yticks=ticks)
        else:
            ax.axhspan(1 - ZONE, 1 + ZONE, color=PALE, lw=0, zorder=0)
            ax.set_title("cost / target")
        ax.xaxis.set_major_locator(MaxNLocator(**WHOLE_STEPS))
    _legend(figure, colours)
    return figure


def _router_series(results, colours):
    """Panel -> budget -> [(step, mean over blocks)]; panel -> counts on offer."""
    series, offered = {}, {}
    for row in results.get("metrics") or ():
        here = {}
        for key, value in row.items():
            name, *path = key.split("/")
            if name not in colours or not path:
                continue
            if path[-1] in ("count", "cost_over_target"):
                here.setdefault((path[0], name), []).append(value)
            elif path[-2:-1] == ["p"]:
                offered.setdefault(path[0], set()).add(int(path[-1]))
        for (panel, name), values in here.items():
            point = (row["step"], statistics.fmean(values))
            series.setdefault(panel, {}).setdefault(name, []).append(point)
    if "cost_over_target" in series:  # last
        series["cost_over_target"] = series.pop("cost_over_target")
    return series, offered


def plot_importance(results: Results) -> Figure | None:
    """Sorted scores of every block, and the share that each budget keeps."""
    colours, importance = _colours(results), results.get("importance") or {}
    importance = {axis: blocks for axis, blocks in importance.items() if blocks}
    if not importance:
        return None
    full, *smaller = results["budgets"]
    figure, axes = _grid(importance, "share of units, best first")
    figure.supylabel("score / best of the block", fontsize=10)
    for (axis, blocks), ax in zip(importance.items(), axes, strict=True):
        for i, scores in enumerate(blocks):
            top, n = max(scores) or 1, len(scores)
            x = [(j + 1) / n for j in range(n)]
            y = [score / top for score in sorted(scores, reverse=True)]
            shade = _shade(i, len(blocks))
            ax.plot(x, y, color=shade, lw=1.4, marker="." if n < SPARSE else "")
        cuts = {}
        for budget in smaller:
            if axis in budget["counts"] and axis in full["counts"]:
                kept = _units(budget["counts"][axis]) / _units(full["counts"][axis])
                cuts.setdefault(kept, []).append(colours[budget["name"]])
        for kept, equal in cuts.items():
            for i, colour in enumerate(equal):  # dashes alternate: all stay visible
                dashes = (3 * i, (3, 3 * (len(equal) - 1)))
                ax.axvline(kept, color=colour, lw=1.6, ls=dashes)
        ax.set(title=axis, xlim=(0, 1.03), ylim=(0, 1.05))
        ax.set(xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    lines = {f"kept by {b['name']}": colours[b["name"]] for b in smaller}
    if max(map(len, importance.values())) > 1:
        lines = {"first block": _shade(0, 2), "last block": _shade(1, 2)} | lines
    _legend(figure, lines)
    return figure


def plot_losses(results: Results) -> Figure | None:
    """Divergence of every budget over steps, and where stages begin."""
    rows, colours = list(results.get("metrics") or ()), _colours(results)
    losses = {
        name: [(r["step"], r[f"loss/{name}"]) for r in rows if f"loss/{name}" in r]
        for name in colours
    }
    positive = [y for points in losses.values() for _, y in points if y > 0]
    if not positive:
        return None
    figure = Figure(figsize=(8, 4.6))
    ax = figure.subplots()
    for stage, group in itertools.groupby(rows, key=lambda row: row.get("stage")):
        steps = [row["step"] for row in group]
        for name, points in losses.items():
            part = [(x, y) for x, y in points if steps[0] <= x <= steps[-1]]
            if part:
                colour, smooth = colours[name], _smooth(part, len(rows) // 100)
                ax.plot(*zip(*part, strict=True), color=colour, lw=0.7, alpha=0.3)
                marker = "." if len(part) < SPARSE else ""
                ax.plot(*zip(*smooth, strict=True), color=colour, lw=2, marker=marker)
        if steps[0] != rows[0]["step"]:
            ax.axvline(steps[0], color=GREY, lw=1, ls="--")
        if stage:
            middle, above = (steps[0] + steps[-1]) / 2, ax.get_xaxis_transform()
            ax.text(middle, 1.01, f"stage: {stage}", ha="center", transform=above)
    low, high = min(positive), max(positive)
    ax.set_yscale("log", nonpositive="mask")
    ax.set_ylim(max(low, high / 10**DECADES) / 1.3, high * 1.3)
    _plain_log(ax.yaxis, fine=high / low < 300)
    ax.margins(x=0.01)
    ax.xaxis.set_major_locator(MaxNLocator(**WHOLE_STEPS))
    ax.set(xlabel="training step", ylabel=DIVERGENCE.axis)
    _legend(figure, colours)
    return figure


def plot_orders(results: Results) -> Figure | None:
    """Divergence of untrained slices by axis, the largest gain on top."""
    orders = results.get("orders")
    if not orders:
        return None
    orders = sorted(orders, key=_gain)
    figure = Figure(figsize=(8, 1.4 + 0.34 * len(orders)))
    ax = figure.subplots()
    looks = (
        ("importance order", dict(marker="o", color=INK, ms=9, zorder=3)),
        ("random orders", dict(marker="o", mec=GREY, mfc="none")),
        ("their mean", dict(marker="|", color=GREY, ms=13, mew=1.8)),
    )
    for y, row in enumerate(orders):
        ours, random = [row["ours"]], row["random"]
        mean = [statistics.fmean(random)]
        ax.plot(ours + mean, [y, y], color=PALE, lw=3, zorder=1)
        for x, (label, look) in zip((ours, random, mean), looks, strict=True):
            label = None if y else label  # once
            ax.plot(x, [y] * len(x), ls="none", label=label, **look)
    labels = [f"{findings.order_name(r)}   {r['kept']} of {r['full']}" for r in orders]
    ax.set_yticks(range(len(orders)), labels)
    values = [value for row in orders for value in (row["ours"], *row["random"])]
    if min(values) > 0:
        ax.set_xscale("log")
        _plain_log(ax.xaxis, fine=max(values) / min(values) < 1000)
    ax.grid(visible=False, axis="y")
    ax.grid(visible=True, axis="x")
    ax.set_xlabel("KL from the parent before training (nats per token), left is better")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def _gain(row):
    """How far below the mean of random orders ours is, as a share of it."""
    mean = statistics.fmean(row["random"])
    return 1 - row["ours"] / mean if mean else 0.0


def _grid(panels, xlabel):
    """A figure with one axes for each panel, three in a row."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(8, 0.9 + 2.1 * rows))
    figure.supxlabel(xlabel, fontsize=10)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[len(panels) :]:
        ax.remove()
    return figure, axes[: len(panels)]


def _legend(figure, colours):
    lines = [Line2D([], [], color=c, lw=2.4, label=name) for name, c in colours.items()]
    figure.legend(handles=lines, loc="outside upper center", ncols=min(5, len(lines)))


def _colours(results):
    """Budget -> colour."""
    names = [budget["name"] for budget in results["budgets"]]
    if len(names) > len(PALETTE):
        shades = matplotlib.colormaps["viridis"]  # up to where it gets too pale
        return {name: shades(0.85 * i / len(names)) for i, name in enumerate(names)}
    return dict(zip(names, PALETTE, strict=False))


def _shade(i, n):
    """Grey for the first of `n` blocks, black for the last."""
    return str(0.65 * (1 - i / (n - 1))) if n > 1 else "0"


def _smooth(points, reach):
    """Every value replaced by the mean of those at most `reach` places away."""
    return [
        (x, statistics.fmean(y for _, y in points[max(0, i - reach) : i + reach + 1]))
        for i, (x, _) in enumerate(points)
    ]


def _plain_log(axis, *, fine):
    """Decimal labels on a logarithmic axis; `fine` adds 2 and 5 of every decade."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if fine else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _units(count):
    return sum(count) if isinstance(count, list | tuple) else count


def _short(n):
    """143K, 1.5M, 3.6B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(n) >= size:
            return f"{n / size:g}{unit}"
    return f"{n:g}"


# name -> how it is drawn, its caption, what is said where it cannot be drawn
PLOTS = {
    "budgets": (
        plot_budgets,
        "Every budget and its controls, against active parameters",
        "no budget was evaluated",
    ),
    "router": (
        plot_router,
        "Counts that the router prefers while it learns, drawn slightly apart, and "
        f"their cost over the target with the {ZONE:.0%} zone shaded",
        "the metrics hold no choices of a router",
    ),
    "importance": (
        plot_importance,
        "Importance by axis, sorted, one line per block; upright, the share of "
        "units that a budget keeps",
        "there are no scores",
    ),
    "orders": (
        plot_orders,
        "KL from the parent of untrained slices on one axis, in nats per token: ours "
        "against random orders",
        "untrained slices were not compared with random orders",
    ),
    "losses": (
        plot_losses,
        "KL from the parent by budget, faint as measured and smoothed over "
        f"neighbouring steps, at most {DECADES} decades; data change with the stage",
        "the metrics hold no losses of budgets",
    ),
}
