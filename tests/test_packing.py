"""Rows lose no token and cross no document; what is held out is never trained on."""

import itertools

import numpy as np
import pytest

from elastic_jax.corpus import Documents
from elastic_jax.packing import Rows, split

PAD = 99


def made(lengths, source=None) -> Documents:
    """Documents of random tokens below `PAD`; a byte and a half for each token."""
    tokens = np.random.default_rng(0).integers(0, PAD, sum(lengths)).astype(np.uint8)
    starts = np.cumsum([0, *lengths])
    source = np.zeros(len(lengths), int) if source is None else np.array(source)
    return Documents(tokens, starts, np.array(lengths) * 3 // 2, source, PAD)


LENGTHS = [
    [40],
    [1, 1, 1],
    [8, 8, 8],
    [7, 9, 8, 1, 23, 2],
    [0, 0, 5, 0, 11, 0],
    np.random.default_rng(1).integers(0, 30, 200).tolist(),
]


@pytest.mark.parametrize("context", [1, 3, 8, 50])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{len(x)} documents")
def test_no_token_is_lost(lengths, context):
    """Segments one behind the other are the corpus, and their ends its documents."""
    documents = made(lengths)
    rows = Rows(documents, context)
    tokens, targets, weights = [], [], []
    for index in range(len(rows)):
        row = rows[index]
        assert {k: (v.dtype, v.shape) for k, v in row.items()} == {
            "tokens": (np.int32, (context,)),
            "targets": (np.int32, (context,)),
            "segment_ids": (np.int32, (context,)),
            "weights": (np.float32, (context,)),
            "answer": (np.bool_, (context,)),
        }
        used = row["segment_ids"] > 0
        assert used.all() or index == len(rows) - 1
        assert (row["tokens"][~used] == PAD).all() and not row["weights"][~used].any()
        tokens += row["tokens"][used].tolist()
        targets += row["targets"][used].tolist()
        weights += row["weights"][used].tolist()
    assert tokens == documents.tokens.tolist()

    each = [documents[i].tolist() for i in range(len(documents))]
    nexts = [(*d[1:], PAD) for d in each if d]
    assert targets == list(itertools.chain(*nexts))
    counted = [[1] * (len(d) - 1) + [0] for d in each if d]
    assert weights == list(itertools.chain(*counted))


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{len(x)} documents")
def test_segments_are_documents(lengths):
    """In every row, equal segments mean one document, numbered from 1 without gaps."""
    documents, context = made(lengths), 8
    owner = np.repeat(np.arange(len(lengths)), lengths)
    rows = Rows(documents, context)
    for index in range(len(rows)):
        here = owner[index * context : (index + 1) * context]
        segments = rows[index]["segment_ids"]
        _, numbers = np.unique(here, return_inverse=True)
        np.testing.assert_array_equal(segments[: len(here)], numbers + 1)
        assert not segments[len(here) :].any()


def test_an_answer_begins_somewhere_inside_every_segment():
    """Anywhere but at its first token, and in the same place whenever it is asked."""
    rows = Rows(made([16] * 600), 32)
    places = []
    for index in range(len(rows)):
        row = rows[index]
        np.testing.assert_array_equal(row["answer"], rows[index]["answer"])
        for segment in (1, 2):
            answer = row["answer"][row["segment_ids"] == segment]
            assert list(answer) == sorted(answer)
            places.append(16 - answer.sum())
    found = np.bincount(places, minlength=17)
    assert found[0] == found[16] == 0 and (found[1:16] > 15).all()  # 40 on average
    some = rows.spread(7)
    for i, index in enumerate(some.only):
        np.testing.assert_array_equal(some[i]["answer"], rows[index]["answer"])
    for row in (Rows(made([1, 1, 1]), 2)[i] for i in range(2)):  # nothing to divide
        assert not row["answer"].any()


def test_chosen_rows_are_spread_over_all():
    rows = Rows(made([100, 60, 40]), 10)
    some = rows.spread(5)
    assert some.only == (0, 5, 10, 14, 19)
    for i, index in enumerate(some.only):
        np.testing.assert_array_equal(some[i]["tokens"], rows[index]["tokens"])
    assert some.spread(2).only == (0, 19)
    assert rows.spread(len(rows)).only == tuple(range(20))
    for count in (0, 21):
        with pytest.raises(ValueError, match=f"{count} rows were asked for, there are"):
            rows.spread(count)
    for index in (-1, 5):
        with pytest.raises(IndexError):
            some[index]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{len(x)} documents")
def test_bytes_add_up(lengths):
    documents = made(lengths)
    rows = Rows(documents, 7)
    assert rows.size_bytes == pytest.approx(documents.size_bytes.sum())
    each = [Rows(documents, 7, (i,)).size_bytes for i in range(len(rows))]
    assert sum(each) == pytest.approx(rows.size_bytes)


def test_rows_have_tokens():
    with pytest.raises(ValueError, match="context: expected at least 1 token, got 0"):
        Rows(made([5]), 0)


def test_digest_knows_tokens_documents_context_and_choice():
    rows = Rows(made([8, 8, 8]), 4)
    assert rows.digest() == Rows(made([8, 8, 8]), 4).digest()
    edited = made([8, 8, 8])
    edited.tokens[3] ^= 1
    others = [
        Rows(made([8, 16]), 4),
        Rows(made([8, 8, 8]), 5),
        Rows(edited, 4),
        rows.spread(2),
    ]
    assert len({r.digest() for r in [rows, *others]}) == 5


def kinds(documents):
    return {documents[i].tobytes() for i in range(len(documents))}


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_what_is_held_out_is_never_trained_on(share):
    """No document, and no copy of one, is in two splits; together they are all."""
    once = made([5 + i % 7 for i in range(300)])
    numbers = [*range(300), *range(0, 300, 3)]  # every third a second time
    tokens = np.concatenate([once[i] for i in numbers])
    lengths = [len(once[i]) for i in numbers]
    source = [0] * 200 + [1] * 200  # the copies are in the other source
    documents = Documents(
        tokens, np.cumsum([0, *lengths]), np.array(lengths), np.array(source), PAD
    )
    parts = split(documents, share)
    found = {name: kinds(part) for name, part in parts.items()}
    for one, other in itertools.combinations(found.values(), 2):
        assert not one & other
    assert set.union(*found.values()) == kinds(documents)
    assert sum(map(len, parts.values())) == len(documents)
    held = len(found["calibration"] | found["evaluation"])
    assert held >= max(2, share * 300 * 0.9)
    for part in parts.values():
        assert set(part.source) == {0, 1}


def test_a_split_depends_on_the_documents_alone():
    documents = made([9] * 50)
    order = np.random.default_rng(3).permutation(50)
    tokens = np.concatenate([documents[i] for i in order])
    shuffled = Documents(
        tokens, documents.starts, documents.size_bytes, documents.source, PAD
    )
    one, other = split(documents, 0.2), split(shuffled, 0.2)
    assert all(kinds(one[name]) == kinds(other[name]) for name in one)
    assert len(one["calibration"]) == len(one["evaluation"]) == 5


def test_too_few_documents_and_no_share_are_refused():
    with pytest.raises(ValueError) as error:
        split(made([5, 5, 5, 5, 5], source=[0, 0, 0, 1, 1]), 0.1)
    assert "files[1] has 2 different documents" in str(error.value)
    assert "files[0]" not in str(error.value)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="held_out"):
            split(made([5, 5, 5]), share)
