"""Files become documents: nothing is lost, changed or guessed, all faults are named."""

import hashlib
import json
import pathlib
import sys

import numpy as np
import pytest

from elastic_jax.corpus import read_corpus
from elastic_jax.tokenizer import BOS, EOS, PAD

TEXTS = ["def f():\n    pass\n", "", "naïve \N{SNOWMAN}\r\n", "a" * 300]


def written(folder, name, rows):
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pa, parquet = (pytest.importorskip(n) for n in ("pyarrow", "pyarrow.parquet"))
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return str(path)


def refusal(*files, **options) -> str:
    with pytest.raises(ValueError) as error:
        read_corpus(files, **options)
    return str(error.value)


def documents(corpus):
    return [corpus.documents[i].tolist() for i in range(len(corpus.documents))]


def as_bytes(text: str) -> list[int]:
    return [BOS, *text.encode(), EOS]


def test_a_text_file_is_one_document_byte_for_byte(tmp_path):
    """Also bytes that are no UTF-8, and line ends as they are."""
    contents = [bytes(range(256)), b"one\r\ntwo\n", b""]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.txt").write_bytes(content)
    corpus = read_corpus([str(tmp_path / "*.txt")])
    assert documents(corpus) == [[BOS, *content, EOS] for content in contents]
    assert corpus.documents.size_bytes.tolist() == [256, 9, 0]
    assert corpus.vocab == 259 and corpus.documents.pad == PAD < corpus.vocab


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_every_row_is_a_document_of_text_or_of_tokens(tmp_path, suffix):
    text = written(tmp_path, f"text{suffix}", [{"text": t, "id": 1} for t in TEXTS])
    ids = [[BOS, 104, 105, EOS], [1, 2], []]
    tokens = written(tmp_path, f"tokens{suffix}", [{"tokens": t} for t in ids])
    corpus = read_corpus([text, tokens])
    assert documents(corpus) == [as_bytes(t) for t in TEXTS] + ids
    sizes = [len(t.encode()) for t in TEXTS] + [2, 2, 0]
    assert corpus.documents.size_bytes.tolist() == sizes
    assert corpus.documents.source.tolist() == [0] * 4 + [1] * 3


def test_every_file_is_recorded_by_what_was_read(tmp_path):
    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(name * 3)
    last = written(tmp_path, "x.jsonl", [{"text": "t"}])
    corpus = read_corpus([str(tmp_path / "*.txt"), last])
    expected = [str(tmp_path / f"{name}.txt") for name in "abc"] + [last]
    assert list(corpus.files) == expected
    for after, (path, record) in zip(
        ["", *expected[:-1]], corpus.files.items(), strict=True
    ):
        data = pathlib.Path(path).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        assert record == {"after": after, "size_bytes": len(data), "sha256": digest}


@pytest.fixture
def tokenizer(tmp_path):
    library = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "one": 1, "two": 2, "<end>": 7}
    made = library.Tokenizer(library.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.enable_truncation(2)
    made.enable_padding(length=9, pad_id=7, pad_token="<end>")
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return str(path)


def test_a_tokenizer_reads_all_of_a_text(tmp_path, tokenizer):
    """Its file may ask for truncation and padding: nothing is cut or filled up."""
    file = tmp_path / "a.txt"
    file.write_text("one two two three one")
    ids = written(tmp_path, "b.jsonl", [{"tokens": [1, 2]}])
    corpus = read_corpus([str(file), ids], tokenizer=tokenizer)
    assert documents(corpus) == [[1, 2, 2, 0, 1], [1, 2]]
    assert corpus.documents.size_bytes.tolist() == [21, len("one two")]
    assert corpus.vocab == 8  # ids may have gaps
    assert corpus.documents.pad == 7
    assert list(corpus.files)[0] == tokenizer


def test_all_faults_of_all_files_come_together(tmp_path):
    good = tmp_path / "good.txt"
    good.write_text("text")
    odd = tmp_path / "odd.csv"
    odd.write_text("a,b")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "fine"}\n\n{"text": \n[1]\n')
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 100_000)
    fields = written(
        tmp_path,
        "fields.jsonl",
        [{"body": "x", "id": 3}, {"text": "a", "tokens": [1]}, {"text": "\ud800"}],
    )
    values = written(
        tmp_path, "values.jsonl", [{"tokens": [1, 259]}, {"tokens": [True]}]
    )
    many = written(tmp_path, "many.jsonl", [{"text": None}] * 9)
    said = refusal(
        str(good), str(good), str(odd), str(tmp_path / "god.txt"), str(tmp_path),
        str(tmp_path / "*.md"), str(lines), str(deep), fields, values, many, "",
    )  # fmt: skip
    for words in (
        f"{good}: given twice",
        f"{odd}: unknown suffix '.csv'",
        f"{tmp_path / 'god.txt'}: no such file; did you mean {good}?",
        f"{tmp_path}: is a directory",
        f"{tmp_path / '*.md'}: no file matches",
        f"{lines}:3: ",
        f"{lines}:4: expected an object, got list",
        f"{deep}:1: ",
        f"{fields}:1: expected a field text or a field tokens, found ['body', 'id']",
        f"{fields}:2: expected a field text",
        f"{fields}:3: 'utf-8' codec can't encode",
        f"{values}:1: tokens: 259 is outside the vocabulary of 259",
        f"{values}:2: tokens: expected a list of ints",
        f"{many}:1: text: expected a string, got NoneType",
        f"{many}: and 6 more",
        "expected a path or a pattern, got ''",
    ):
        assert words in said, said
    assert f"{lines}:1" not in said and f"{lines}:2" not in said


def test_faults_of_parquet_are_named(tmp_path):
    fields = written(tmp_path, "fields.parquet", [{"body": "x", "id": 3}])
    empty = written(tmp_path, "none.parquet", [{"text": "a"}, {"text": None}])
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and no more")
    said = refusal(fields, empty, str(broken))
    assert f"{fields}: expected a field text" in said and "['body', 'id']" in said
    assert f"{empty}: row 1: text: expected a string" in said
    assert f"{broken}: " in said


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    pytest.importorskip("tokenizers")
    bad, file = tmp_path / "tokenizer.json", tmp_path / "a.txt"
    bad.write_text("{}")
    file.write_text("text")
    assert f"{bad}: not a tokenizer.json" in refusal(str(file), tokenizer=str(bad))
    said = refusal(str(file), tokenizer=str(tmp_path / "tokeniser.json"))
    assert f"did you mean {bad}?" in said


def test_text_that_a_tokenizer_cannot_read_is_named(tmp_path, tokenizer):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9")
    assert f"{file}: 'utf-8' codec" in refusal(str(file), tokenizer=tokenizer)


def test_nothing_at_all_is_an_error(tmp_path):
    assert "no files given" in refusal()
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert "no token in any of 1 files" in refusal(str(empty))


@pytest.mark.parametrize("library", ["tokenizers", "pyarrow"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, library):
    file = tmp_path / ("tokenizer.json" if library == "tokenizers" else "a.parquet")
    file.write_text("{}")
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.parquet", None)
    options = {"tokenizer": str(file)} if library == "tokenizers" else {}
    said = refusal(str(file), **options)
    assert f"needs {library}: pip install elastic_jax[text]" in said


def test_documents_are_kept_by_a_mask(tmp_path):
    rows = [{"tokens": [i] * i} for i in (3, 0, 1, 2)]
    kept = read_corpus([written(tmp_path, "a.jsonl", rows)]).documents
    kept = kept.where(np.array([True, True, False, True]))
    assert [kept[i].tolist() for i in range(len(kept))] == [[3, 3, 3], [], [2, 2]]
    assert kept.size_bytes.tolist() == [3, 0, 2]
