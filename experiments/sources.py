"""What an experiment trains on, and how a model is judged there: `config.data.source`.

A task holds its data by use and says what is measured; the phases of an experiment
ask no further. `SOURCES` has one function for every value of `data.source`.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import elastic_jax as ej
from elastic_jax.corpus import Corpus, read_corpus
from elastic_jax.data import Mixture, Source
from elastic_jax.distill import cross_entropy_loss
from elastic_jax.measures import BITS_PER_BYTE, EXACT_ANSWERS, Measure
from elastic_jax.packing import Rows, split, stacked
from experiments.tasks import EOS, Problem, ReasoningTask, prompts, score

Groups = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Task:
    """Data by use, and how a model is judged.

    Attributes:
      measure: of `evaluate` and `check`.
      vocab: every token is below it.
      data: rows for every stage by its name, and for "parent", "calibration" and
        "evaluation".
      evaluate: (params, cfg) -> `value`, and `parts`, name -> the value of a part;
        where answers are right or wrong, `right` has a 0 or 1 for each.
      check: (params, cfg) -> the value alone: of a parent, also while it trains.
      evaluation: how `evaluate` measures, for the report.
      files: path -> size and digest of every file that was read.
      tokenizer: a `tokenizer.json` for the checkpoint; b"" is bytes, or the parent's.
    """

    measure: Measure
    vocab: int
    data: Mapping[str, Source]
    evaluate: Callable[[Any, ej.ModelConfig], dict[str, Any]]
    check: Callable[[Any, ej.ModelConfig], float]
    evaluation: Mapping[str, Any]
    files: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: bytes = b""


# ------------------------------------------------------------- the reasoning task


def reasoning(values: Mapping[str, Any], stages: Groups) -> Task:
    """Generated problems; measured are exact answers.

    Raises:
      ValueError: with every problem of the parameters.
    """
    if values["data"]["files"]:
        raise ValueError("data.files: needs data.source='files', got 'reasoning'")
    training, evaluation = values["parent_training"], values["evaluation"]

    def task(group: Mapping[str, Any], part: str) -> ReasoningTask:
        return ReasoningTask(
            min_steps=group["min_steps"],
            max_steps=group["max_steps"],
            context=group["context"],
            modulus=values["modulus"],
            code_values=values["code_values"],
            seed=values["seed"],
            split=part,
        )

    data = all_made(
        {
            "parent": lambda: task(training, "train"),
            "calibration": lambda: task(training, "calibration"),
            "evaluation": lambda: task(evaluation, "evaluation"),
            **{n: functools.partial(task, g, "train") for n, g in stages.items()},
        }
    )

    def check(params: Any, cfg: ej.ModelConfig) -> float:
        count, seed = training["examples"], values["seed"] + 1
        problems = data["parent"].problems(count, seed=seed)
        return float(np.mean(solve(params, cfg, problems)))

    def evaluate(params: Any, cfg: ej.ModelConfig) -> dict[str, Any]:
        count = evaluation["examples"]
        problems = data["evaluation"].problems(count, seed=values["seed"])
        right, by_steps = solve(params, cfg, problems), {}
        for problem, correct in zip(problems, right, strict=True):
            by_steps.setdefault(f"{problem.steps} steps", []).append(correct)
        parts = {name: float(np.mean(each)) for name, each in by_steps.items()}
        marks = "".join("01"[correct] for correct in right)
        return {"value": float(np.mean(right)), "parts": parts, "right": marks}

    limits = {name: evaluation[name] for name in ("min_steps", "max_steps")}
    return Task(
        measure=EXACT_ANSWERS,
        vocab=len(data["parent"].vocabulary),
        data=data,
        evaluate=evaluate,
        check=check,
        evaluation={"problems": evaluation["examples"]} | limits,
        tokenizer=data["parent"].tokenizer(),
    )


def solve(params: Any, cfg: ej.ModelConfig, problems: Sequence[Problem]) -> list[bool]:
    """Whether each problem is solved by generating from its prompt."""
    tokens, lengths = prompts(problems)
    longest = max(len(p.tokens) - len(p.prompt) for p in problems)
    # A little more than the longest solution: a model may be wrong at length.
    out = ej.generate(
        params,
        tokens,
        cfg,
        max_new_tokens=longest + 4,
        lengths=lengths,
        stop_tokens=EOS,
    )
    rows = zip(np.asarray(out.tokens), np.asarray(out.lengths), problems, strict=True)
    return [score(row[:n], problem) for row, n, problem in rows]


# -------------------------------------------------------------------- text in files


def files(values: Mapping[str, Any], stages: Groups) -> Task:
    """Text or tokens from files; measured are bits per byte of held-out documents.

    Raises:
      ValueError: with every problem of the files.
    """
    group, evaluation = values["data"], values["evaluation"]
    training, weights = values["parent_training"], group["weights"]

    def fitting() -> None:
        if weights and len(weights) != len(group["files"]):
            raise ValueError(
                f"data.weights: {len(weights)} weights for {len(group['files'])} "
                "entries of data.files"
            )

    def read() -> Corpus:
        return read_corpus(group["files"], tokenizer=group["tokenizer"])

    corpus = all_made({"weights": fitting, "corpus": read})["corpus"]
    documents = split(corpus.documents, group["held_out"])
    train = documents["train"]

    def rows(group: Mapping[str, Any]) -> Source:
        if not weights:
            return Rows(train, group["context"])
        sources = range(len(weights))
        each = [Rows(train.where(train.source == s), group["context"]) for s in sources]
        return Mixture(each, weights)

    def held_out(name: str, context: int, count: int) -> Rows:
        try:
            return Rows(documents[name], context).spread(count)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; raise data.held_out") from error

    calibrating = max(values["calibration"]["rows"], values["orders"]["rows"])
    data = all_made(
        {
            "parent": lambda: rows(training),
            "calibration": lambda: held_out(
                "calibration", training["context"], calibrating
            ),
            "evaluation": lambda: held_out(
                "evaluation", evaluation["context"], evaluation["examples"]
            ),
            **{n: functools.partial(rows, g) for n, g in stages.items()},
        }
    )
    judged, parts = data["evaluation"], {}
    if len(group["files"]) > 1:
        for number, name in enumerate(group["files"]):
            kept = judged.documents.where(judged.documents.source == number)
            each = Rows(kept, judged.context)
            parts[name] = each.spread(min(len(each), len(judged)))

    def evaluate(params: Any, cfg: ej.ModelConfig) -> dict[str, Any]:
        by_part = {name: bits_per_byte(params, cfg, r) for name, r in parts.items()}
        return {"value": bits_per_byte(params, cfg, judged), "parts": by_part}

    return Task(
        measure=BITS_PER_BYTE,
        vocab=corpus.vocab,
        data=data,
        evaluate=evaluate,
        # The same rows: the text is another for every row, so its bits are too.
        check=lambda params, cfg: bits_per_byte(params, cfg, judged),
        evaluation={"rows": len(judged), "size_bytes": judged.size_bytes},
        files=corpus.files,
        tokenizer=_file(group["tokenizer"]),
    )


def _file(path: str) -> bytes:
    return pathlib.Path(path).read_bytes() if path else b""


def bits_per_byte(
    params: Any, cfg: ej.ModelConfig, rows: Rows, *, batch: int = 32
) -> float:
    """Bits to encode all targets of `rows`, divided by the bytes that they stand for.

    The bits of special tokens, such as a document's end, count too.
    """
    nats = (float(_nats(params, each, cfg)) for each in stacked(rows, batch))
    return math.fsum(nats) / math.log(2) / rows.size_bytes


@functools.partial(jax.jit, static_argnums=2)
def _nats(params, rows, cfg):
    hidden = ej.hidden_states(
        params, rows["tokens"], cfg, segment_ids=rows["segment_ids"]
    )
    head, weights = params["lm_head"], rows["weights"]
    mean = cross_entropy_loss(hidden, head, rows["targets"], weights=weights)
    return mean * jnp.sum(weights)


def all_made(makers: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """What each makes; all their ValueErrors in one, each said once."""
    made, problems = {}, []
    for name, make in makers.items():
        try:
            made[name] = make()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n  ".join(dict.fromkeys(problems)))
    return made


SOURCES = {"reasoning": reasoning, "files": files}
