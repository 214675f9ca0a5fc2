"""A target for what a submodel may cost, and how people write one down."""

import math
import re
from dataclasses import dataclass
from typing import Any

from elastic_jax.config import ModelConfig, did_you_mean
from elastic_jax.cost import (
    Cost,
    Number,
    at_least_one,
    block_bytes_of,
    cost,
    phase_problem,
)
from elastic_jax.latency_table import LatencyTable

KINDS = (
    *("active_params", "total_params", "weight_bytes", "read_bytes", "memory_bytes"),
    "latency_seconds",
)

# Units of a budget: how many, and of what. "B" alone is billions.
UNITS = {unit: (1000**i, "params") for i, unit in enumerate(("", "K", "M", "B", "T"))}
UNITS |= {f"{p}B": (1000**i, "bytes") for i, p in enumerate("KMGT", 1)}
UNITS |= {f"{p}iB": (1024**i, "bytes") for i, p in enumerate("KMGT", 1)}
UNITS |= {"s": (1, "seconds"), "ms": (1e-3, "seconds"), "us": (1e-6, "seconds")}
MEANT = {
    "params": "active_params",
    "bytes": "memory_bytes",
    "seconds": "latency_seconds",
}


@dataclass(frozen=True)
class Budget:
    """A target for the cost of a submodel.

    Attributes:
      target: a fraction of the full model if `relative`, else parameters, bytes or
        seconds.
      kind: what is counted; `read_bytes` is what one token reads of the weights,
        `memory_bytes` is weights and cache together.
      precision: of weights and cache, for the kinds in bytes.
      batch, length: rows and tokens of the cache, for `memory_bytes`.
      latency: the table, for `latency_seconds`; a budget may be written down without,
        but nothing can be measured by it.
      phase, new_tokens: what is counted of it, as of `Cost.latency_seconds`.
    """

    target: float
    kind: str = "active_params"
    relative: bool = True
    precision: str = "bf16"
    batch: int = 1
    length: int | None = None
    latency: LatencyTable | None = None
    phase: str = "decode"
    new_tokens: int | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            known = did_you_mean(self.kind, KINDS)
            raise ValueError(f"unknown kind of budget {self.kind!r}{known}")
        block_bytes_of(self.precision)
        if not math.isfinite(self.target) or self.target <= 0:
            raise ValueError(f"a budget is positive and finite, got {self.target!r}")
        if self.relative and self.target > 1:
            raise ValueError(f"a relative budget is at most 1, got {self.target!r}")
        if self.kind == "memory_bytes":
            if self.length is None:
                raise ValueError("a memory_bytes budget needs length=, tokens of cache")
            at_least_one("batch", self.batch)
            at_least_one("length", self.length)
        if problem := phase_problem(self.phase, self.new_tokens):
            raise ValueError(problem)

    def measure(self, cost: Cost, cache_specs) -> Number:
        """What `cost` says of this budget's kind, in parameters, bytes or seconds."""
        if self.kind == "latency_seconds":
            if self.latency is None:
                raise ValueError("a latency_seconds budget needs latency=, a table")
            return cost.latency_seconds(
                self.latency, phase=self.phase, new_tokens=self.new_tokens
            )
        if self.kind == "active_params":
            return cost.active_params
        if self.kind == "total_params":
            return cost.total_params
        if self.kind == "read_bytes":
            return cost.read_bytes(self.precision)
        weights = cost.weight_bytes(self.precision)
        if self.kind == "weight_bytes":
            return weights
        return weights + cost.cache_bytes(
            cache_specs,
            batch=self.batch,
            length=self.length,
            precision=self.precision,
        )

    def absolute(self, specs, cache_specs, cfg: ModelConfig) -> float:
        """The target in what is counted, `cfg` being the full model."""
        if not self.relative:
            return float(self.target)
        return self.target * self.measure(cost(specs, cfg), cache_specs)

    def ratio(self, specs, cache_specs, cfg: ModelConfig, *, counts=None, masks=None):
        """Cost over target: 1 on target. Differentiable for masks."""
        value = self.measure(cost(specs, cfg, counts=counts, masks=masks), cache_specs)
        return value / self.absolute(specs, cache_specs, cfg)


def parse_budget(
    text: str | float,
    *,
    kind: str | None = None,
    precision: str = "bf16",
    batch: int = 1,
    length: int | None = None,
    **latency: Any,
) -> Budget:
    """A budget from what a person writes: `0.78`, `"2.8B"`, `"24GiB"`, `"12ms"`.

    A plain number up to 1 is a fraction of the full model. `B` alone is billions of
    parameters; bytes are written `GB` (10^9) or `GiB` (2^30), seconds `s`, `ms` or
    `us`. Without `kind`, bytes mean `memory_bytes`, seconds `latency_seconds` and
    everything else `active_params`. `latency` are `latency`, `phase` and `new_tokens`
    of a Budget.
    """
    match = re.fullmatch(r"([\d.]+(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)", str(text).strip())
    try:
        number, (factor, unit) = float(match[1]), UNITS[match[2]]
    except (TypeError, ValueError, KeyError):
        raise ValueError(
            f"cannot read the budget {text!r}; write a fraction such as 0.78, or a "
            "number with K, M, B, T for parameters, GB, GiB for bytes or s, ms for time"
        ) from None
    plain = not match[2]
    if plain and number > 1 and not number.is_integer():
        raise ValueError(f"the budget {text!r} is no fraction and no whole number")
    kind = kind or MEANT[unit]
    counted = kind.rpartition("_")[2]
    if (
        kind in KINDS
        and counted != unit
        and (not plain or number > 1 and counted == "seconds")
    ):
        unit = {"params": "parameters"}.get(unit, unit)
        raise ValueError(f"the budget {text!r} is in {unit}, but its kind is {kind!r}")
    return Budget(
        target=number * factor,
        kind=kind,
        relative=plain and number <= 1,
        precision=precision,
        batch=batch,
        length=length,
        **latency,
    )
