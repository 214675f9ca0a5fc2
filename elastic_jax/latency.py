"""Measures what blocks take on this device, and what whole models really take.

    b batch   t tokens   v vocab

Everything is timed as generation runs it: inside one jitted loop that feeds each
result into the next call. A long loop less a short one, by the passes between them, is
the seconds of a pass without what a call costs. A block is timed as several copies in
a row between small ends, less those ends. The copies have weights of their own, and
together about as many as the parent reads in a pass: what takes two times as many
bytes as a processor's cache takes more than two times as long. Widths are cut out
inside the call: all of them together take the memory of the largest.

The parts of a parent do not quite add up to it: what is left in caches, and what runs
side by side, differs. So the parent is timed whole in the same rounds, and all seconds
of a phase are scaled by the one factor that makes the sum right.
"""

import dataclasses
import datetime
import itertools
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from elastic_jax.axes import Counts
from elastic_jax.config import ElasticConfig, ModelConfig, did_you_mean
from elastic_jax.cost import cost
from elastic_jax.latency_grid import ENDS, PHASES, Grid, axes_of
from elastic_jax.latency_table import FIXED, LatencyTable
from elastic_jax.layers.norm import rms_norm
from elastic_jax.model import extend, init_cache, logits, param_specs
from elastic_jax.nesting import slice_config, slice_params
from elastic_kernels.timing import alternate

LARGEST_GRID = 32  # combinations of widths that are measured of one kind of block
COPIES = (2, 6)  # of a block in a row: at least, and at most
SMALL_ENDS, SMALL_VOCAB = "small ends", 256  # around them
# What a timed loop takes at least. The first passes find other weights in the caches.
LOOP_SECONDS, LOOP_PASSES = 0.1, 4
WHOLE = "whole"  # the parent
RESOLUTION_SECONDS = 1e-9  # what cannot be told from nothing is said to take this

STRIDE = 61  # between tokens, odd

Clock = Callable[[], float]
Widths = tuple[tuple[str, tuple[int, ...]], ...]  # as of `Grid`
Point = tuple[tuple[str, int], ...]  # one of their combinations


class Load(NamedTuple):
    """What a pass reads.

    Attributes:
      batch: rows.
      prompt: tokens that a prefill reads into an empty cache.
      context: length of the cache; decoding reads the token that fills it.
    """

    batch: int
    prompt: int
    context: int


def measure_latency(
    params: Any,
    cfg: ModelConfig,
    elastic: ElasticConfig | None = None,
    *,
    batch: int = 1,
    prompt: int,
    context: int,
    phases: Sequence[str] = PHASES,
    repeats: int = 5,
    clock: Clock = time.perf_counter,
    on_compiled: Callable[[int, int], Any] = lambda done, total: None,
) -> LatencyTable:
    """Measures the table of `cfg` for the counts that `elastic` offers, on this device.

    All combinations of counts are measured, for each kind of block. Where these are
    more than 32, the longest lists of counts lose every other one, never an end: work
    is linear in each width, so the ends carry most of what there is to know.

    Args:
      params: the parent's; its experts are used as its own router chooses.
      batch, prompt, context: rows, tokens of a prefill, length of the cache.
      phases: `"prefill"`, `"decode"` or both.
      repeats: rounds in which everything is timed once; the least time counts.
      clock: of seconds. `time.process_time` does not count what a shared machine gave
        to others; the process needs to have one thread.
      on_compiled: called with how many of all programs are compiled; that takes a CPU
        one to four seconds each, and more than timing them.

    Raises:
      ValueError: numbers or phases that cannot be, or counts of another model.
    """
    load = Load(batch, prompt, context)
    _check(cfg, load, phases, repeats)
    if uneven := [name for name, n in vars(cfg).items() if type(n) is tuple]:
        raise ValueError(f"measure the parent: here blocks differ in {uneven}")
    if elastic is not None:
        elastic.validate(cfg)
    kinds = (*dict.fromkeys(cfg.pattern), ENDS)
    widths = {kind: _widths(cfg, elastic, kind) for kind in kinds}
    timed = {}
    for part, options in {**widths, SMALL_ENDS: widths[ENDS]}.items():
        held, part_cfg = _part(params, cfg, part)
        for at, phase in itertools.product(_combinations(options), phases):
            counts = Counts({axis: n for axis, n in at if n < getattr(cfg, axis)})
            timed[part, at, phase] = _loop(held, part_cfg, counts, phase, load)
    for phase in phases:
        timed[WHOLE, (), phase] = _loop(params, cfg, Counts({}), phase, load)
    seconds = _passes(timed, repeats, clock, on_compiled)

    def alone(kind: str, at: Point, phase: str) -> float:
        taken = seconds[kind, at, phase]
        if kind != ENDS:
            (embed, *_) = at
            taken -= seconds[SMALL_ENDS, (embed,), phase]
            taken /= _copies(cfg, kind)
        return max(taken, RESOLUTION_SECONDS)

    def factor(phase: str) -> float:
        full = lambda kind: tuple((axis, n[-1]) for axis, n in widths[kind])
        parts = [alone(kind, full(kind), phase) for kind in (*cfg.pattern, ENDS)]
        return max(seconds[WHOLE, (), phase], RESOLUTION_SECONDS) / sum(parts)

    scale = {phase: factor(phase) for phase in PHASES if phase in phases}

    def grid(kind: str) -> Grid:
        points = list(_combinations(widths[kind]))
        found = {
            phase: tuple(by * alone(kind, at, phase) for at in points)
            for phase, by in scale.items()
        }
        return Grid(kind, widths[kind], tuple(found.items()))

    return LatencyTable(
        device=device_name(),
        date=datetime.date.today().isoformat(),
        jax=jax.__version__,
        dtype=str(params["embedding"].dtype),
        **load._asdict(),
        scale=tuple(scale.items()),
        fixed=tuple((name, getattr(cfg, name)) for name in FIXED),
        grids=tuple(map(grid, kinds)),
    )


def measure_models(
    models: Mapping[str, tuple[Any, ModelConfig]],
    *,
    batch: int = 1,
    prompt: int,
    context: int,
    phases: Sequence[str] = PHASES,
    repeats: int = 5,
    clock: Clock = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Name -> phase -> seconds of a whole model, of one prefill or of one token.

    Args:
      models: name -> (parameters, configuration); they are timed in turn.

    Other arguments and errors as of `measure_latency`.
    """
    load = Load(batch, prompt, context)
    for _, cfg in models.values():
        _check(cfg, load, phases, repeats)
    timed = {
        (name, phase): _loop(params, cfg, Counts({}), phase, load)
        for (name, (params, cfg)), phase in itertools.product(models.items(), phases)
    }
    seconds = _passes(timed, repeats, clock)
    return {name: {phase: seconds[name, phase] for phase in phases} for name in models}


def device_name() -> str:
    """This device for people: a GPU by its kind, a CPU by its model and cores."""
    kind = jax.devices()[0].device_kind
    if kind != "cpu":
        return kind
    model = platform.processor() or platform.machine()
    about = Path("/proc/cpuinfo")
    if about.exists():
        lines = (line.partition(":") for line in about.read_text().splitlines())
        model = next(
            (v.strip() for k, _, v in lines if k.strip() == "model name"), model
        )
    return f"{model}, {os.cpu_count()} cores"


# ------------------------------------------------------------------------- timing


def _part(params: Any, cfg: ModelConfig, part: str) -> tuple[Any, ModelConfig]:
    """What is timed: the ends alone, or copies of a block between small ones."""
    vocab = cfg.vocab if part == ENDS else min(cfg.vocab, SMALL_VOCAB)
    held = {
        "embedding": params["embedding"][:vocab],
        "final_norm": params["final_norm"],
        "lm_head": params["lm_head"][:, :vocab],
    }
    if part in (ENDS, SMALL_ENDS):
        return held, dataclasses.replace(cfg, vocab=vocab)
    blocks = [
        b for b, kind in zip(params["layers"], cfg.pattern, strict=True) if kind == part
    ]
    # Arrays of their own, also where the parent has fewer blocks.
    copies = itertools.islice(itertools.cycle(blocks), _copies(cfg, part))
    held["layers"] = tuple(jax.tree.map(jnp.copy, block) for block in copies)
    pattern = part * len(held["layers"])
    return held, dataclasses.replace(cfg, vocab=vocab, pattern=pattern)


def _copies(cfg: ModelConfig, kind: str) -> int:
    """How many blocks of a kind read as many parameters as `cfg` does."""
    reads = lambda c: cost(param_specs(c), c).active_params - 2 * c.vocab * c.embed
    one = reads(dataclasses.replace(cfg, pattern=kind))
    least, most = COPIES
    return min(max(round(reads(cfg) / one), least), most)


def _loop(params: Any, cfg: ModelConfig, counts: Counts, phase: str, load: Load):
    """`run(n)`: n passes of the submodel in one call, each fed by the one before."""
    specs = tuple((path, s) for path, s in param_specs(cfg) if path[0] in params)
    small, dtype = slice_config(cfg, counts), params["embedding"].dtype
    time = load.prompt if phase == "prefill" else 1
    empty = partial(init_cache, small, load.batch, load.context, dtype=dtype)
    read = partial(extend, cfg=small)
    if "layers" not in params:
        empty, read = (
            lambda: {"filled": jnp.zeros(load.batch, jnp.int32)},
            partial(_ends, cfg=small),
        )

    @jax.jit
    def run(params, lengths, filled, n):
        params = slice_params(params, specs, counts)

        def step(i, carry):
            tokens, cache = carry
            cache = empty() if phase == "prefill" else cache | {"filled": filled}
            y, cache = read(params, tokens, cache, lengths=lengths)
            last = jnp.take_along_axis(y, lengths[:, None, None] - 1, axis=1)[:, 0]
            # Greedy tokens alone soon repeat, and would use the same experts for ever.
            new = jnp.argmax(last, -1) + STRIDE * i
            return (tokens + new[:, None]) % cfg.vocab, cache

        tokens = jnp.arange(load.batch * time).reshape(load.batch, time) % cfg.vocab
        return jax.lax.fori_loop(0, n, step, (tokens, empty()))

    # Passed, not written into the program: nothing may be known at compile time.
    lengths = jnp.full(load.batch, time, jnp.int32)
    filled = jnp.full(load.batch, load.context - 1, jnp.int32)
    return partial(run, params, lengths, filled)


def _ends(params, tokens, cache, *, cfg: ModelConfig, lengths):
    """`extend` of a model without blocks."""
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    x = params["embedding"][jnp.where(valid, tokens, 0)]
    h = rms_norm(x, params["final_norm"], live=cfg.embed, eps=cfg.norm_eps)
    return logits(params, h), {"filled": cache["filled"] + lengths}


def _passes(
    loops: Mapping[Any, Callable[[int], Any]],
    repeats: int,
    clock: Clock,
    on_compiled=lambda done, total: None,
) -> dict[Any, float]:
    """Seconds of one pass of each loop, all of them timed in turn."""
    passes = {}
    for done, (name, loop) in enumerate(loops.items(), start=1):
        jax.block_until_ready(loop(1))
        on_compiled(done, len(loops))
        start = clock()
        jax.block_until_ready(loop(2))
        each = max(clock() - start, 1e-6) / 2
        passes[name] = max(LOOP_PASSES, math.ceil(LOOP_SECONDS / each))
    calls = {
        (name, long): partial(loop, 1 + passes[name] * long)
        for name, loop in loops.items()
        for long in (False, True)
    }
    took = alternate(calls, rounds=repeats, clock=clock)
    return {
        name: (took[name, True].min_seconds - took[name, False].min_seconds) / n
        for name, n in passes.items()
    }


# ------------------------------------------------------------------ what is measured


def _widths(cfg: ModelConfig, elastic: ElasticConfig | None, kind: str) -> Widths:
    """Ascending counts of every axis of a kind of block, thinned if they are many."""
    offered = dict(elastic.choices) if elastic is not None else {}
    options = {a: sorted(offered.get(a, (getattr(cfg, a),))) for a in axes_of(kind)}
    while math.prod(map(len, options.values())) > LARGEST_GRID:
        longest = max(options.values(), key=len)
        longest[:] = [longest[0], *longest[2:-1:2], longest[-1]]
    return tuple((axis, tuple(counts)) for axis, counts in options.items())


def _combinations(widths: Widths) -> Iterator[Point]:
    """All combinations, the last axis fastest."""
    each = ([(axis, n) for n in counts] for axis, counts in widths)
    return itertools.product(*each)


def _check(cfg: ModelConfig, load: Load, phases: Sequence[str], repeats: int) -> None:
    problems = [
        f"{name}: expected an int of at least 1, got {value!r}"
        for name, value in {**load._asdict(), "repeats": repeats}.items()
        if type(value) is not int or value < 1
    ]
    if not problems and load.context < load.prompt:
        problems.append(f"context {load.context} is shorter than prompt {load.prompt}")
    for phase in phases:
        if phase not in PHASES:
            problems.append(f"phase {phase!r}{did_you_mean(phase, PHASES)}")
    if not phases or len(set(phases)) < len(phases):
        problems.append(f"phases: expected some of {PHASES}, got {tuple(phases)}")
    if problems:
        raise ValueError("cannot measure latency:\n  " + "\n  ".join(problems))
