"""The command line: `python -m elastic_jax inspect CHECKPOINT`.

It parses, calls and prints. Exit codes: 0 done, 2 the input is wrong.
"""

import argparse
import collections
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.pretty import Pretty
from rich.table import Table

import elastic_jax as ej
from elastic_jax.nesting import full_counts
from elastic_jax.tables import format_bytes, format_count, format_share


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code of the process."""
    parser = argparse.ArgumentParser(prog="python -m elastic_jax")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="print what a checkpoint holds")
    inspect.add_argument("checkpoint", help="directory of a nested checkpoint")
    inspect.set_defaults(tables=lambda given: _inspect(given.checkpoint))
    given = parser.parse_args(arguments)
    # What a checkpoint says of itself is text, never markup.
    console = Console(markup=False, emoji=False, highlight=False)
    try:
        for table in given.tables(given):
            console.print(table)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _inspect(path: str) -> Iterator[Table]:
    """Configuration, budgets, storage and provenance; no array is read."""
    nested = ej.open_nested(path)
    yield _configuration(nested.cfg)
    yield _budgets(nested)
    yield _storage(nested)
    yield _provenance(nested)


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
    headings = ("name", "counts", "total", "active", "of parent", "in bf16")
    table = _table("budgets", *headings, numbers=4)
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
        )
    return table


def _storage(nested) -> Table:
    """How many arrays of which dtype; what they take on disk, all together."""
    kinds = ((name.split(".")[0], dtype) for name, dtype in nested.dtypes.items())
    table = _table("storage", "part", "dtype", "arrays", numbers=1)
    for (part, dtype), number in sorted(collections.Counter(kinds).items()):
        table.add_row(part, dtype, format_count(number))
    table.caption = f"{format_bytes(nested.size_bytes)} on disk"
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


if __name__ == "__main__":
    sys.exit(main())
