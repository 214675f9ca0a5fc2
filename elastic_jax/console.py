"""What the command line shows: tables, bars, and text as it is written.

What a checkpoint says of itself is text here, never markup.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.pretty import Pretty
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import elastic_jax as ej
from elastic_jax.checkpoint import Nested
from elastic_jax.nesting import full_counts
from elastic_jax.post_training import Quantized
from elastic_jax.quantize import names, size_bytes
from elastic_jax.serving import Timing
from elastic_jax.tables import format_bytes, format_count, format_share

PLAIN = {"markup": False, "emoji": False, "highlight": False}
COUNTED = ("calibrate",)  # progress in pieces; all else is in bytes
COST_HEADINGS = ("parameter", "stored in", "parameters", "size")
ERROR_HEADINGS = (
    *("parameter", "format", "relative", "worst member", "saturated", "zeroed"),
    "dead blocks",
)


def show(shown: Any, *, stderr: bool = False) -> None:
    """Prints a line or a table."""
    Console(stderr=stderr, **PLAIN).print(shown, soft_wrap=isinstance(shown, str))


@contextlib.contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yields `progress(what, done, total)`: a bar for each, with the time left."""
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, **PLAIN)) as shown:
        tasks: dict[str, int] = {}

        def progress(what: str, done: int, total: int) -> None:
            form = format_count if what in COUNTED else format_bytes
            amount = f"{form(done)} / {form(total)}"
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total, amount=amount)
            shown.update(tasks[what], completed=done, amount=amount)

        yield progress


def contents(nested: Nested) -> Iterator[Table]:
    """What a nested checkpoint holds, from its metadata."""
    yield _configuration(nested.cfg)
    yield _budgets(nested)
    yield _storage(nested)
    yield _provenance(nested)


def quantization(done: Quantized, cfg: ej.ModelConfig) -> Iterator[Table]:
    """What each choice costs, and how far off it is."""
    table = _table("quantized", *COST_HEADINGS, numbers=2)
    for row in done.table:
        table.add_row(
            f"{row['kind']}/{row['parameter']}",
            row["format"],
            format_count(row["parameters"]),
            format_bytes(row["bytes"]),
        )
    table.caption = f"{format_bytes(sum(row['bytes'] for row in done.table))} in all"
    yield table
    called = names(ej.param_specs(cfg), cfg)
    table = _table("errors", *ERROR_HEADINGS, numbers=5)
    for error in done.errors:
        shares = error.relative, error.worst, error.saturated, error.zeroed
        block = f"{error.path[1]}: " if error.path[0] == "layers" else ""
        table.add_row(
            f"{block}{called[error.path]}",
            error.format,
            *map(format_share, (*shares, error.dead_blocks)),
        )
    borrowed = sum(map(len, done.never_met.values()))
    if borrowed:
        table.caption = (
            f"{borrowed} input scales of experts that met no token: borrowed"
        )
    yield table


class Typewriter:
    """Prints what is new of a text; half a letter waits for its other half."""

    def __init__(self):
        self._printed = ""

    def __call__(self, number: int, text: str) -> None:
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(self._printed) :], end="", flush=True)
            self._printed = text

    def end(self) -> None:
        print()


def timing_table(timings: Sequence[Timing]) -> Table:
    """Seconds and tokens by phase, over all batches."""
    table = _table("timing", "phase", "seconds", "tokens", "tokens/s", numbers=3)
    seconds: collections.Counter = collections.Counter()
    tokens: collections.Counter = collections.Counter()
    for timing in timings:
        seconds.update(timing.seconds)
        tokens.update(timing.tokens)
    for phase, spent in seconds.items():
        written = tokens.get(phase)
        rate = f"{written / spent:,.1f}" if written else ""
        count = "" if written is None else format_count(written)
        table.add_row(phase, f"{spent:.3f}", count, rate)
    firsts = sorted(t.first_token_seconds for t in timings)
    if firsts:
        requests = sum(t.requests for t in timings)
        table.caption = (
            f"{requests} requests in {len(timings)} batches\nfirst token after "
            f"{firsts[len(firsts) // 2]:.3f} s (median)\n{firsts[-1]:.3f} s (longest)"
        )
    return table


def _configuration(cfg: ej.ModelConfig) -> Table:
    table = _table("configuration", "field", "value")
    for field, value in cfg.to_dict().items():
        table.add_row(field, str(value))
    return table


def _budgets(nested) -> Table:
    """The parent and every named budget; counts only where they differ from it."""
    cfg, specs = nested.cfg, ej.param_specs(nested.cfg)
    whole = full_counts(cfg)
    parent = ej.cost(specs, cfg)
    headings = ("name", "counts", "total", "active", "of parent", "in bf16", "stored")
    table = _table("budgets", *headings, numbers=5)
    for name, counts in {"parent": None, **nested.budgets}.items():
        cost = ej.cost(specs, cfg, counts=counts)
        cut = {a: n for a, n in (counts or {}).items() if n != whole.get(a)}
        table.add_row(
            name,
            "\n".join(f"{axis} {n}" for axis, n in cut.items()) or "all",
            format_count(cost.total_params),
            format_count(cost.active_params),
            format_share(cost.active_params / parent.active_params),
            format_bytes(cost.weight_bytes("bf16")),
            format_bytes(size_bytes(nested.lazy(counts)[0])),
        )
    return table


def _storage(nested) -> Table:
    """How much of what is stored how; what it takes on disk, all together."""
    table = _table("storage", "part", "stored in", "arrays", "size", numbers=2)
    for row in nested.storage():
        size, weights = row["bytes"], row["elements"]
        bits = f", {8 * size / weights:.2f} bits a weight" if row["packed"] else ""
        table.add_row(
            row["part"],
            f"{row['format']}{bits}",
            format_count(row["arrays"]),
            format_bytes(size),
        )
    table.caption = f"{format_bytes(nested.size_bytes)} on disk, compressed"
    return table


def _provenance(nested) -> Table:
    table = _table("provenance", "what", "value")
    for name, value in nested.provenance.items():
        table.add_row(name, value if isinstance(value, str) else Pretty(value))
    return table


def _table(title: str, *headings: str, numbers: int = 0) -> Table:
    """A table whose last `numbers` columns are numbers."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    words = len(headings) - numbers
    for heading in headings[:words]:
        table.add_column(heading, overflow="fold")
    for heading in headings[words:]:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
