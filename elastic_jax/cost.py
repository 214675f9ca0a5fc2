"""What a submodel costs: parameters, active parameters, bytes, and measured seconds.

Every cost but the last is a sum over parameters of a product over named dimensions. A
dimension's size is an integer where counts are given, so that the sum is exact, or the
sum of its mask, so that the router's budget loss can be differentiated. No array is
allocated. Seconds are read from a table at the same sizes.
"""

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from elastic_jax.axes import AXES, Counts, ParamSpec, blocks_with, layers_with
from elastic_jax.config import ModelConfig, did_you_mean
from elastic_jax.latency_grid import PHASES
from elastic_jax.latency_table import LatencyTable

# Bytes of 16 stored values. NVFP4 packs 16 four-bit values and one scale byte.
BLOCK_BYTES = {"fp32": 64, "bf16": 32, "fp16": 32, "fp8": 16, "nvfp4": 9}

# What a latency budget counts: one pass over the prompt, one token, or an answer.
LATENCIES = (*PHASES, "answer")

Number = int | float | Array


@dataclass(frozen=True)
class Cost:
    """The cost of one submodel, made by `cost`.

    Numbers are Python integers for counts (seconds are floats), float32 scalars for
    masks.
    """

    specs: Any
    sizes: Mapping[str, Any]  # of every dimension; a tuple has one entry per block
    exact: bool

    @property
    def total_params(self) -> Number:
        """Every stored parameter."""
        return self._number(self._sum(self.specs))

    @property
    def active_params(self) -> Number:
        """Parameters that one token uses: `top_k` of the routed experts, all else."""
        return self._number(self._sum(self.specs, active=True))

    def read_bytes(self, precision: str = "bf16") -> Number:
        """Bytes of weights that one token reads: active, and of the embedding a row."""
        row = ("embedding",), ParamSpec("-> embed")
        specs = tuple(row if each[0] == row[0] else each for each in self.specs)
        block_bytes = block_bytes_of(precision)
        return self._bytes(self._sum(specs, active=True, block_bytes=block_bytes))

    def weight_bytes(self, precision: str = "bf16") -> Number:
        """Bytes of all weights, every one stored in `precision`, rounded up."""
        return self._bytes(self._sum(self.specs, block_bytes=block_bytes_of(precision)))

    def cache_bytes(
        self, cache_specs, *, batch: int, length: int, precision: str = "bf16"
    ) -> Number:
        """Bytes of the decoding cache of `batch` rows of `length` tokens.

        Arrays with a dtype of their own (scan states, counters) keep it; the others
        are stored in `precision`.
        """
        given = {"batch": at_least_one("batch", batch)}
        given |= {"length": at_least_one("length", length)}
        block_bytes = block_bytes_of(precision)
        return self._bytes(self._sum(cache_specs, block_bytes=block_bytes, **given))

    def latency_seconds(
        self,
        table: LatencyTable,
        *,
        phase: str = "decode",
        new_tokens: int | None = None,
    ) -> Number:
        """Seconds that `table` predicts, for its batch and lengths, on its device.

        Args:
          phase: `"prefill"` reads the prompt, `"decode"` is one token, and `"answer"`
            the prompt and `new_tokens` tokens.

        Raises:
          ValueError: a table of another model, without the phase, or too narrow.
        """
        if problem := phase_problem(phase, new_tokens):
            raise ValueError(problem)
        if phase == "answer":
            once, each = (table.seconds(self.sizes, name) for name in PHASES)
            seconds = once + new_tokens * each
        else:
            seconds = table.seconds(self.sizes, phase)
        return float(seconds) if self.exact else self._number(seconds)

    def _sum(self, specs, *, active=False, block_bytes=None, **given: int) -> Number:
        """Summed products of sizes: elements, or 1/16 bytes with `block_bytes`."""
        sizes = {**self.sizes, **given}
        uneven = frozenset(d for d, size in sizes.items() if isinstance(size, tuple))
        exact, soft = 0, []
        for factors, times in _terms(specs, uneven, active, block_bytes):
            product = [sizes[d] if i is None else sizes[d][i] for d, i in factors]
            whole = times * math.prod(n for n in product if isinstance(n, int))
            masked = [n for n in product if not isinstance(n, int)]
            if masked:
                soft.append(math.prod(masked, start=float(whole)))
            else:
                exact += whole
        return _pairwise_sum([*soft, float(exact)]) if soft else exact

    def _bytes(self, sixteenths: Number) -> Number:
        if isinstance(sixteenths, int):
            return self._number(-(-sixteenths // 16))
        return self._number(sixteenths / 16)

    def _number(self, value: Number) -> Number:
        return value if self.exact else jnp.asarray(value, jnp.float32)


def cost(
    specs,
    cfg: ModelConfig,
    *,
    counts: Counts | None = None,
    masks: Mapping[str, Any] | None = None,
) -> Cost:
    """The cost of the submodel of `cfg` that `counts` or `masks` keep.

    Args:
      specs: the parameter specs of `cfg`.
      counts: kept units; None is the full model.
      masks: hard or soft masks, constant in time; a unit counts as its mask value.

    Raises:
      ValueError: both are given, or they do not fit `cfg`, or masks vary along time.
    """
    if counts is not None and masks is not None:
        raise ValueError("cost: give counts or masks, not both")
    given = masks if masks is not None else counts or {}
    measure = _count if masks is None else _mask_sum
    problems, sizes = [], dict(vars(cfg))
    for axis, kept in given.items():
        if axis not in AXES:
            problems.append(f"unknown axis {axis!r}{did_you_mean(axis, AXES)}")
        elif kept is not None:
            try:
                sizes[axis] = _kept(cfg, axis, kept, measure)
            except ValueError as error:
                problems.append(f"{axis}: {error}")
    if problems:
        raise ValueError("cost cannot use these:\n  " + "\n  ".join(problems))
    return Cost(specs, sizes, exact=masks is None)


@functools.lru_cache(maxsize=256)
def _terms(specs, uneven: frozenset[str], active: bool, block_bytes: int | None):
    """((dim, block), ...) -> how often this product occurs in `specs`, as pairs.

    `block` is an index into a size with one entry per block, for the dims in `uneven`.
    Equal products are counted, not repeated: 52 blocks have few distinct ones, which
    keeps a traced budget loss small.
    """
    terms: Counter = Counter()
    for path, spec in specs:
        factors = []
        for dim in spec.dims:
            block = layers_with(specs, dim).index(path[1]) if dim in uneven else None
            chosen = active and dim == "experts" and dim in spec.batch
            factors.append(("top_k" if chosen else dim, None if chosen else block))
        if path[0] == "layers" and "layers" in uneven:
            factors.append(("layers", path[1]))
        own = getattr(spec, "dtype", None)
        weight = jnp.dtype(own).itemsize * 16 if own else block_bytes
        terms[tuple(factors)] += 1 if block_bytes is None else weight
    return tuple(terms.items())


def _kept(cfg: ModelConfig, axis: str, kept, measure):
    """`measure(entry, full size)` for the axis, or for each block that has it."""
    if axis == "layers":
        if np.shape(kept) != (cfg.layers,):
            raise ValueError(f"shape {np.shape(kept)}, expected {(cfg.layers,)}")
        return tuple(kept if measure is _count else jnp.asarray(kept, jnp.float32))
    full = getattr(cfg, axis)
    if not isinstance(kept, tuple) and not isinstance(full, tuple):
        return measure(kept, full)
    blocks = len(blocks_with(cfg.pattern, axis))
    if isinstance(kept, tuple) and len(kept) != blocks:
        raise ValueError(f"{len(kept)} entries for {blocks} blocks that have it")
    each = kept if isinstance(kept, tuple) else (kept,) * blocks
    sizes = full if isinstance(full, tuple) else (full,) * blocks
    return tuple(measure(k, n) for k, n in zip(each, sizes, strict=True))


def _count(kept: int, size: int) -> int:
    if not 0 < kept <= size:
        raise ValueError(f"{kept} of {size}; make counts with elastic_jax.counts")
    return kept


def _mask_sum(mask: Array, size: int) -> Array:
    if mask.shape != (size,):
        raise ValueError(
            f"a mask of shape {mask.shape}, expected {(size,)}, constant in time"
        )
    return jnp.sum(mask, dtype=jnp.float32)


def _pairwise_sum(terms: list) -> Array:
    """A tree of additions: float32 rounding grows with the depth, not the length."""
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[2 * len(pairs) :]
    return terms[0]


def block_bytes_of(precision: str) -> int:
    """Bytes of 16 values."""
    if precision not in BLOCK_BYTES:
        known = did_you_mean(precision, BLOCK_BYTES)
        raise ValueError(f"unknown precision {precision!r}{known}")
    return BLOCK_BYTES[precision]


def phase_problem(phase: str, new_tokens: Any) -> str | None:
    """What is wrong with what a latency is to count, if anything is."""
    if phase not in LATENCIES:
        return f"unknown phase {phase!r}{did_you_mean(phase, LATENCIES)}"
    if phase == "answer" and (type(new_tokens) is not int or new_tokens < 1):
        return f"phase 'answer' needs new_tokens=, at least 1, got {new_tokens!r}"
    return None


def at_least_one(name: str, value: Any) -> int:
    """`value`, if it is an int from 1 on; else a ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
    return value
