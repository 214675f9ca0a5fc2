"""Numbers with their units, and tables, as a person reads them.

None stands for what was not measured, and is written as a dash.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

NONE = "–"


def format_count(n: float | None) -> str:
    """A number of parameters, problems or steps: 241,312."""
    return NONE if n is None else f"{n:,.0f}"


def format_bytes(n: float | None) -> str:
    """A size in binary units: 512 B, 471.3 KiB, 58.8 GiB."""
    if n is None:
        return NONE
    if n < 1023.5:
        return f"{n:,.0f} B"
    power = 1
    while n / 1024**power >= 1023.95 and power < 3:
        power += 1
    return f"{n / 1024**power:,.1f} {'KMG'[power - 1]}iB"


def format_seconds(x: float | None) -> str:
    """A duration: 8.1 s, 3 min 03 s, 1 h 05 min."""
    if x is None:
        return NONE
    if x < 59.95:
        return f"{x:.1f} s"
    minutes, seconds = divmod(round(x), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_share(x: float | None) -> str:
    """A fraction in percent: 97.1%."""
    return NONE if x is None else f"{x:.1%}"


def format_ratio(x: float | None) -> str:
    """Cost over target: 1.023."""
    return NONE if x is None else f"{x:.3f}"


def format_nats(x: float | None) -> str:
    """A divergence, to three digits: 0.0340."""
    return NONE if x is None else f"{x:#.3g}".rstrip(".")


def format_bits(x: float | None) -> str:
    """Bits per byte: 2.104."""
    return NONE if x is None else f"{x:.3f}"


def format_several(values: Sequence[float] | None, form: Callable) -> str:
    """The mean, and the range where there is more than one value."""
    if not values:
        return NONE
    text = form(statistics.fmean(values))
    if len(values) > 1:
        text += f" ({form(min(values))} to {form(max(values))})"
    return text


def listed(words: Iterable[str]) -> str:
    """Words as a list, at least one: a, b and c."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"* {line}" for line in lines)


def markdown_table(
    rows: Iterable[Any], columns: Mapping[str, Callable[[Any], Any]]
) -> str:
    """A Markdown table, aligned also as plain text: first column left, others right.

    Args:
      columns: heading -> what stands there for a row; None becomes a dash.
    """
    lines = [list(columns)]
    for row in rows:
        cells = [cell(row) for cell in columns.values()]
        texts = (NONE if cell is None else str(cell) for cell in cells)
        lines.append([text.replace("|", "\\|") for text in texts])
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<"] + [">"] * (len(widths) - 1)
    rule = ["-" * (w - 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)]
    lines.insert(1, rule)
    return "\n".join(
        "| "
        + " | ".join(
            f"{text:{side}{width}}"
            for text, side, width in zip(line, sides, widths, strict=True)
        )
        + " |"
        for line in lines
    )
