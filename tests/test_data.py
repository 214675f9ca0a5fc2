"""Batches: every example once an epoch, resumed to the bit, changes noticed."""

import json

import numpy as np
import pytest

from elastic_jax.data import Arrays, Mixture, batches, verify


def numbers(n: int) -> Arrays:
    rng = np.random.default_rng(0)
    return Arrays(
        {
            "tokens": rng.integers(99, size=(n, 5)).astype(np.int32),
            "weights": rng.random((n, 5), np.float32),
        }
    )


def take(steps, n: int) -> list[dict]:
    return [next(steps) for _ in range(n)]


def assert_same(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def test_a_batch_is_the_stacked_examples_of_its_indices():
    source = numbers(10)
    for batch in take(batches(source, batch=4, seed=1), 5):
        assert batch["tokens"].dtype == np.int32 and batch["tokens"].shape == (4, 5)
        for row, index in enumerate(batch["index"]):
            for name, value in source[index].items():
                np.testing.assert_array_equal(batch[name][row], value)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_every_example_once(shuffle):
    steps = batches(numbers(10), batch=4, seed=1, shuffle=shuffle)
    seen = np.concatenate([batch["index"] for batch in take(steps, 5)])
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert (list(first) == list(range(10))) != shuffle
    assert (list(first) == list(second)) != shuffle


def test_without_repeat_the_last_batch_is_smaller_and_nothing_is_dropped():
    steps = list(batches(numbers(10), batch=4, seed=1, repeat=False))
    assert [len(batch["index"]) for batch in steps] == [4, 4, 2]
    assert sorted(np.concatenate([b["index"] for b in steps])) == list(range(10))


def test_order_is_of_the_seed_and_not_of_the_threads():
    source = numbers(50)
    plain = take(batches(source, batch=4, seed=1, threads=0), 20)
    assert_same(plain, take(batches(source, batch=4, seed=1, threads=3), 20))
    other = take(batches(source, batch=4, seed=2), 1)
    assert list(plain[0]["index"]) != list(other[0]["index"])


@pytest.mark.parametrize("done", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("threads", [0, 1])
def test_resume_equals_never_stopped(done, threads):
    """Also across an epoch's end, also with batches read ahead, through JSON."""
    source = numbers(10)
    steps = batches(source, batch=4, seed=3, threads=threads)
    take(steps, done)
    state = json.loads(json.dumps(steps.get_state()))
    expected = take(steps, 6)

    fresh = batches(source, batch=4, seed=3, threads=threads)
    take(fresh, 2)
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert_same(take(fresh, 6), expected)


def test_a_state_of_other_batches_is_refused_and_says_what_changed():
    state = batches(numbers(10), batch=4, seed=3).get_state()
    with pytest.raises(ValueError) as error:
        batches(numbers(12), batch=2, seed=3).set_state(state)
    assert "source: was" in str(error.value)
    assert "batch: was 4, is 2" in str(error.value)
    assert "seed" not in str(error.value)

    steps = batches(numbers(10), batch=4, seed=3)
    with pytest.raises(ValueError, match="position"):
        steps.set_state(state | {"position": -1})
    with pytest.raises(ValueError, match="source"):
        steps.set_state({"position": 1})
    assert steps.get_state() == state


def test_all_wrong_arguments_are_reported_together():
    with pytest.raises(ValueError) as error:
        batches(numbers(0), batch=0, seed=-1, threads=True)
    for name in ("source", "batch", "seed", "threads"):
        assert f"{name}: " in str(error.value)


class Ragged:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        kind = np.int32 if index != 3 else np.int64
        return {"tokens": np.zeros(5, kind)}

    def digest(self):
        return "ragged"


def test_examples_that_differ_are_not_cast_to_one_another():
    with pytest.raises(ValueError, match="index 3 has .*int64"):
        list(batches(Ragged(), batch=4, seed=0, shuffle=False, repeat=False))


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[:-1],  # shortened
        lambda a: a[::-1],  # reordered
        lambda a: np.concatenate([a[:-1], a[-1:] ^ 1]),  # one example edited
        lambda a: a.astype(np.int64),
    ],
    ids=["shortened", "reordered", "edited", "retyped"],
)
def test_a_changed_file_is_named_before_the_first_step(tmp_path, change):
    file = tmp_path / "tokens.npy"
    tokens = np.arange(60, dtype=np.int32).reshape(12, 5)
    np.save(file, tokens)
    recorded = Arrays({"tokens": np.load(file, mmap_mode="r")}).digest()
    verify(Arrays({"tokens": np.load(file, mmap_mode="r")}), recorded)

    np.save(file, change(tokens))
    changed = Arrays({"tokens": np.load(file, mmap_mode="r")})
    with pytest.raises(ValueError, match=r"tokens int\d\d\[.*has changed"):
        verify(changed, recorded)


def test_digest_does_not_depend_on_layout_or_order_of_names():
    a, b = np.arange(6).reshape(2, 3), np.ones((2, 2))
    assert Arrays({"a": a, "b": b}).digest() == Arrays({"b": b, "a": a}).digest()
    fortran = np.asfortranarray(a)
    assert Arrays({"a": a}).digest() == Arrays({"a": fortran}).digest()
    assert Arrays({"a": a}).digest() != Arrays({"b": a}).digest()


def test_arrays_report_all_problems():
    with pytest.raises(ValueError) as error:
        Arrays({"a": np.zeros(3), "b": np.zeros((2, 2)), "c": np.array([{}, {}])})
    assert "c: " in str(error.value) and "number of rows" in str(error.value)


def mixture(weights=(3.0, 1.0)) -> Mixture:
    """Ten examples and four, with epochs that end at different times."""
    first, second = numbers(10), numbers(14)
    return Mixture(
        [first, Arrays({k: v[10:] for k, v in rows(second).items()})], weights
    )


def rows(source: Arrays) -> dict[str, np.ndarray]:
    each = [source[i] for i in range(len(source))]
    return {name: np.stack([row[name] for row in each]) for name in each[0]}


def test_a_mixture_holds_its_sources_one_behind_the_other():
    mixed, whole = mixture(), numbers(14)
    assert len(mixed) == 14
    parts = rows(whole)
    for index in range(10, 14):
        np.testing.assert_array_equal(mixed[index]["tokens"], parts["tokens"][index])
    for index in (-1, 14):
        with pytest.raises(IndexError):
            mixed[index]


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1, 1), (0.2, 0.8), (0.7, 0.3)])
def test_weights_hold_over_any_stretch(weights):
    mixed = Mixture([numbers(900), numbers(500)], weights)
    steps = batches(mixed, batch=10, seed=0)
    drawn = np.concatenate([batch["index"] for batch in take(steps, 100)])
    share = weights[0] / sum(weights)
    for start in (0, 250, 900):
        stretch = drawn[start : start + 100]
        assert abs(np.mean(stretch < 900) - share) < 0.02
    assert abs(np.mean(drawn < 900) - share) < 0.005


def test_every_source_of_a_mixture_has_epochs_of_its_own():
    steps = batches(mixture(), batch=4, seed=0)
    drawn = np.concatenate([batch["index"] for batch in take(steps, 30)])
    for low, high in ((0, 10), (10, 14)):
        own = drawn[(drawn >= low) & (drawn < high)]
        size = high - low
        epochs = [own[i : i + size] for i in range(0, len(own) // size * size, size)]
        assert len(epochs) > 2
        assert all(sorted(epoch) == list(range(low, high)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew


@pytest.mark.parametrize("done", [1, 3, 8])
@pytest.mark.parametrize("threads", [0, 2])
def test_a_mixture_resumes_to_the_bit_in_the_middle_of_epochs(done, threads):
    steps = batches(mixture(), batch=4, seed=3, threads=threads)
    take(steps, done)
    state = json.loads(json.dumps(steps.get_state()))
    expected = take(steps, 12)
    fresh = batches(mixture(), batch=4, seed=3, threads=threads)
    fresh.set_state(state)
    assert_same(take(fresh, 12), expected)


def test_a_state_of_another_mixture_is_refused():
    state = batches(mixture(), batch=4, seed=3).get_state()
    with pytest.raises(ValueError, match="source: was"):
        batches(mixture((1, 1)), batch=4, seed=3).set_state(state)


def test_a_mixture_reports_all_problems():
    with pytest.raises(ValueError) as error:
        Mixture([numbers(3), numbers(0)], (1.0, 0.0, float("inf")))
    for words in ("sources[1]", "3 weights for 2 sources", "[0.0, inf]"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="a mixture has no end"):
        batches(mixture(), batch=4, seed=3, repeat=False)
