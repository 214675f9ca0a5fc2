"""The reasoning task: right sums, honest splits, rows that say what they hold."""

import collections

import numpy as np
import pytest

from elastic_jax.data import batches
from experiments.tasks import (
    END_THINK,
    EOS,
    PAD,
    SPLITS,
    ReasoningTask,
    prompts,
    score,
)

SIGNS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def code(task: ReasoningTask, value: int) -> str:
    return task.decode(task.codes[value])


def segments(row: dict) -> list[tuple[int, ...]]:
    ids = row["segment_ids"]
    return [tuple(row["tokens"][ids == i].tolist()) for i in range(1, ids.max() + 1)]


@pytest.mark.parametrize("modulus, longest", [(11, 12), (5, 12), (3, 6)])
def test_text_says_what_happens(modulus, longest):
    """Every problem is recomputed from its text alone."""
    task = ReasoningTask(1, longest, modulus=modulus)
    for problem in task.problems(60):
        value, *operations, think = task.decode(problem.prompt).split()
        value = int(value)
        assert think == "<think>" and len(operations) == problem.steps
        *lines, end = task.decode(problem.thought).split("\n")
        assert end == "</think>" and len(lines) == problem.steps
        assert len(set(operations)) == len(operations)
        for operation, line in zip(operations, lines, strict=True):
            value = SIGNS[operation[0]](value, int(operation[1:])) % modulus
            assert line == f"{operation} {value}"
        assert task.decode(problem.answer) == code(task, value)
        assert task.encode(task.decode(problem.tokens)) == problem.tokens


def test_values_and_steps_are_evenly_drawn():
    task = ReasoningTask(2, 6)
    problems = task.problems(4000)
    assert set(collections.Counter(p.steps for p in problems).values()) == {800}
    for part in (lambda p: p.answer, lambda p: p.prompt[0]):
        frequencies = collections.Counter(map(part, problems))
        assert len(frequencies) == 11
        assert all(270 < n < 460 for n in frequencies.values())


def test_codes_differ_and_depend_on_nothing_but_the_value():
    task = ReasoningTask()
    assert len(set(task.codes)) == 11 and {len(c) for c in task.codes} == {3}
    letters = {task.vocabulary[t] for c in task.codes for t in c}
    assert letters <= set("abcdefghijklmnopqr")
    assert task.codes == ReasoningTask(2, 9, seed=5, split="evaluation").codes
    assert len(task.vocabulary) == len(set(task.vocabulary)) == 64


@pytest.mark.parametrize("many", [1, 2, 3])
def test_a_code_is_of_the_first_values_and_the_last(many):
    task = ReasoningTask(modulus=5, code_values=many)
    assert len(set(task.codes)) == len(task.codes) == 5**many
    seen = {}
    for problem in task.problems(800):
        values = [problem.prompt[0], *problem.thought[1::3]]
        key = (*values[: many - 1], values[-1])
        assert seen.setdefault(key, problem.answer) == problem.answer
    assert len(set(seen.values())) == len(seen) > 0.9 * 5**many
    plain = ReasoningTask(modulus=5).problems(800)
    assert [p.thought for p in task.problems(800)] == [p.thought for p in plain]


def test_rows_are_whole_problems_and_targets_stay_inside_them():
    task = ReasoningTask(2, 6, context=96)
    for index in range(40):
        row = task[index]
        assert {k: (v.dtype, v.shape) for k, v in row.items()} == {
            "tokens": (np.int32, (96,)),
            "targets": (np.int32, (96,)),
            "segment_ids": (np.int32, (96,)),
            "weights": (np.float32, (96,)),
            "answer": (np.bool_, (96,)),
        }
        used = row["segment_ids"] > 0
        assert list(used) == sorted(used, reverse=True)
        np.testing.assert_array_equal(row["tokens"] == PAD, ~used)
        assert np.sum(~used) < 15  # nothing would have fitted

        rebuilt, counted, answered = [], [], []
        for tokens in segments(row):
            text = task.decode(tokens)
            assert text.count("<think>") == text.count("<eos>") == 1
            assert text.endswith("<eos>")
            targets = (*tokens[1:], PAD)
            rebuilt += targets
            first = text.split("<think>")[0].count(" ")  # the tag, which predicts
            counted += [first <= i < len(tokens) - 1 for i in range(len(tokens))]
            end = tokens.index(END_THINK)  # the answering model reads it
            answered += [i >= end for i in range(len(tokens))]
        np.testing.assert_array_equal(row["targets"][used], rebuilt)
        np.testing.assert_array_equal(row["weights"][used], counted)
        np.testing.assert_array_equal(row["answer"][used], answered)
        assert not row["answer"][~used].any()
        assert not np.any(row["targets"][~used]) and not np.any(row["weights"][~used])


def test_rows_depend_on_seed_and_index_alone():
    task, same = ReasoningTask(seed=3), ReasoningTask(seed=3)
    for name, value in task[7].items():
        task[8]
        np.testing.assert_array_equal(value, same[7][name])
    others = [task[8], ReasoningTask(seed=4)[7]]
    others += [ReasoningTask(seed=3, split=split)[7] for split in SPLITS[1:]]
    assert all(np.any(task[7]["tokens"] != other["tokens"]) for other in others)
    assert task.problems(5) == same.problems(5) != task.problems(5, seed=1)
    assert ReasoningTask(rows=2)[1] and len(ReasoningTask(rows=2)) == 2
    for index in (-1, 2):
        with pytest.raises(IndexError):
            ReasoningTask(rows=2)[index]


def test_no_question_is_in_two_splits():
    """Of the 9570 questions of two steps, each split sees its share, and no other's."""
    asked = {}
    for split in SPLITS:
        task = ReasoningTask(2, 2, split=split)
        asked[split] = {p.prompt for s in (0, 1) for p in task.problems(5000, seed=s)}
        asked[split] |= {s[:4] for i in range(50) for s in segments(task[i])}
    assert len(set().union(*asked.values())) == sum(map(len, asked.values()))
    assert len(asked["evaluation"]) == len(asked["calibration"]) == 870
    assert 4700 < len(asked["train"]) <= 9 * 870


def test_a_held_out_class_says_nothing_about_values():
    """Evaluation sees every answer about as often, as training does."""
    for steps in (2, 3):
        task = ReasoningTask(steps, steps, split="evaluation")
        last = collections.Counter(p.answer for p in task.problems(2200))
        assert len(last) == 11 and all(n > 100 for n in last.values())


def test_digest_knows_parameters():
    base = ReasoningTask()
    assert base.digest() == ReasoningTask().digest()
    others = [
        ReasoningTask(min_steps=3),
        ReasoningTask(max_steps=7),
        ReasoningTask(modulus=7),
        ReasoningTask(context=96),
        ReasoningTask(seed=1),
        ReasoningTask(split="evaluation"),
        ReasoningTask(rows=100),
    ]
    assert len({task.digest() for task in [base, *others]}) == 1 + len(others)


def test_it_is_a_source():
    task = ReasoningTask(rows=100, context=64)
    batch = next(batches(task, batch=4, seed=0))
    for row, index in enumerate(batch["index"]):
        np.testing.assert_array_equal(batch["tokens"][row], task[int(index)]["tokens"])


def test_score_is_exact():
    task = ReasoningTask()
    problem, other = task.problems(2)
    assert problem.answer != other.answer
    right = (*problem.thought, *problem.answer, EOS)
    assert score(right, problem)
    assert score(np.array((*right, EOS, EOS)), problem)
    assert score((END_THINK, *problem.answer, EOS), problem)  # a thought may be short

    assert not score((*problem.thought, *other.answer, EOS), problem)
    assert not score((*problem.thought, *problem.answer), problem)  # never stops
    assert not score((*problem.thought[:-1], *problem.answer, EOS), problem)
    assert not score((*problem.thought, *problem.answer[:2], EOS), problem)
    assert not score((*problem.thought, *problem.answer, PAD, EOS), problem)
    assert not score((*problem.thought, EOS, *problem.answer, EOS), problem)
    assert not score((), problem)


def test_prompts_are_padded_at_the_right():
    problems = ReasoningTask(2, 6).problems(10)
    tokens, lengths = prompts(problems)
    assert tokens.dtype == np.int32 and tokens.shape == (10, 8)
    for row, length, problem in zip(tokens, lengths, problems, strict=True):
        assert tuple(row[:length]) == problem.prompt and not row[length:].any()


def test_unknown_words_and_tokens_are_named():
    task = ReasoningTask()
    with pytest.raises(ValueError, match=r"\['\+0', 'x'\]"):
        task.encode("1 +0 x")
    with pytest.raises(ValueError, match=r"\[-1, 64\]"):
        task.decode([1, 64, -1][::-1])


def test_all_wrong_parameters_are_reported_together():
    with pytest.raises(ValueError) as error:
        ReasoningTask(min_steps=0, seed=1.0, split="test")
    for name in ("min_steps", "seed", "split"):
        assert f"{name}: " in str(error.value)
    with pytest.raises(ValueError) as error:
        ReasoningTask(min_steps=40, max_steps=31, modulus=9, context=20)
    for said in ("min_steps 40", "max_steps 31", "prime", "context 20"):
        assert said in str(error.value)
