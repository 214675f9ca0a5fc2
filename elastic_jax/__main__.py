"""The command line: `python -m elastic_jax COMMAND ...`.

It parses and calls; `console` shows. Exit codes: 0 done, 2 the input is wrong, 1
anything else, such as a full disk.
"""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import elastic_jax as ej
from elastic_jax import console, convert
from elastic_jax.post_training import CalibrationText, quantize_nested
from elastic_jax.quantize import Recipe
from elastic_jax.request import Reply, Request, parse_request
from elastic_jax.serving import Timing, open_server
from elastic_kernels.quant_array import BLOCK_SCALES, FORMATS

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code of the process."""
    given = _parser().parse_args(arguments)
    # So that a command that is told to stop leaves no half-written directory.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        for shown in given.run(given):
            console.show(shown)
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
    inspect.set_defaults(run=_inspect)

    reader = commands.add_parser("import", help="Hugging Face -> nested checkpoint")
    reader.add_argument(
        "directory",
        help="config.json and safetensors, in BF16 or quantized to FP8 and NVFP4",
    )
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
        help="take NaN, infinite and dead weights and scales all the same",
    )
    reader.set_defaults(run=_import)

    writer = commands.add_parser("export", help="submodel -> Hugging Face")
    writer.add_argument("checkpoint", help="nested checkpoint to read")
    writer.add_argument("directory", help="Hugging Face directory to write")
    writer.add_argument(
        "--dtype",
        choices=DTYPES,
        help="cast what is not quantized; default: as stored",
    )
    writer.add_argument(
        "--uniform",
        action="store_true",
        help="fill blocks of differing widths up with zeros, where that is exact",
    )
    quantized = writer.add_mutually_exclusive_group()
    quantized.add_argument(
        "--format",
        choices=("modelopt", "compressed-tensors"),
        help="layout of quantized weights: NVIDIA's, for vLLM, SGLang and TensorRT-LLM "
        "(default), or the one that transformers reads too",
    )
    quantized.add_argument(
        "--dequantize",
        dest="format",
        action="store_const",
        const="plain",
        help="write quantized weights as plain ones, for what reads only those",
    )
    writer.set_defaults(run=_export)

    cutter = commands.add_parser("slice", help="submodel -> nested checkpoint")
    cutter.add_argument("checkpoint", help="nested checkpoint to read")
    cutter.add_argument("smaller", help="nested checkpoint to write")
    cutter.set_defaults(run=_slice)

    packer = _add_quantize(commands)
    _add_generate(commands)
    for command, required in ((writer, False), (cutter, True)):
        command.add_argument(
            "--budget",
            required=required,
            metavar="NAME|AXIS=N,...",
            help="a budget's name, or counts such as embed=1920,expert_ffn=960",
        )
    for command in (reader, writer, cutter, packer):
        command.add_argument(
            "--force", action="store_true", help="replace what is there"
        )
    return parser


def _add_quantize(commands) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "quantize",
        help="nested checkpoint -> the same in FP8 or NVFP4",
        description="Rounds the whole parent once; every budget is a slice of the "
        "result. With text, activations are calibrated, and rounded in use, too.",
    )
    command.add_argument("checkpoint", help="nested checkpoint to read")
    command.add_argument("packed", help="nested checkpoint to write")
    command.add_argument("--format", choices=FORMATS, default="nvfp4")
    command.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="PATTERN=FORMAT",
        help="on top of the Nano v3 recipe, the last that matches holds: "
        "'attention/*=fp8', 'moe/up=keep', '*=nvfp4'; repeatable",
    )
    command.add_argument(
        "--block-scale",
        choices=BLOCK_SCALES,
        default="max",
        help="how scales of NVFP4 blocks are found",
    )
    command.add_argument(
        "--calibrate",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text that activations are calibrated on: txt, jsonl or parquet",
    )
    sizes = {"rows": 128, "context": 512, "batch": 8}
    for name, n in sizes.items():
        command.add_argument(
            f"--{name}", type=int, default=n, help=f"of the calibration; default: {n}"
        )
    command.add_argument(
        "--state",
        default="",
        metavar="FILE",
        help="keeps the calibration, so that it continues where it was stopped",
    )
    command.set_defaults(run=_quantize)
    return command


def _quantize(given) -> Iterator[Any]:
    """Writes, then says what each choice costs and how far off it is."""
    rules = tuple(tuple(rule.rpartition("=")[::2]) for rule in given.rule)
    text = None
    if given.calibrate:
        sizes = {name: getattr(given, name) for name in ("rows", "context", "batch")}
        text = CalibrationText(tuple(given.calibrate), **sizes, state=given.state)
    with console.bars() as progress:
        done = quantize_nested(
            given.checkpoint,
            given.packed,
            Recipe(given.format, rules, given.block_scale),
            calibration=text,
            overwrite=given.force,
            progress=progress,
        )
    yield from console.quantization(done, ej.open_nested(given.packed).cfg)
    if text is None:
        yield "not calibrated: activations stay as they are"
    yield f"written: {given.packed}"


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
    shown = console.Typewriter() if single else None
    replies = server.serve(requests, on_timing=timings.append, on_text=shown)
    for reply in (*wrong, *replies):
        if not single:
            yield json.dumps(_line(reply), ensure_ascii=False)
        elif reply.error:
            raise ValueError(reply.error)
        else:
            shown.end()
    console.show(console.timing_table(timings), stderr=True)


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
            format=given.format or "modelopt",
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
    with console.bars() as progress:
        notes = write(progress)
    return [*notes, f"written: {target}"]


def _named_counts(text: str) -> tuple[str, dict]:
    name, _, counts = text.partition(":")
    parsed = convert.parse_budget_or_counts(counts)
    if not name or not isinstance(parsed, dict):
        raise ValueError(f"--budget {text!r}: expected NAME:AXIS=N,AXIS=N,...")
    return name, parsed


def _inspect(given) -> Iterator[Any]:
    """Configuration, budgets, storage and provenance; no array is read."""
    yield from console.contents(ej.open_nested(given.checkpoint))


if __name__ == "__main__":
    sys.exit(main())
