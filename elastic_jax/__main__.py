"""The command line: `python -m elastic_jax inspect|import|export|slice|generate ...`.

It parses, calls and prints. Exit codes: 0 done, 2 the input is wrong, 1 anything else,
such as a full disk.
"""

import argparse
import collections
import contextlib
import json
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
from elastic_jax.quantize import size_bytes
from elastic_jax.request import Reply, Request, parse_request
from elastic_jax.serving import Timing, open_server
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

    _add_generate(commands)
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


# Options of `generate` that are fields of a request, and what their values are.
REQUEST_OPTIONS = {
    "budget": (str, "who writes: a budget's name, or counts such as embed=1920"),
    "think": (str, "who thinks; with --answer"),
    "answer": (str, "who answers; with --think"),
    "max_new_tokens": (int, "tokens of the text or answer"),
    "thinking_cap": (int, "tokens of a thought"),
    "grace": (int, "tokens beyond the cap until the next line's end"),
    "hand_over": (str, "from thought to answer: reprefill or transplant"),
    "draft": (str, "who drafts tokens for the others to verify"),
    "draft_tokens": (int, "tokens drafted at a time"),
    "temperature": (float, "0 is greedy"),
    "top_k": (int, "0 is all"),
    "top_p": (float, "1 is all"),
    "seed": (int, "of what is drawn at random"),
}


def _add_generate(commands) -> None:
    command = commands.add_parser(
        "generate",
        help="write text; a small submodel may think, a large one answer",
        epilog="Chat templates are not run: a prompt is taken as it is.",
    )
    command.add_argument("checkpoint", help="nested checkpoint to read")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to go on with; - reads it")
    source.add_argument(
        "--jsonl",
        metavar="FILE",
        help='a request per line, such as {"prompt": "...", "budget": "small"}, with '
        "the options below as fields, an id and stop strings; - reads them",
    )
    for name, (kind, text) in REQUEST_OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        command.add_argument(flag, type=kind, help=text, default=argparse.SUPPRESS)
    command.add_argument("--stop", action="append", help="a string that ends the text")
    command.add_argument("--tokenizer", default="", help="a tokenizer.json")
    command.add_argument("--end-of-thinking", default="</think>", metavar="TEXT")
    command.add_argument("--batch", type=int, default=8, help="requests at a time")
    command.add_argument("--max-length", type=int, default=8192, help="tokens in all")
    command.add_argument(
        "--exact",
        action="store_true",
        help="the same bits however requests are batched; slower",
    )
    command.set_defaults(run=_generate)


def _generate(given) -> Iterator[str]:
    """Text as it is written for one prompt; a line of JSON per request for many."""
    wanted = {k: v for k, v in vars(given).items() if k in REQUEST_OPTIONS}
    if given.stop:
        wanted["stop"] = tuple(given.stop)
    requests, wrong = _requests(given, wanted)
    named = {name for request in requests for name in request.submodels}
    server = open_server(
        given.checkpoint,
        named,
        tokenizer=given.tokenizer,
        end_of_thinking=given.end_of_thinking,
        batch=given.batch,
        max_length=given.max_length,
        exact=given.exact,
    )
    timings: list[Timing] = []
    single = given.prompt is not None
    shown = _Typewriter() if single else None
    replies = server.serve(requests, on_timing=timings.append, on_text=shown)
    for reply in (*wrong, *replies):
        if not single:
            yield json.dumps(_line(reply), ensure_ascii=False)
        elif reply.error:
            raise ValueError(reply.error)
        else:
            shown.end()
    Console(stderr=True, **CONSOLE).print(_timing(timings))


def _requests(given, wanted) -> tuple[list[Request], list[Reply]]:
    """All requests, and replies to lines that are none."""
    if given.prompt is not None:
        prompt = sys.stdin.read() if given.prompt == "-" else given.prompt
        return [Request(prompt, **wanted)], []
    file = sys.stdin if given.jsonl == "-" else open(given.jsonl, encoding="utf-8")
    requests, wrong = [], []
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                requests.append(parse_request(json.loads(line), **wanted))
            except (ValueError, RecursionError) as error:
                wrong.append(Reply(number, None, error=f"line {number}: {error}"))
    return requests, wrong


def _line(reply: Reply) -> dict:
    """What a reply says, as fields of JSON."""
    if reply.error:
        return {"id": reply.id, "error": reply.error}
    fields = {"id": reply.id, "text": reply.text, "tokens": reply.tokens}
    fields |= {"stopped": reply.stopped, "rounds": reply.rounds}
    if reply.thought is not None:
        thought = {"thought": reply.thought, "thought_tokens": reply.thought_tokens}
        fields |= thought | {"capped": reply.capped}
    return fields


class _Typewriter:
    """Prints what is new of a text; half a letter waits for its other half."""

    def __init__(self):
        self._printed = ""

    def __call__(self, number: int, text: str) -> None:
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(self._printed) :], end="", flush=True)
            self._printed = text

    def end(self) -> None:
        print()


def _timing(timings: Sequence[Timing]) -> Table:
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


if __name__ == "__main__":
    sys.exit(main())
