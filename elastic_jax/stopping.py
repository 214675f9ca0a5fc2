"""What ends a row: tokens, or strings wherever the tokens' text contains them.

    v vocab   s states   m stop tokens

Strings are found by an automaton over bytes (Aho and Corasick, 1975). Reading a token
means reading all its bytes, so the automaton is turned into a table from state and
token to state: the search is one lookup per token, inside the compiled loop, and finds
a string however it is cut into tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

FOUND = -1  # the state behind a whole stop string


class Stops(NamedTuple):
    """What ends a row; `stops` makes it.

    Attributes:
      tokens: each of them ends a row; -1 is none.
      table: the state after a token, or `FOUND`; [1, 1] where no string is searched.
    """

    tokens: Int[Array, " m"]
    table: Int[Array, "s v"]


def stops(
    vocab: int,
    tokens: int | Sequence[int] | None = (),
    strings: Sequence[str | bytes] = (),
    pieces: Sequence[bytes] | None = None,
) -> Stops:
    """What ends a row.

    Args:
      tokens: one token or several; None and () are none.
      strings: found across tokens; the token that completes one ends the row.
      pieces: the bytes of every token; needed for strings.

    The arrays are padded to powers of two, so that few sizes are ever compiled.

    Raises:
      ValueError: with everything that does not fit.
    """
    given = several(tokens)
    if isinstance(strings, str | bytes):
        strings = (strings,)
    searched = [s.encode() if isinstance(s, str) else s for s in strings]
    problems = [
        f"stop token {token!r}: expected one in 0..{vocab - 1}"
        for token in given
        if not is_token(token, vocab)
    ]
    problems += [
        f"stop string {s!r}: expected text that is not empty"
        for s in searched
        if not isinstance(s, bytes) or not s
    ]
    if searched and pieces is None:
        problems.append(
            "stop strings: need the bytes of every token, pieces=tokenizer.pieces"
        )
    elif searched and len(pieces) > vocab:
        problems.append(f"pieces: {len(pieces)} tokens, the vocabulary has {vocab}")
    if problems:
        raise ValueError("cannot stop there:\n  " + "\n  ".join(problems))
    padded = np.full(_power_of_two(len(given)), -1, np.int32)
    padded[: len(given)] = given
    table = np.zeros((1, 1), np.int32)
    if searched:
        steps = _automaton(searched)
        table = np.zeros((_power_of_two(len(steps)), vocab), np.int32)
        table[: len(steps), : len(pieces)] = _by_token(steps, pieces)
    return Stops(jnp.asarray(padded), jnp.asarray(table))


def at_stop(stops: Stops, number, token: Int[Array, " b"], state: Int[Array, " b"]):
    """The rule of `decoding` that ends rows at `stops`; the state starts with 0."""
    most = stops.table.shape[1] - 1
    state = stops.table[state, jnp.minimum(token, most)]
    ends = (state == FOUND) | jnp.any(token[:, None] == stops.tokens, axis=-1)
    return token, state, ends


def several(tokens: int | Sequence[int] | None) -> tuple[int, ...]:
    """No token, one or more, as a tuple."""
    if tokens is None:
        return ()
    return (tokens,) if isinstance(tokens, int | np.integer) else tuple(tokens)


def is_token(token: Any, vocab: int) -> bool:
    """Whether `token` is an int of the vocabulary."""
    whole = isinstance(token, int | np.integer) and not isinstance(token, bool)
    return whole and 0 <= token < vocab


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _automaton(strings: Sequence[bytes]) -> np.ndarray:
    """The next state by [state, byte]; state 0 is the start."""
    follow: list[dict[int, int]] = [{}]
    for string in strings:
        state = 0
        for byte in string[:-1]:
            if byte not in follow[state]:
                follow.append({})
                follow[state][byte] = len(follow) - 1
            state = follow[state][byte]
            if state == FOUND:
                break  # a shorter string is found before this one
        else:
            follow[state][string[-1]] = FOUND
    steps = np.zeros((len(follow), 256), np.int32)
    fallback, queue = [0] * len(follow), [0]
    for state in queue:
        # What is no continuation here may be one of the longest suffix that is a state.
        if state:
            steps[state] = steps[fallback[state]]
        for byte, after in follow[state].items():
            behind = steps[state, byte]
            # A suffix that is a whole string ends the search before `after` does.
            if behind != FOUND or not state:
                steps[state, byte] = after
            if after != FOUND:
                fallback[after] = 0 if state == 0 else max(behind, 0)
                queue.append(after)
    return steps


def _by_token(steps: np.ndarray, pieces: Sequence[bytes]) -> np.ndarray:
    """The next state by [state, token]: all bytes of the token, all tokens at once."""
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i]))
    lengths = np.array([len(pieces[i]) for i in order])
    longest = int(lengths[0]) if len(order) else 0
    # Row FOUND, the last, stays where it is.
    steps = np.concatenate([steps, np.full((1, 256), FOUND, np.int32)])
    states = np.repeat(np.arange(len(steps) - 1)[:, None], len(order), axis=1)
    for at in range(longest):
        reaching = int(np.searchsorted(-lengths, -at, side="left"))
        byte = np.array([pieces[i][at] for i in order[:reaching]])
        states[:, :reaching] = steps[states[:, :reaching], byte]
    table = np.empty_like(states)
    table[:, order] = states
    return table
