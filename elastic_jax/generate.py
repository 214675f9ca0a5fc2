"""Cached generation: prompts in, tokens out.

    b batch   t prompt length   n new tokens   v vocab

This is the edge: requests are checked, put into buckets and taken out again. What is
compiled is in `decoding`.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from elastic_jax.axes import Counts
from elastic_jax.config import ModelConfig
from elastic_jax.decoding import (
    Asked,
    Draft,
    Submodel,
    Text,
    Written,
    batch_bucket,
    length_bucket,
    read,
    write,
)
from elastic_jax.exact import ROWS, TOKENS
from elastic_jax.listeners import Listener
from elastic_jax.masks import BudgetMasks
from elastic_jax.sampling import Sampling, sampling
from elastic_jax.stopping import at_stop, stops


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated, on the host.

    Attributes:
      tokens: [b, n]; behind a row's end, its last token again.
      lengths: [b], tokens generated per row, what stopped it included.
      stopped: [b], whether a stop token or string ended the row, not its limit.
      rounds: [b], calls of the model per row; fewer than `lengths` with drafts.
      seconds: of reading the prompts ("read") and of the rest ("write").
      logits: [b, n, v] that the tokens were drawn from, if they were asked for.
    """

    tokens: Int[np.ndarray, "b n"]
    lengths: Int[np.ndarray, " b"]
    stopped: Bool[np.ndarray, " b"]
    rounds: Int[np.ndarray, " b"]
    seconds: Mapping[str, float]
    logits: Float[np.ndarray, "b n v"] | None = None


def generate(
    params: Any,
    prompts: Int[np.ndarray, "b t"],
    cfg: ModelConfig,
    *,
    max_new_tokens: Any,
    lengths: Int[np.ndarray, " b"] | None = None,
    counts: Counts | None = None,
    masks: BudgetMasks | None = None,
    stop_tokens: int | Sequence[int] | None = (),
    stop_strings: Sequence[str | bytes] = (),
    pieces: Sequence[bytes] | None = None,
    draft: Counts | None = None,
    draft_tokens: int = 4,
    exact: bool = False,
    listener: Listener | None = None,
    keep_logits: bool = False,
    drawn: Any = 0,
    rehearse: bool = False,
    **options: Any,
) -> Generation:
    """Continues every prompt until it stops or has `max_new_tokens`.

    Args:
      params, cfg: a model of any size.
      prompts: token ids; a ragged batch is padded at the right and says so by
        `lengths`.
      max_new_tokens: at least 1; one number or one per row.
      lengths: valid tokens per prompt, at least 1.
      counts: the submodel to run; it is cut from `params` inside the compiled call.
      masks: the submodel as masks of `cfg`, constant in time.
      stop_tokens: each ends a row; none runs every row to `max_new_tokens`.
      stop_strings: end a row with the token that completes one of them; they need
        `pieces`, the bytes of every token.
      draft: counts of a submodel that drafts `draft_tokens` tokens at a time; what is
        written is the same.
      exact: gives the same bits of logits however the work is split; slower. At most
        8 rows and 15 draft tokens.
      listener: `(tokens [b, k], lengths [b])` is called after every round with what
        each row wrote in it; it may return which rows to end [b]. An exception of it
        ends all rows, and is raised.
      keep_logits: return them; float32 [b, n, v] is much memory.
      drawn: tokens drawn so far, one number or one per row, where prompts are texts
        to be continued: seeds go on where they were.
      rehearse: compile all that the call needs, and write nothing.
      options: of `sampling`: `temperature`, `top_k`, `top_p` and `seeds`, each one
        value or one per row. Without, every row is greedy. What a row draws depends
        on its own prompt and seed, not on the rows beside it.

    Compiles once per submodel (and draft), batch bucket and length bucket: rows and
    lengths are rounded up to powers of two.

    Raises:
      ValueError: with everything that does not fit, by row.
    """
    prompts, lengths = ragged(prompts, lengths)
    rows = len(prompts) if prompts.ndim else 0
    problems = [*problems_of_prompts(prompts, lengths, cfg)]
    problems += problems_of_limits("max_new_tokens", max_new_tokens, rows)
    problems += _problems_of_submodels(counts, masks)
    problems += problems_of_drafts(draft, draft_tokens, exact)
    problems += problems_of_exactness(exact, rows)
    ending = attempt(problems, stops, cfg.vocab, stop_tokens, stop_strings, pieces)
    how = attempt(problems, sampling, max(rows, 1), **options)
    if problems:
        raise ValueError("cannot generate:\n  " + "\n  ".join(problems))
    limits = np.broadcast_to(max_new_tokens, (rows,))
    batch = Batch(
        params,
        how,
        rows,
        capacity=length_bucket(np.max(lengths + limits), exact=exact),
        masks=masks,
        exact=exact,
    )
    drafter = None if draft is None else Draft(Submodel(cfg, draft), draft_tokens)
    submodel = Submodel(cfg, counts, exact)
    if rehearse:
        lengths, limits = np.ones_like(lengths), np.zeros_like(limits)
    start = time.perf_counter()
    text = batch.read(prompts, lengths, submodel, drafter)
    middle = time.perf_counter()
    written, _ = batch.write(
        text,
        submodel,
        limits,
        rule=at_stop,
        data=ending,
        state=np.int32(0),
        drawn=drawn,
        draft=drafter,
        listener=listener,
        keep_logits=keep_logits,
    )
    seconds = {"read": middle - start, "write": time.perf_counter() - middle}
    return _generation(written, rows, int(np.max(max_new_tokens)), seconds)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of requests in a bucket: what all the calls for them share.

    Attributes:
      how: of each row.
      rows: those that somebody asked for; the bucket's others write nothing.
      capacity: tokens of the cache.
    """

    params: Any
    how: Sampling
    rows: int
    capacity: int
    masks: Any = None
    exact: bool = False

    def read(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        submodel: Submodel,
        draft: Draft | None = None,
    ) -> Text:
        """The rows' texts, ready to be continued; waits until they are read."""
        filled = self.filled(tokens), self.filled(lengths, 1)
        options = {"capacity": self.capacity, "masks": self.masks}
        text = read(self.params, *filled, submodel=submodel, **options)
        if draft is not None:
            options["masks"] = None
            drafter = read(self.params, *filled, submodel=draft.submodel, **options)
            text = text._replace(drafter=drafter.cache)
        return jax.block_until_ready(text)

    def write(
        self, text: Text, submodel: Submodel, limits, *, data, state, drawn, **options
    ) -> tuple[Written, Text]:
        """Writes behind the rows; `limits`, `drawn` and `state` are of the rows."""
        if (listener := options.pop("listener", None)) is not None:
            options["listener"] = self._of_rows(listener)

        def spread(value, dtype=None):
            each = np.broadcast_to(value, (self.rows,))
            return jnp.asarray(self.filled(each), dtype)

        asked = Asked(
            how=jax.tree.map(self.filled, self.how),
            limits=spread(limits, jnp.int32),
            drawn=spread(drawn, jnp.int32),
            data=data,
            state=jax.tree.map(spread, state),
        )
        options |= {"submodel": submodel, "capacity": self.capacity}
        return write(self.params, text, asked, masks=self.masks, **options)

    def filled(self, array: Any, value: Any = 0) -> np.ndarray:
        """An array of the rows, filled up to the bucket."""
        array = np.asarray(array)
        more = batch_bucket(self.rows, exact=self.exact) - self.rows
        width = [(0, more)] + [(0, 0)] * (array.ndim - 1)
        return np.pad(array, width, constant_values=value)

    def _of_rows(self, listener: Listener) -> Listener:
        def heard(tokens, lengths):
            ended = listener(tokens[: self.rows], lengths[: self.rows])
            return None if ended is None else self.filled(ended)

        return heard


def ragged(prompts, lengths) -> tuple[np.ndarray, np.ndarray]:
    """Prompts and lengths on the host, unchecked; without lengths all are full."""
    prompts = np.asarray(prompts)
    if lengths is None:
        lengths = np.full(prompts.shape[:1], prompts.shape[-1] if prompts.ndim else 0)
    return prompts, np.asarray(lengths)


def trimmed(written: Written, rows: int, limit: int) -> dict[str, np.ndarray]:
    """Tokens and lengths of the rows that somebody asked for."""
    tokens, lengths = np.asarray(written.tokens), np.asarray(written.lengths)
    return {"tokens": tokens[:rows, :limit], "lengths": lengths[:rows]}


def _generation(written: Written, rows: int, limit: int, seconds) -> Generation:
    found = trimmed(written, rows, limit)
    tokens, lengths = found["tokens"], found["lengths"]
    last = np.take_along_axis(tokens, np.maximum(lengths - 1, 0)[:, None], axis=1)
    tokens = np.where(np.arange(limit) < lengths[:, None], tokens, last)
    logits = written.logits
    return Generation(
        tokens,
        lengths,
        np.asarray(written.ended)[:rows],
        np.asarray(written.rounds)[:rows],
        seconds,
        None if logits is None else np.asarray(logits[:rows, :limit]),
    )


# ------------------------------------------------------------------------- problems


def attempt(problems: list[str], make: Callable, *given: Any, **options: Any) -> Any:
    """What `make` makes; the problems of its ValueError join the others."""
    try:
        return make(*given, **options)
    except ValueError as error:
        problems += [line.strip() for line in str(error).split("\n")[1:]]
    return None


def problems_of_prompts(prompts, lengths, cfg: ModelConfig) -> Iterator[str]:
    """Every reason why these cannot be prompts."""
    if prompts.ndim != 2 or not np.issubdtype(prompts.dtype, np.integer):
        yield f"prompts must be integers [b, t], got {prompts.dtype} {prompts.shape}"
        return
    rows, time = prompts.shape
    if not rows or not time:
        yield f"prompts are empty: shape {prompts.shape}"
        return
    if lengths.shape != (rows,) or not np.issubdtype(lengths.dtype, np.integer):
        yield (
            f"lengths: expected integers of shape {(rows,)}, got {lengths.dtype} "
            f"{lengths.shape}"
        )
        return
    for row in np.flatnonzero((lengths < 1) | (lengths > time)):
        yield f"row {row}: length {lengths[row]} is not in 1..{time}"
    valid = np.arange(time) < lengths[:, None]
    outside = valid & ((prompts < 0) | (prompts >= cfg.vocab))
    for row in np.flatnonzero(outside.any(axis=1)):
        bad = prompts[row][outside[row]][0]
        yield f"row {row}: token {bad} is outside the vocabulary of {cfg.vocab}"


def problems_of_limits(
    name: str, given: Any, rows: int, least: int = 1
) -> Iterator[str]:
    """Every reason why this cannot be a number of tokens, or one per row."""
    limits = np.asarray(given)
    if (
        limits.shape not in ((), (rows,))
        or limits.dtype.kind not in "iu"
        or (limits < least).any()
    ):
        yield f"{name}: expected ints from {least} on, one or {rows}, got {given!r}"


def _problems_of_submodels(counts, masks) -> Iterator[str]:
    if masks is not None and counts is not None:
        yield "give counts or masks, not both"
    if any(leaf.ndim > 1 for leaf in jax.tree.leaves(masks)):
        yield "masks change along time: give one mask per axis and layer"
    yield from problems_of_counts("counts", counts)


def problems_of_counts(name: str, counts: Any) -> Iterator[str]:
    """Why this is not one submodel for all rows."""
    if counts is not None and not isinstance(counts, Counts):
        yield (
            f"{name}: expected the counts of one submodel, got {type(counts).__name__} "
            f"{counts!r}; rows of one call share a submodel: make it with "
            "elastic_jax.counts, and give other submodels calls of their own"
        )


def problems_of_exactness(exact: bool, rows: int) -> Iterator[str]:
    """Why these rows cannot be read exactly."""
    if exact and rows > ROWS:
        yield f"exact: at most {ROWS} rows in a call, got {rows}; call more than once"


def problems_of_drafts(draft, draft_tokens, exact) -> Iterator[str]:
    """Why this cannot draft."""
    yield from problems_of_counts("draft", draft)
    if draft is None:
        return
    most = TOKENS - 1 if exact else 64
    if type(draft_tokens) is not int or not 1 <= draft_tokens <= most:
        yield f"draft_tokens: expected an int in 1..{most}, got {draft_tokens!r}"
