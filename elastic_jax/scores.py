"""Importance scores as a value: a mapping from axes that knows where it comes from.

    e experts

It stands apart from the pass that fills it, so that a checkpoint can hold scores and
`rank` can read them without a model.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from elastic_jax.axes import AXES, nest
from elastic_jax.config import did_you_mean

EXPERT_METRICS = ("reap", "mass", "frequency")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["by_axis", "expert_metrics"],
    meta_fields=["record"],
)
@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, Any]):
    """Scores per axis, higher is better: `rank` reads them as a mapping.

    Axis -> float32 array, or a tuple with one per block that has the axis; units lie
    along the last dimension, inside their owners. `experts` is left out where a token
    uses only some expert groups (`topk_group < n_group`): those are not elastic.

    Attributes:
      by_axis: the mapping itself.
      expert_metrics: "reap", "mass" and "frequency", each one [e] per MoE block. Mass
        is gate times output norm, summed over tokens; REAP (arXiv 2510.13999) is its
        mean over the tokens that reached the expert, 0 if none did; frequency is the
        share of all choices.
      record: the provenance as JSON: hashable, so that scores are a pytree.
    """

    by_axis: dict[str, Array | tuple[Array, ...]]
    expert_metrics: dict[str, tuple[Array, ...]]
    record: str = "{}"

    def __getitem__(self, axis: str) -> Array | tuple[Array, ...]:
        return self.by_axis[axis]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_axis)

    def __len__(self) -> int:
        return len(self.by_axis)

    @property
    def provenance(self) -> dict[str, Any]:
        """Data, counts and choices behind the scores, as plain values."""
        return json.loads(self.record)

    @property
    def never_routed(self) -> tuple[tuple[int, ...], ...]:
        """Per MoE block, the experts that no token reached."""
        shares = map(np.asarray, self.expert_metrics["frequency"])
        return tuple(tuple(np.flatnonzero(share == 0).tolist()) for share in shares)

    def with_experts(self, metric: str) -> "Scores":
        """These scores with the experts by another metric of the same pass."""
        if metric not in EXPERT_METRICS:
            hint = did_you_mean(metric, EXPERT_METRICS)
            raise ValueError(f"experts: unknown metric {metric!r}{hint}")
        if "experts" not in self:
            raise ValueError("with_experts: experts are not elastic in this model")
        return dataclasses.replace(
            self,
            by_axis=self.by_axis | {"experts": self.expert_metrics[metric]},
            record=to_json(self.provenance | {"experts": metric}),
        )

    def to_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Flat named arrays ("by_axis/ffn/0"), and the provenance."""
        tree = {"by_axis": self.by_axis, "expert_metrics": self.expert_metrics}
        return named_leaves(tree), self.provenance

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> "Scores":
        """The inverse of `to_arrays`."""
        leaves = {}
        for name, array in arrays.items():
            steps = (int(s) if s.isdigit() else s for s in name.split("/"))
            leaves[tuple(steps)] = jnp.asarray(array)
        tree = nest(leaves)
        by_axis, metrics = tree["by_axis"], tree.get("expert_metrics", {})
        return cls(
            by_axis={axis: by_axis[axis] for axis in AXES if axis in by_axis},
            expert_metrics={m: metrics.get(m, ()) for m in EXPERT_METRICS},
            record=to_json(provenance),
        )


def named_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Leaves of a tree as host arrays, by their path."""
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name(path): np.asarray(leaf) for path, leaf in leaves}


def to_json(values: Mapping[str, Any]) -> str:
    """Plain values as JSON; a ValueError for anything else."""
    try:
        return json.dumps(dict(values), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected plain values that JSON can hold: {error}") from None
