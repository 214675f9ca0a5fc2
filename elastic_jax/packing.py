"""Rows of tokens from documents of any length, batches, and what is held out.

    T context

Documents lie end to end and are cut every T tokens: no token is lost and none is
padding but behind the very last. A document is a segment of its own in every row that
it reaches into, and its next token is predicted also where that is in the next row.
Text has no thought that an answer follows: where a second model would take over is a
random place in every segment, the same whenever the row is asked for.
"""

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from elastic_jax.corpus import Documents

SPLITS = ("train", "calibration", "evaluation")


@dataclass(frozen=True, eq=False)
class Rows:
    """A source of rows; row `index` is a function of the documents and the context.

    Attributes:
      documents: all that the rows are cut from.
      context: tokens per row.
      only: the rows of all that are in the source; None is every one.
    """

    documents: Documents
    context: int
    only: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.context < 1:
            raise ValueError(f"context: expected at least 1 token, got {self.context}")

    def __len__(self) -> int:
        if self.only is not None:
            return len(self.only)
        return -(-len(self.documents.tokens) // self.context)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """A packed row.

        Returns:
          tokens: int32 [T], and the documents' `pad` behind the last.
          targets: int32 [T], the next token of the same document; `pad` at its end.
          segment_ids: int32 [T], 1, 2, ... per document and 0 on padding.
          weights: float32 [T], 1 where there is a target.
          answer: bool [T], True behind a random place inside each segment, which is a
            function of the row's number; False for a segment of one token.
        """
        start = self._start(index)
        tokens = self.documents.tokens[start : start + self.context + 1]
        # Empty documents begin where the next one does, which hides them here.
        at = np.arange(start, start + len(tokens))
        document = np.searchsorted(self.documents.starts, at, side="right")
        inside = document[1:] == document[:-1]
        n, followed = min(len(tokens), self.context), len(inside)
        row, targets = np.full((2, self.context), self.documents.pad, np.int32)
        segments = np.zeros(self.context, np.int32)
        weights = np.zeros(self.context, np.float32)
        row[:n] = tokens[:n]
        targets[:followed] = np.where(inside, tokens[1:], self.documents.pad)
        segments[:n] = 1 + np.concatenate([[0], np.cumsum(~inside)])[:n]
        weights[:followed] = inside
        _, first, length = np.unique(
            segments[:n], return_index=True, return_counts=True
        )
        draw = np.random.default_rng(start // self.context).random(len(first))
        switch = first + 1 + (draw * (length - 1)).astype(int)
        answer = np.zeros(self.context, bool)
        answer[:n] = np.arange(n) >= switch[segments[:n] - 1]
        return {
            "tokens": row,
            "targets": targets,
            "segment_ids": segments,
            "weights": weights,
            "answer": answer,
        }

    def spread(self, count: int) -> "Rows":
        """`count` of the rows, evenly over all documents.

        Raises:
          ValueError: there are not so many.
        """
        if not 1 <= count <= len(self):
            raise ValueError(f"{count} rows were asked for, there are {len(self)}")
        chosen = np.linspace(0, len(self) - 1, count).round().astype(int)
        every = range(len(self)) if self.only is None else self.only
        return Rows(self.documents, self.context, tuple(every[i] for i in chosen))

    @functools.cached_property
    def size_bytes(self) -> float:
        """Bytes of text in all rows; the part of a document has its share of them."""
        ends = np.concatenate([[0], np.cumsum(self.documents.size_bytes)])
        starts = np.array([self._start(i) for i in range(len(self))])
        before, after = (
            np.interp(at, self.documents.starts, ends)
            for at in (starts, starts + self.context)
        )
        return math.fsum(after - before)

    def digest(self) -> str:
        """SHA-256 of all documents, of where they are cut, and of the rows' numbers."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        documents = self.documents
        text = f"{self.context} {documents.pad} {documents.tokens.dtype} {self.only}\n"
        seen = hashlib.sha256(text.encode())
        for array in (documents.starts, documents.tokens):
            seen.update(np.ascontiguousarray(array))
        return seen.hexdigest()

    def _start(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return (index if self.only is None else self.only[index]) * self.context


def stacked(
    source: Sequence[Mapping[str, np.ndarray]], batch: int
) -> list[dict[str, np.ndarray]]:
    """All examples in batches of one shape: behind the last stand zeros."""
    examples = [source[i] for i in range(len(source))]
    nothing = {name: np.zeros_like(array) for name, array in examples[0].items()}
    examples += [nothing] * (-len(examples) % batch)
    return [
        {k: np.stack([e[k] for e in examples[i : i + batch]]) for k in nothing}
        for i in range(0, len(examples), batch)
    ]


def read(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch as a pass over calibration data takes it: padding counts for nothing."""
    segments = batch["segment_ids"]
    return {"tokens": batch["tokens"], "segment_ids": segments, "valid": segments > 0}


def split(documents: Documents, held_out: float) -> dict[str, Documents]:
    """Documents by split; equal documents are in the same one.

    Of each source the share `held_out` of its different documents, at least two, is
    never trained on: those with the smallest digests, which are as good as drawn by
    lot and depend on nothing else. Evaluation and calibration take turns at them.

    Raises:
      ValueError: a source with fewer than three different documents, or a share
        outside 0..1.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out}")
    digests = np.array(
        [hashlib.sha256(documents[i]).hexdigest() for i in range(len(documents))]
    )
    taken: dict[str, str] = {}
    problems = []
    for source in np.unique(documents.source):
        ranked = np.unique(digests[documents.source == source]).tolist()
        if len(ranked) < 3:
            problems.append(
                f"files[{source}] has {len(ranked)} different documents: one each is "
                "needed to train, to calibrate and to evaluate; cut them, or put the "
                "files under one pattern"
            )
        count = min(max(2, round(held_out * len(ranked))), len(ranked) - 1)
        for i, digest in enumerate(ranked[:count]):
            taken.setdefault(digest, SPLITS[2 - i % 2])
    if problems:
        raise ValueError("documents cannot be split:\n  " + "\n  ".join(problems))
    where = np.array([taken.get(digest, "train") for digest in digests])
    return {name: documents.where(where == name) for name in SPLITS}
