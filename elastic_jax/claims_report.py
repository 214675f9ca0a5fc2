"""The page of all claims: verdicts, tables and plots, from lines of results alone.

A folder has a file of lines per claim, `nested.jsonl`. Plots are written into it and
the page beside it. A claim without lines is said to have not been run.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from elastic_jax.claims import CLAIMS, Claim
from elastic_jax.report import PALETTE, STYLE
from elastic_jax.tables import bullets, format_seconds, listed, markdown_table
from elastic_jax.verdicts import OPEN, REFUTED, SHOWN, Finding, written

PAGE = "RESULTS.md"
NEEDED = (
    *("claim", "arm", "seed", "seconds", "smoke", "evaluation", "date", "commit"),
    *("device", "versions", "configuration", "found"),
)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none where there is no file.

    Raises:
      ValueError: names the line that is not a row, or is one twice.
    """
    if not path.exists():
        return []
    rows, seen = [], {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: no JSON: {error}; delete the line") from None
        if not isinstance(row, dict) or (lacks := [k for k in NEEDED if k not in row]):
            what = f"lacks {', '.join(lacks)}" if isinstance(row, dict) else "is no row"
            raise ValueError(f"{where} {what}; delete the line to measure it again")
        key = row["arm"], row["seed"]
        if key in seen:
            raise ValueError(f"{where}: {key} stands in line {seen[key]} too")
        seen[key] = number
        rows.append(row)
    return rows


def read_folder(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Claim -> its rows.

    Raises:
      ValueError: lines that are no rows, or rows of one claim under several
        configurations.
    """
    every = {name: read_lines(directory / f"{name}.jsonl") for name in CLAIMS}
    for name, rows in every.items():
        wrong = {row["claim"] for row in rows} - {name}
        several = {row["configuration"] for row in rows}
        if wrong or len(several) > 1:
            what = f"of {listed(wrong)}" if wrong else f"of configurations {several}"
            raise ValueError(f"{directory / name}.jsonl: has rows {what}")
    return every


def write_claims_report(directory: str | os.PathLike) -> Path:
    """Writes `RESULTS.md` beside a folder, into it a plot for each claim with rows.

    Returns:
      the path of the page, a text that depends on the lines alone.

    Raises:
      ValueError: a directory that is none, or lines that are no rows, or rows of one
        claim under several configurations.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: expected a folder with lines, NAME.jsonl")
    every = read_folder(directory)
    parts = [_head(every), summary(every)]
    for name, rows in every.items():
        picture = directory / f"{name}.png"
        picture.unlink(missing_ok=True)
        if rows:
            with matplotlib.rc_context(STYLE):
                plot_cells(CLAIMS[name], rows).savefig(picture)
        parts += _section(name, CLAIMS[name], rows, directory.name)
    path = directory.resolve().parent / PAGE
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _head(every: Mapping[str, Sequence]) -> str:
    text = (
        "# The claims, reproduced small\n\n"
        "Every number here comes from lines of results, one per arm and seed; no word "
        "of a verdict is written by hand. *Shown* and *refuted* need the whole 95% "
        "interval on one side of what was asked; anything else is *not decided*, and "
        "what was asked is not moved. ± is half of that interval: the larger of the "
        "one between seeds (Student's t) and the one between problems."
    )
    if any(row["smoke"] for rows in every.values() for row in rows):
        text += "\n\n> A smoke run: it shows that everything works; "
        text += "its numbers mean little."
    return text


def summary(every: Mapping[str, Sequence], page: str = "") -> str:
    """A table with a row per claim, each with a link to its section of `page`."""

    def verdicts(name: str) -> str:
        if not every[name]:
            return "not run"
        found = [f.verdict for f in CLAIMS[name].findings(every[name])]
        counts = {v: found.count(v) for v in (SHOWN, REFUTED, OPEN)}
        said = [f"{n} {verdict}" for verdict, n in counts.items() if n]
        return ", ".join(said) or "measured, nothing was asked"

    return markdown_table(
        every,
        {
            "claim": lambda name: f"[{CLAIMS[name].title}]({page}#{_anchor(name)})",
            "statement": lambda name: CLAIMS[name].statement,
            "verdicts": verdicts,
            "seeds": lambda name: len({row["seed"] for row in every[name]}) or None,
            "time": lambda n: _spent(every[n]) if every[n] else None,
        },
    )


def _anchor(name: str) -> str:
    kept = (c for c in CLAIMS[name].title.lower() if c.isalnum() or c in " -")
    return "".join(kept).replace(" ", "-")


def _spent(rows: Sequence[Mapping]) -> str:
    return format_seconds(sum(row["seconds"] for row in rows))


def _section(
    name: str, claim: Claim, rows: Sequence[Mapping], folder: str
) -> Iterator[str]:
    command = f"python experiments/claims.py --claim={name} --workdir=DIR"
    yield f"## {claim.title}"
    yield f"*{claim.statement}* Published: {claim.published}"
    if not rows:
        yield f"Not run. `{command}`"
        return
    findings = list(claim.findings(rows))
    yield markdown_table(
        findings,
        {
            "finding": lambda f: f.what,
            "measured": lambda f: f.said,
            "asked": lambda f: f.wanted,
            "verdict": lambda f: f.verdict,
        },
    )
    caption = f"{claim.axis[0].upper()}{claim.axis[1:]}"
    if any(cell.found and cell.found.half for cell in claim.cells(rows)):
        caption += ", with 95% intervals"
    yield f"![{caption}]({folder}/{name}.png)\n\n{caption}."
    yield _table(claim, rows)
    yield f"What it means:\n\n{bullets(_meaning(findings))}"
    yield f"Scope: {claim.scope}"
    if claim.tried:
        yield f"What was tried: {claim.tried}"
    yield _origin(command, rows)


def _meaning(findings: Sequence[Finding]) -> Iterator[str]:
    """The lessons, in the words that numbers choose; none of what is left to chance."""
    found = [finding for finding in findings if finding.found is not None]
    known = [finding for finding in found if finding.found.half is not None]
    yield from (finding.meaning for finding in known if finding.lesson)
    if len(known) < len(found):
        yield "Where there is no ± there is one seed: its chance is not known."
    if all(finding.asked is None for finding in findings):
        yield "Nothing was asked of these numbers: they are reported as they came."


def _table(claim: Claim, rows: Sequence[Mapping]) -> str:
    cells = list(claim.cells(rows))
    at = {(cell.group, cell.series): cell.found for cell in cells}
    columns = {claim.axis: lambda group: group}
    for series in dict.fromkeys(cell.series for cell in cells):

        def said(group: str, series: str = series) -> str | None:
            found = at.get((group, series))
            return None if found is None else written(found, claim.unit)

        columns[series] = said
    return markdown_table(dict.fromkeys(cell.group for cell in cells), columns)


def _origin(command: str, rows: Sequence[Mapping]) -> str:
    dates = sorted({row["date"] for row in rows})
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    versions = {f"{n} {v}" for row in rows for n, v in row["versions"].items()}
    devices = sorted({row["device"] for row in rows})
    asked, judged = rows[0]["evaluation"], ""
    if problems := sorted({*_problems(rows)}):
        judged = (
            f"; {listed(map(str, problems))} problems of {asked['min_steps']} to "
            f"{asked['max_steps']} steps"
        )
    return (
        f"`{command}`: {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit "
        f"{listed(commits)}, {listed(devices)}, {listed(sorted(versions))}; "
        f"{len(rows)} lines, {_spent(rows)} in all, with the parent where it was "
        f"not there yet{judged}."
    )


def _problems(found: Any) -> Iterator[int]:
    """How many problems each model of rows was judged by."""
    if isinstance(found, Mapping):
        if "right" in found:
            yield len(found["right"])
        found = list(found.values())
    if isinstance(found, list):
        for each in found:
            yield from _problems(each)


def plot_cells(claim: Claim, rows: Sequence[Mapping]) -> Figure:
    """Groups side by side, or at their place on an axis, one colour per series."""
    cells = [cell for cell in claim.cells(rows) if cell.found is not None]
    if numeric := any(cell.at is not None for cell in cells):
        cells = [cell for cell in cells if cell.at is not None]
    groups = list(dict.fromkeys(cell.group for cell in cells))
    series = list(dict.fromkeys(cell.series for cell in cells))
    figure = Figure(figsize=(8, 4.6))
    ax = figure.subplots()
    for i, name in enumerate(series):
        own = [cell for cell in cells if cell.series == name]
        aside = 0 if numeric else 0.7 * ((i + 0.5) / len(series) - 0.5)
        ax.errorbar(
            [c.at if numeric else groups.index(c.group) + aside for c in own],
            [cell.found.value for cell in own],
            yerr=[cell.found.half or 0.0 for cell in own],
            fmt="o" if i < len(PALETTE) else "s",
            color=PALETTE[i % len(PALETTE)],
            ms=5,
            elinewidth=0.9,
            label=name,
        )
    if numeric:
        ax.set_xlabel(claim.across)
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    else:
        crowded = len(groups) > 4 or sum(map(len, groups)) > 80
        tilted = {"rotation": 30, "ha": "right"} if crowded else {}
        ax.set_xticks(range(len(groups)), groups, **tilted)
    ax.set_ylim(bottom=0)  # no unit has values below
    if claim.unit == "percent":  # nor shares above
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_ylim(top=min(1.05, ax.get_ylim()[1]))
    ax.set_ylabel(claim.axis)
    figure.legend(loc="outside upper center", ncols=4)
    return figure
