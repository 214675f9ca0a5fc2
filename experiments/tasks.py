"""A reasoning task with a scratchpad: chained arithmetic modulo a prime.

    T context   n steps of one chain

    4 +3 *5 -2 <think> +3 7       question: start value and operations
    *5 2                          thought: one line per step, with the value after it
    -2 0
    </think> d a c <eos>          answer: the code of the final value

Every skill that a language model needs for it is separate: copying the next operation
from the question, doing it, knowing when to stop, and remembering a code that can be
computed from nothing. With more `code_values` a code is of several values together:
there are modulus times as many codes for each, and answers become the harder part. A
line is three tokens and within the reach of a Mamba
convolution; the operations of a chain are all different, so that each line says where
in the question it stands. Operands are never 0 and the modulus is prime: every step is
reversible, so no step may be wrong and forgotten.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import operator
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

PAD, THINK, END_THINK, EOS, NEWLINE = range(5)
SPECIAL = ("<pad>", "<think>", "</think>", "<eos>", "\n")
LETTERS = string.ascii_lowercase[:18]
CODE_LENGTH = 3

# Classes of problems, modulo the modulus; training takes what these leave.
HELD_OUT = {"evaluation": 0, "calibration": 1}
SPLITS = ("train", *HELD_OUT)


@dataclass(frozen=True)
class Problem:
    """One problem in its three parts, as tokens.

    Attributes:
      prompt: start value, operations and `<think>`.
      thought: the lines and `</think>`.
      answer: the code; `<eos>` follows it.
      steps: number of operations.
    """

    prompt: tuple[int, ...]
    thought: tuple[int, ...]
    answer: tuple[int, ...]
    steps: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """The whole problem up to `<eos>`."""
        return (*self.prompt, *self.thought, *self.answer, EOS)


@dataclass(frozen=True)
class ReasoningTask:
    """A source of rows with several problems each, and of problems to evaluate on.

    Row `index` is a function of the fields and the index alone.

    Attributes:
      min_steps, max_steps: operations of a chain, drawn uniformly. The last problem
        of a row is drawn among those that still fit.
      modulus: a prime; values are 0 .. modulus - 1.
      code_values: how many values a code is of: the last, before it the first ones,
        the start value being the very first.
      context: tokens per row.
      seed: of the draw. Codes do not depend on it.
      split: "train", "calibration" or "evaluation". No problem is in two splits,
        whatever the seeds.
      rows: length of the source.

    Raises:
      ValueError: with every problem of the parameters at once.
    """

    min_steps: int = 2
    max_steps: int = 6
    modulus: int = 11
    code_values: int = 1
    context: int = 128
    seed: int = 0
    split: str = "train"
    rows: int = 2**20

    def __post_init__(self):
        problems = list(_problems(self))
        if problems:
            raise ValueError("invalid ReasoningTask:\n  " + "\n  ".join(problems))

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """A packed row.

        Returns:
          tokens: int32 [T], problems one behind the other, then `<pad>`.
          targets: int32 [T], the next token of the same problem; `<pad>` at its end.
          segment_ids: int32 [T], 1, 2, ... per problem and 0 on padding.
          weights: float32 [T], 1 where the target is part of a thought or an answer
            (`<eos>` too), 0 inside questions, at `<eos>` and on padding.
          answer: bool [T], True from `</think>` on, which the answering model reads;
            False for what it is handed, and on padding.
        """
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        tokens, targets, segments = np.zeros((3, self.context), np.int32)
        weights = np.zeros(self.context, np.float32)
        answer = np.zeros(self.context, bool)
        start = 0
        for segment, problem in enumerate(self._packed(index), start=1):
            whole = problem.tokens
            end = start + len(whole)
            tokens[start:end] = whole
            targets[start : end - 1] = whole[1:]
            segments[start:end] = segment
            weights[start + len(problem.prompt) - 1 : end - 1] = 1
            answer[start + len(problem.prompt) + len(problem.thought) - 1 : end] = True
            start = end
        return {
            "tokens": tokens,
            "targets": targets,
            "segment_ids": segments,
            "weights": weights,
            "answer": answer,
        }

    def digest(self) -> str:
        """SHA-256 of the parameters and the first rows.

        The rows stand for the generator: no version number to forget, and a change
        of NumPy's streams is noticed too.
        """
        seen = hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode())
        for index in range(min(8, self.rows)):
            for name, array in sorted(self[index].items()):
                seen.update(name.encode())
                seen.update(array)
        return seen.hexdigest()

    def problems(self, count: int, seed: int = 0) -> list[Problem]:
        """`count` problems of the split, every number of steps equally often."""
        rng = self._rng("problems", seed)
        steps = range(self.min_steps, self.max_steps + 1)
        return [
            self._problem(rng, n)
            for n in itertools.islice(itertools.cycle(steps), count)
        ]

    @functools.cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """The name of every token: specials, values, operations, code letters."""
        values = (str(value) for value in range(self.modulus))
        operations = (f"{sign}{k}" for sign in "+-*" for k in range(1, self.modulus))
        return (*SPECIAL, *values, *operations, *LETTERS)

    @functools.cached_property
    def codes(self) -> tuple[tuple[int, ...], ...]:
        """The code of every combination of values: random letters, all different.

        The values are the digits of the index, the last value the lowest.
        """
        first = len(self.vocabulary) - len(LETTERS)
        base, many = len(LETTERS), self.modulus**self.code_values
        drawn = np.random.default_rng(0).permutation(base**CODE_LENGTH)[:many]
        digits = np.stack(np.unravel_index(drawn, (base,) * CODE_LENGTH), axis=1)
        return tuple(map(tuple, (digits + first).tolist()))

    def tokenizer(self) -> bytes:
        """The vocabulary as a `tokenizer.json`: words between spaces, and new lines."""
        words = {word: token for token, word in enumerate(self.vocabulary)}
        description = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": {
                "type": "Replace",
                "pattern": {"String": "\n"},
                "content": " \n ",
            },
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"String": " "},
                "behavior": "Removed",
                "invert": False,
            },
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unknown>"},
        }
        return json.dumps(description).encode()

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of words separated by spaces; the inverse of `decode`."""
        words = [w for w in text.replace("\n", " \n ").split(" ") if w]
        unknown = sorted(set(words) - set(self.vocabulary))
        if unknown:
            raise ValueError(f"unknown words {unknown}; known: {self.vocabulary}")
        return tuple(self.vocabulary.index(word) for word in words)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text as at the head of this module."""
        unknown = [t for t in map(int, tokens) if not 0 <= t < len(self.vocabulary)]
        if unknown:
            raise ValueError(f"tokens {unknown} outside 0..{len(self.vocabulary) - 1}")
        text = " ".join(self.vocabulary[token] for token in tokens)
        return text.replace(" \n ", "\n")

    def _packed(self, index: int) -> Iterator[Problem]:
        """Problems until none fits into the row."""
        rng, room = self._rng("rows", index), self.context
        while (fits := _longest_within(room)) >= self.min_steps:
            steps = int(rng.integers(self.min_steps, min(self.max_steps, fits) + 1))
            yield self._problem(rng, steps)
            room -= _length(steps)

    def _problem(self, rng: np.random.Generator, steps: int) -> Problem:
        """A random chain of the split: the start value puts it into its class."""
        p = self.modulus
        operations = rng.permutation(3 * (p - 1))[:steps].tolist()
        if self.split in HELD_OUT:
            group = HELD_OUT[self.split]
        else:
            group = int(rng.integers(len(HELD_OUT), p))
        value = (group - sum(map(operator.getitem, self._mixer, operations))) % p

        first_value, first_operation = len(SPECIAL), len(SPECIAL) + p
        values = [value]
        prompt, thought = [first_value + value], []
        for operation in operations:
            value = self._results[operation][value]
            values.append(value)
            prompt.append(first_operation + operation)
            thought += [first_operation + operation, first_value + value, NEWLINE]
        return Problem(
            prompt=(*prompt, THINK),
            thought=(*thought, END_THINK),
            answer=self.codes[self._code(values)],
            steps=steps,
        )

    def _code(self, values: list[int]) -> int:
        """Which code stands for a chain's values."""
        chosen = [*values[: self.code_values - 1], values[-1]]
        return functools.reduce(lambda code, v: code * self.modulus + v, chosen)

    @functools.cached_property
    def _results(self) -> list[list[int]]:
        """The value after [operation][value]; operations as in the vocabulary."""
        p = self.modulus
        signs = (operator.add, operator.sub, operator.mul)
        return [
            [sign(value, operand) % p for value in range(p)]
            for sign in signs
            for operand in range(1, p)
        ]

    @functools.cached_property
    def _mixer(self) -> list[list[int]]:
        """Random weights [place][operation] of the sum that sorts chains into classes.

        Random, so that a class says nothing about the values of its chains.
        """
        shape = (len(self._results),) * 2
        return np.random.default_rng(1).integers(self.modulus, size=shape).tolist()

    def _rng(self, use: str, index: int) -> np.random.Generator:
        stream = (self.seed, SPLITS.index(self.split), ("rows", "problems").index(use))
        return np.random.default_rng((*stream, index))


def prompts(problems: Sequence[Problem]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32 [n, longest], `<pad>` at the right, and their lengths [n]."""
    lengths = np.array([len(problem.prompt) for problem in problems], np.int32)
    tokens = np.full((len(problems), lengths.max()), PAD, np.int32)
    for row, problem in zip(tokens, problems, strict=True):
        row[: len(problem.prompt)] = problem.prompt
    return tokens, lengths


def score(generated: Sequence[int], problem: Problem) -> bool:
    """Whether what was generated behind the prompt ends its thought and is right.

    Exactly the code between the first `</think>` and the first `<eos>` after it; what
    the thought says, and what follows `<eos>`, does not matter.
    """
    tokens = [int(token) for token in generated]
    if END_THINK not in tokens:
        return False
    answer = tokens[tokens.index(END_THINK) + 1 :]
    return EOS in answer and tuple(answer[: answer.index(EOS)]) == problem.answer


def _length(steps: int) -> int:
    """Tokens of a problem: start, operations, two tags, lines, code and `<eos>`."""
    return 1 + steps + 1 + 3 * steps + 1 + CODE_LENGTH + 1


def _longest_within(room: int) -> int:
    """Steps of the longest problem of at most `room` tokens."""
    return (room - _length(0)) // (_length(1) - _length(0))


def _problems(task: ReasoningTask) -> Iterator[str]:
    """Yields every reason why `task` cannot be drawn."""
    ints = {"min_steps": 1, "max_steps": 1, "modulus": 3, "context": 1, "rows": 1}
    ints |= {"seed": 0, "code_values": 1}
    wrong = [
        name
        for name, least in ints.items()
        if type(getattr(task, name)) is not int or getattr(task, name) < least
    ]
    for name in wrong:
        yield f"{name}: expected an int from {ints[name]}, got {getattr(task, name)!r}"
    if task.split not in SPLITS:
        yield f"split: expected one of {SPLITS}, got {task.split!r}"
    if wrong:
        return
    p = task.modulus
    if any(p % k == 0 for k in range(2, math.isqrt(p) + 1)):
        yield f"modulus: expected a prime, got {p}"
    codes, most = p**task.code_values, len(LETTERS) ** CODE_LENGTH
    if codes > most:
        yield (
            f"code_values {task.code_values}: modulus {p} needs {codes} codes, there "
            f"are only {most}"
        )
    if task.min_steps > task.max_steps:
        yield f"min_steps {task.min_steps} is above max_steps {task.max_steps}"
    if task.max_steps > 3 * (p - 1):
        yield (
            f"max_steps {task.max_steps}: modulus {p} has {3 * (p - 1)} different "
            "operations"
        )
    if task.context < _length(task.max_steps):
        yield (
            f"context {task.context} is too short for max_steps {task.max_steps}: "
            f"a chain takes up to {_length(task.max_steps)} tokens"
        )
