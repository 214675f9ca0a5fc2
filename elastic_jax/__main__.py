"""The command line: `python -m elastic_jax inspect|import|export|slice ...`.

It parses, calls and prints. Exit codes: 0 done, 2 the input is wrong, 1 anything else,
such as a full disk.
"""

import argparse
import collections
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.pretty import Pretty
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import elastic_jax as ej
from elastic_jax import convert
from elastic_jax.nesting import full_counts
from elastic_jax.tables import format_bytes, format_count, format_share

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# What a checkpoint says of itself is text, never markup.
CONSOLE = {"markup": False, "emoji": False, "highlight": False}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code of the process."""
    given = _parser().parse_args(arguments)
    console = Console(**CONSOLE)
    # So that a command that is told to stop leaves no half-written directory.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        for shown in given.run(given):
            console.print(shown, soft_wrap=isinstance(shown, str))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m elastic_jax")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="print what a checkpoint holds")
    inspect.add_argument("checkpoint", help="directory of a nested checkpoint")
    inspect.set_defaults(run=lambda given: _inspect(given.checkpoint))

    reader = commands.add_parser("import", help="Hugging Face -> nested checkpoint")
    reader.add_argument("directory", help="config.json and safetensors")
    reader.add_argument("checkpoint", help="nested checkpoint to write")
    reader.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="NAME:AXIS=N,...",
        help="name a submodel of weights that are in importance order; repeatable",
    )
    reader.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="take NaN, infinite and dead weights all the same",
    )
    reader.set_defaults(run=_import)

    writer = commands.add_parser("export", help="submodel -> Hugging Face")
    writer.add_argument("checkpoint", help="nested checkpoint to read")
    writer.add_argument("directory", help="Hugging Face directory to write")
    writer.add_argument("--dtype", choices=DTYPES, help="cast; default: as stored")
    writer.add_argument(
        "--uniform",
        action="store_true",
        help="fill blocks of differing widths up with zeros, where that is exact",
    )
    writer.set_defaults(run=_export)

    cutter = commands.add_parser("slice", help="submodel -> nested checkpoint")
    cutter.add_argument("checkpoint", help="nested checkpoint to read")
    cutter.add_argument("smaller", help="nested checkpoint to write")
    cutter.set_defaults(run=_slice)

    for command, required in ((writer, False), (cutter, True)):
        command.add_argument(
            "--budget",
            required=required,
            metavar="NAME|AXIS=N,...",
            help="a budget's name, or counts such as embed=1920,expert_ffn=960",
        )
    for command in (reader, writer, cutter):
        command.add_argument(
            "--force", action="store_true", help="replace what is there"
        )
    return parser


def _import(given) -> list[str]:
    return _written(
        given.checkpoint,
        lambda progress: convert.import_hf(
            given.directory,
            given.checkpoint,
            budgets=dict(map(_named_counts, given.budget)),
            allow_nonfinite=given.allow_nonfinite,
            overwrite=given.force,
            progress=progress,
        ),
    )


def _export(given) -> list[str]:
    return _written(
        given.directory,
        lambda progress: convert.export_hf(
            given.checkpoint,
            given.directory,
            given.budget and convert.parse_budget_or_counts(given.budget),
            dtype=given.dtype and DTYPES[given.dtype],
            pad_to_uniform=given.uniform,
            overwrite=given.force,
            progress=progress,
        ),
    )


def _slice(given) -> list[str]:
    return _written(
        given.smaller,
        lambda progress: convert.slice_nested(
            given.checkpoint,
            given.smaller,
            convert.parse_budget_or_counts(given.budget),
            overwrite=given.force,
            progress=progress,
        ),
    )


def _written(target: str, write: Callable) -> list[str]:
    """Writes with a bar; what there is to say about it."""
    with _bars() as progress:
        notes = write(progress)
    return [*notes, f"written: {target}"]


def _named_counts(text: str) -> tuple[str, dict]:
    name, _, counts = text.partition(":")
    parsed = convert.parse_budget_or_counts(counts)
    if not name or not isinstance(parsed, dict):
        raise ValueError(f"--budget {text!r}: expected NAME:AXIS=N,AXIS=N,...")
    return name, parsed


@contextlib.contextmanager
def _bars():
    """Yields `progress(what, done, total)` in bytes, with the time left."""
    columns = (
        TextColumn("{task.description:<6}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, **CONSOLE)) as shown:
        tasks: dict[str, int] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done)

        yield progress


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
