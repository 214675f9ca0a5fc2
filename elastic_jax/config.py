"""What a model is, and what of it is elastic: frozen, hashable, validated values.

A configuration is data: it can name no code, no file and no address. All problems
of one are reported together.
"""

import dataclasses
import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from elastic_jax.axes import AXES, BLOCK_KINDS, Size, blocks_with

LARGEST_SIZE = 2**24
LONGEST_PATTERN = 1024


@dataclass(frozen=True)
class ModelConfig:
    """A Nemotron-H model: a pattern of blocks and the size of every dimension.

    Attributes:
      pattern: one letter per block: `M` Mamba-2, `*` attention, `E` mixture of
        experts, `-` dense MLP.
      vocab, embed: vocabulary entries and residual channels.
      ssm_groups, heads_per_group, ssm_head_dim, ssm_state, conv_width: Mamba-2. A
        group of heads shares B and C.
      kv_heads, q_per_kv, head_dim: attention.
      experts, expert_ffn, shared_ffn: mixture of experts.
      ffn: dense MLP.
      top_k: experts chosen per token.
      n_group, topk_group: expert groups, and how many of them a token may use.
      routed_scaling_factor: factor on the normalised expert gates.
      norm_eps: added to the mean square in every RMSNorm.

    A parent's sizes are ints; a submodel's may be tuples with one int per block
    that has the axis, in depth order.

    Raises:
      ValueError: with every problem of the configuration at once.
    """

    pattern: str
    vocab: int
    embed: int
    ssm_groups: int
    heads_per_group: Size
    ssm_head_dim: Size
    ssm_state: Size
    kv_heads: int
    q_per_kv: Size
    head_dim: int
    experts: Size
    expert_ffn: Size
    shared_ffn: Size
    ffn: Size
    top_k: int
    conv_width: int = 4
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        problems = list(_problems(self))
        if problems:
            raise ValueError("invalid ModelConfig:\n  " + "\n  ".join(problems))

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.pattern)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`; lists become tuples, unknown names are errors."""
        names = [f.name for f in fields(cls)]
        problems = [
            f"unknown field {key!r}{did_you_mean(key, names)}"
            for key in values
            if key not in names
        ]
        required = [f.name for f in fields(cls) if f.default is dataclasses.MISSING]
        problems += [f"missing field {key!r}" for key in required if key not in values]
        if problems:
            raise ValueError("invalid ModelConfig:\n  " + "\n  ".join(problems))
        return cls(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        )


@dataclass(frozen=True)
class ElasticConfig:
    """Which axes a router chooses on, and among which counts.

    Attributes:
      choices: (axis, candidate counts) pairs; counts descend and start at the
        parent's full size, so that index 0 is always "full". For `layers` a count is
        the number of blocks kept.
      per_layer: axes on which every block chooses for itself; the others make one
        choice for all blocks (homogeneous).

    `validate(cfg)` checks the choices against a parent.
    """

    choices: tuple[tuple[str, tuple[int, ...]], ...]
    per_layer: tuple[str, ...] = ()

    def validate(self, cfg: ModelConfig) -> None:
        """Raises one ValueError that lists everything that does not fit `cfg`."""
        problems = []
        seen = [axis for axis, _ in self.choices]
        problems += [f"axis {a!r} is listed twice" for a in seen if seen.count(a) > 1]
        for axis, options in self.choices:
            if axis not in AXES:
                problems.append(f"unknown axis {axis!r}{did_you_mean(axis, AXES)}")
                continue
            full, step = getattr(cfg, axis), AXES[axis].step
            if AXES[axis].blocks and not blocks_with(cfg.pattern, axis):
                problems.append(f"{axis}: no block of {cfg.pattern!r} has this axis")
            if axis == "experts" and cfg.topk_group < cfg.n_group:
                problems.append(
                    f"experts: not elastic while topk_group {cfg.topk_group} < "
                    f"n_group {cfg.n_group}; leave the axis out"
                )
            if wrong := [n for n in options if not _is_int(n)]:
                problems.append(f"{axis}: choices must be ints, got {wrong}")
                continue
            if not options or options[0] != full:
                problems.append(f"{axis}: the first choice must be the full {full}")
            if list(options) != sorted(set(options), reverse=True):
                problems.append(f"{axis}: choices must descend without repeats")
            floor = cfg.top_k if axis == "experts" else 1
            for n in options:
                if n != full and (n % step or n < floor):
                    problems.append(
                        f"{axis}: choice {n} must be a multiple of {step}, at least "
                        f"{max(step, floor)}"
                    )
        for axis in self.per_layer:
            if axis not in seen:
                problems.append(f"per_layer names {axis!r}, which has no choices")
            elif not AXES[axis].blocks:
                problems.append(f"{axis} is one choice for the model, not per layer")
        if problems:
            raise ValueError("invalid ElasticConfig:\n  " + "\n  ".join(problems))


def did_you_mean(name: str, known) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, else what is allowed."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; expected one of {sorted(known)}"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _problems(cfg: ModelConfig):
    """Yields every reason why `cfg` cannot be a model."""
    if not isinstance(cfg.pattern, str) or not cfg.pattern:
        yield f"pattern: expected letters of {''.join(BLOCK_KINDS)!r}"
        return
    if len(cfg.pattern) > LONGEST_PATTERN:
        yield f"pattern: {len(cfg.pattern)} blocks, at most {LONGEST_PATTERN}"
        return
    unknown = sorted(set(cfg.pattern) - set(BLOCK_KINDS))
    if unknown:
        yield f"pattern: unknown letters {unknown}, expected {BLOCK_KINDS}"

    for field in fields(cfg):
        value, name = getattr(cfg, field.name), field.name
        if field.type is int or field.type is Size:
            entries = value if isinstance(value, tuple) else (value,)
            if isinstance(value, tuple) and field.type is int:
                yield f"{name}: expected one int, got {value}"
            elif isinstance(value, tuple):
                blocks = len(blocks_with(cfg.pattern, name))
                if len(value) != blocks:
                    yield f"{name}: {len(value)} sizes for {blocks} blocks that have it"
            for n in entries:
                if not _is_int(n) or not 0 < n <= LARGEST_SIZE:
                    yield f"{name}: expected an int in 1..{LARGEST_SIZE}, got {n!r}"
        elif field.type is float:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value <= sys.float_info.max:
                yield f"{name}: expected a positive finite number, got {value!r}"

    if not all(_is_int(n) and n > 0 for n in (cfg.n_group, cfg.topk_group, cfg.top_k)):
        return
    if cfg.topk_group > cfg.n_group:
        yield f"topk_group {cfg.topk_group} is larger than n_group {cfg.n_group}"
    experts = cfg.experts if isinstance(cfg.experts, tuple) else (cfg.experts,)
    for n in experts if "E" in cfg.pattern else ():
        if not _is_int(n):
            continue
        if n < cfg.top_k:
            yield f"experts {n} is smaller than top_k {cfg.top_k}"
        if n % cfg.n_group:
            yield f"experts {n} is not a multiple of n_group {cfg.n_group}"
        elif cfg.n_group > 1 and n // cfg.n_group < 2:
            yield f"experts {n} leaves fewer than 2 in each of n_group {cfg.n_group}"
        elif n // cfg.n_group * cfg.topk_group < cfg.top_k:
            yield (
                f"topk_group {cfg.topk_group} groups of {n // cfg.n_group} experts "
                f"hold fewer than top_k {cfg.top_k}"
            )
