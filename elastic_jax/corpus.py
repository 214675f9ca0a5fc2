"""Documents of tokens from files, and a record of exactly which bytes those were.

The suffix says what a file holds: a text file is one document; a line of `.jsonl` and
a row of `.parquet` is one each, with either a field `text` or a field `tokens`, a list
of token ids. Text becomes tokens byte by byte, or by a `tokenizer.json`. The bytes
that are read are the bytes that are digested, and all faults are found in one reading.

Everything is held in memory: for corpora of up to some gigabytes.
"""

import difflib
import functools
import glob
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elastic_jax.tokenizer import ByteTokenizer, FileTokenizer, optional_library

FIELDS = ("text", "tokens")
SHOWN = 3  # problems of one file that are told in full

Record = tuple[str, Any]  # one of FIELDS, and its value


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents laid end to end.

    Attributes:
      tokens: [tokens], of the smallest unsigned type that holds the vocabulary.
      starts: int64 [documents + 1], where each document begins, and the end.
      size_bytes: int64 [documents], bytes of the text that the tokens stand for.
      source: int64 [documents], which entry of `files` each is from.
      pad: the token that stands where no document is.
    """

    tokens: np.ndarray
    starts: np.ndarray
    size_bytes: np.ndarray
    source: np.ndarray
    pad: int

    def __len__(self) -> int:
        return len(self.size_bytes)

    def __getitem__(self, number: int) -> np.ndarray:
        """The tokens of one document."""
        return self.tokens[self.starts[number] : self.starts[number + 1]]

    def where(self, kept: np.ndarray) -> "Documents":
        """The documents that a mask, bool [documents], keeps, in order."""
        lengths = np.diff(self.starts)
        return Documents(
            self.tokens[np.repeat(kept, lengths)],
            np.concatenate([[0], np.cumsum(lengths[kept])]),
            self.size_bytes[kept],
            self.source[kept],
            self.pad,
        )


@dataclass(frozen=True, eq=False)
class Corpus:
    """What was read.

    Attributes:
      documents: in the order of the files.
      vocab: every token is below it.
      files: path -> `size_bytes`, `sha256`, and the path `after` which it was read;
        the tokenizer's file is among them.
    """

    documents: Documents
    vocab: int
    files: dict[str, dict[str, Any]]


def read_corpus(files: Sequence[str], *, tokenizer: str = "") -> Corpus:
    """Reads all documents of all files.

    Args:
      files: paths, or patterns with `*`, `?`, `[...]` or `**`; the files of a pattern
        are read in the order of their names.
      tokenizer: a `tokenizer.json`; "" takes bytes, each document between `BOS` and
        `EOS`. It decides on special tokens; padding and truncation are turned off.

    Raises:
      ValueError: with every problem of every file: one that is missing or cannot be
        read, an unknown suffix, a line that is no JSON, a missing field, a token
        outside the vocabulary, or nothing in all of them.
    """
    problems: list[str] = []
    recorded: dict[str, dict[str, Any]] = {}
    coder = ByteTokenizer()
    if tokenizer and (data := _read(Path(tokenizer), recorded, problems)) is not None:
        try:
            coder = FileTokenizer(data)
        except ValueError as error:
            problems.append(f"{tokenizer}: {error}")
    found: list[tuple[int, np.ndarray, int]] = []
    for number, path in _paths(files, problems):
        if str(path) in recorded:
            problems.append(f"{path}: given twice")
            continue
        data = _read(path, recorded, problems)
        if data is not None:
            encoded = _documents(path, data, coder, problems)
            found += [(number, *document) for document in encoded]
    if not problems and not sum(len(tokens) for _, tokens, _ in found):
        problems.append(f"no token in any of {len(recorded)} files: {list(files)}")
    if problems:
        raise ValueError("data files cannot be used:\n  " + "\n  ".join(problems))
    source, tokens, size_bytes = zip(*found, strict=True)
    documents = Documents(
        np.concatenate(tokens).astype(np.min_scalar_type(coder.vocab - 1)),
        np.concatenate([[0], np.cumsum([len(t) for t in tokens])]),
        np.array(size_bytes, np.int64),
        np.array(source, np.int64),
        coder.pad,
    )
    return Corpus(documents, coder.vocab, recorded)


def _paths(files: Sequence[str], problems: list[str]) -> Iterator[tuple[int, Path]]:
    """(number of the entry, file) for every file of every entry."""
    if not files:
        problems.append("no files given: expected paths, or patterns such as 'a/*.txt'")
    for number, entry in enumerate(files):
        if not isinstance(entry, str) or not entry:
            problems.append(f"expected a path or a pattern, got {entry!r}")
        elif any(sign in entry for sign in "*?["):
            paths = map(Path, sorted(glob.glob(entry, recursive=True)))
            paths = [path for path in paths if not path.is_dir()]
            if not paths:
                problems.append(f"{entry}: no file matches")
            yield from ((number, path) for path in paths)
        else:
            yield number, Path(entry)


def _read(path: Path, recorded: dict, problems: list[str]) -> bytes | None:
    """The file's bytes, which are recorded; None after noting why there are none."""
    if path.is_dir():
        problems.append(f"{path}: is a directory; write {path / '*.txt'}, for instance")
        return None
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        beside = [p.name for p in path.parent.glob("*")]
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        problems.append(f"{path}: no such file{hint}")
        return None
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
        return None
    digest = hashlib.sha256(data).hexdigest()
    after = next(reversed(recorded), "")
    recorded[str(path)] = {"after": after, "size_bytes": len(data), "sha256": digest}
    return data


def _documents(path: Path, data: bytes, coder, problems: list[str]):
    """(tokens, bytes of text) of every document of one file."""
    if path.suffix not in READERS:
        known = " ".join(READERS)
        problems.append(f"{path}: unknown suffix {path.suffix!r}, expected {known}")
        return []
    found, wrong = [], []
    try:
        for where, load in READERS[path.suffix](data):
            try:
                found.append(_encoded(*load(), coder))
            except (ValueError, RecursionError) as error:
                wrong.append(f"{path}{where}: {error}")
    except (ValueError, OSError) as error:  # of the file as a whole
        wrong.append(f"{path}: {error}")
    problems += wrong[:SHOWN]
    if len(wrong) > SHOWN:
        problems.append(f"{path}: and {len(wrong) - SHOWN} more")
    return found


def _encoded(field: str, value: Any, coder) -> tuple[np.ndarray, int]:
    """Tokens of one document, and how many bytes of text they stand for."""
    if field == "text":
        if not isinstance(value, (str, bytes)):
            raise ValueError(f"text: expected a string, got {type(value).__name__}")
        text = value.encode() if isinstance(value, str) else value
        return np.array(coder.encode(text), np.int64), len(text)
    if not isinstance(value, list) or any(type(token) is not int for token in value):
        raise ValueError("tokens: expected a list of ints")
    if outside := [token for token in value if not 0 <= token < coder.vocab]:
        raise ValueError(
            f"tokens: {outside[0]} is outside the vocabulary of {coder.vocab}; which "
            "tokenizer made them?"
        )
    return np.array(value, np.int64), coder.size_bytes(value)


# -------------------------------------------------------------------------- formats


def _plain(data: bytes) -> Iterator[tuple[str, Callable[[], Record]]]:
    yield "", lambda: ("text", data)


def _json_lines(data: bytes) -> Iterator[tuple[str, Callable[[], Record]]]:
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            yield f":{number}", functools.partial(_json_record, line)


def _json_record(line: bytes) -> Record:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    field = _field(list(row))
    return field, row[field]


def _parquet(data: bytes) -> Iterator[tuple[str, Callable[[], Record]]]:
    parquet = optional_library("pyarrow.parquet")
    file = parquet.ParquetFile(optional_library("pyarrow").BufferReader(data))
    field = _field(file.schema_arrow.names)
    values = (
        value
        for batch in file.iter_batches(columns=[field])
        for value in batch.column(0).to_pylist()
    )
    for number, value in enumerate(values):
        yield f": row {number}", functools.partial(lambda v: (field, v), value)


def _field(names: Sequence[str]) -> str:
    """The one field of a document that `names` have."""
    found = [field for field in FIELDS if field in names]
    if len(found) != 1:
        raise ValueError(f"expected a field text or a field tokens, found {names}")
    return found[0]


READERS = {
    **dict.fromkeys((".txt", ".md", ".rst", ".py"), _plain),
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
