"""Text to tokens and back: a `tokenizer.json`, or bytes where there is none.

Chat templates are programs that come with a checkpoint; they are not supported, and
nothing here looks at them: a prompt is the text that it is.
"""

import functools
import importlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# Byte-level tokens: the 256 bytes, then what stands between and around documents.
PAD, BOS, EOS = 256, 257, 258


class ByteTokenizer:
    """Every byte is a token."""

    vocab, pad = 259, PAD
    end = (EOS,)

    def encode(self, text: bytes) -> np.ndarray:
        """The tokens of a whole document."""
        return np.concatenate([self.prompt(text), [EOS]])

    def prompt(self, text: bytes) -> np.ndarray:
        """The tokens of a text that shall go on."""
        return np.concatenate([[BOS], np.frombuffer(text, np.uint8)]).astype(np.int64)

    def plain(self, text: str) -> list[int]:
        """The tokens of a text in the middle of another."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        data = bytes(token for token in tokens if token < PAD)
        return data.decode(errors="replace")

    def size_bytes(self, tokens: Sequence[int]) -> int:
        return sum(token < PAD for token in tokens)

    @property
    def pieces(self) -> tuple[bytes, ...]:
        """The bytes of every token."""
        return (*(bytes([i]) for i in range(PAD)), b"", b"", b"")


class FileTokenizer:
    """A tokenizer as its file says, without truncation and padding.

    Raises:
      ValueError: the bytes are no `tokenizer.json`, or its library is missing.
    """

    def __init__(self, data: bytes):
        library = optional_library("tokenizers")
        try:
            self._tokenizer = library.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"not a tokenizer.json: {error}") from error
        padding = self._tokenizer.padding or {}
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._names = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab = 1 + max(self._names.values(), default=-1)
        self.pad = padding.get("pad_id", 0)  # weighs nothing: any token does
        # What the file itself puts behind a document ends one, whatever its name is.
        empty = self._tokenizer.encode("").ids
        usual = [self._names.get(n) for n in ("</s>", "<|im_end|>", "<eos>")]
        self.end = tuple({*empty[1:], *(t for t in usual if t is not None)})

    def encode(self, text: bytes) -> list[int]:
        return self._ids(text.decode())

    def prompt(self, text: bytes) -> list[int]:
        """Without what the file puts behind a document."""
        tokens = self.encode(text)
        while len(tokens) > 1 and tokens[-1] in self.end:
            tokens = tokens[:-1]
        return tokens

    def plain(self, text: str) -> list[int]:
        return self._ids(text, add_special_tokens=False)

    def _ids(self, text: str, **options: bool) -> list[int]:
        try:
            return self._tokenizer.encode(text, **options).ids
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"the tokenizer cannot read {text!r}: {error}") from error

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def size_bytes(self, tokens: Sequence[int]) -> int:
        return len(self._tokenizer.decode(tokens).encode())

    @functools.cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """The bytes of every token.

        Raises:
          ValueError: tokens of this kind of file have no bytes of their own.
        """
        spelling = _spelling(json.loads(self._tokenizer.to_str()))
        added = self._tokenizer.get_added_tokens_decoder()
        found = [b""] * self.vocab
        for name, token in self._names.items():
            found[token] = name.encode() if token in added else spelling(name)
        return tuple(found)


Tokenizer = ByteTokenizer | FileTokenizer


def _spelling(description: dict[str, Any]):
    """name -> bytes, by what the file says its decoder does."""
    kinds = {*_kinds(description.get("decoder"))}
    if "ByteLevel" in kinds:
        return lambda name: bytes(_byte_letters()[letter] for letter in name)
    if "Metaspace" in kinds or {"ByteFallback", "Replace"} <= kinds:
        return _with_fallback
    raise ValueError(
        f"tokens have no bytes of their own: this tokenizer.json decodes by "
        f"{sorted(kinds) or 'nothing'}, expected ByteLevel, Metaspace or ByteFallback; "
        "stop at tokens instead of strings"
    )


def _kinds(decoder: dict[str, Any] | None) -> Iterator[str]:
    if decoder:
        yield decoder["type"]
        for part in decoder.get("decoders", ()):
            yield from _kinds(part)


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The letter of every byte in byte-level vocabularies, as GPT-2 has them.

    Printable bytes stand for themselves, the others for the letters from 256 on.
    """
    ranges = (range(33, 127), range(161, 173), range(174, 256))
    printable = [byte for each in ranges for byte in each]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable]
    letters += [chr(256 + i) for i in range(len(others))]
    return dict(zip(letters, printable + others, strict=True))


def _with_fallback(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def optional_library(name: str) -> Any:
    """Imports what only some data need.

    Raises:
      ValueError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"needs {name.split('.')[0]}: pip install elastic_jax[text]"
        ) from error
