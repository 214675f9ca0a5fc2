"""Star Elastic in JAX: one nested checkpoint, many model sizes.

Floors 0 to 4 (the model and its tree algebra) are imported at once; what stands
above them, and the libraries it needs, on first use.
"""

import importlib
import sys
import types

from elastic_jax import presets
from elastic_jax.axes import AXES, Counts, ParamSpec
from elastic_jax.budget import Budget, parse_budget
from elastic_jax.config import ElasticConfig, ModelConfig
from elastic_jax.cost import cost
from elastic_jax.latency_table import LatencyTable
from elastic_jax.masks import masks_from_counts
from elastic_jax.model import (
    apply,
    cache_specs,
    extend,
    hidden_states,
    init_cache,
    init_params,
    logits,
    param_specs,
)
from elastic_jax.nesting import (
    counts,
    keep_layers,
    permute_params,
    rank,
    slice_config,
    slice_params,
)
from elastic_jax.quantize import Recipe, dequantize, quantize
from elastic_jax.sharding import param_shardings

_ON_FIRST_USE = {
    "importance": "importance",
    "depth_importance": "importance",
    "calibrate": "importance",
    "input_statistics": "calibration",
    "quantization_errors": "quantization_error",
    "quantize_nested": "post_training",
    "Router": "router",
    "save_nested": "checkpoint",
    "open_nested": "checkpoint",
    "measure_latency": "latency",
    "measure_models": "latency",
    "generate": "generate",
    "think_and_answer": "budget_control",
    "from_hf": "huggingface",
    "to_hf": "huggingface",
}

__all__ = [
    "AXES",
    "Budget",
    "Counts",
    "ElasticConfig",
    "LatencyTable",
    "ModelConfig",
    "ParamSpec",
    "Recipe",
    "apply",
    "cache_specs",
    "cost",
    "counts",
    "dequantize",
    "extend",
    "hidden_states",
    "init_cache",
    "init_params",
    "keep_layers",
    "logits",
    "masks_from_counts",
    "param_shardings",
    "param_specs",
    "parse_budget",
    "permute_params",
    "presets",
    "quantize",
    "rank",
    "slice_config",
    "slice_params",
    *_ON_FIRST_USE,
]


def __getattr__(name: str):
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'elastic_jax' has no attribute {name!r}")
    module = importlib.import_module(f"elastic_jax.{_ON_FIRST_USE[name]}")
    return getattr(module, name)


class _Package(types.ModuleType):
    """Keeps public functions where an import would bind a module of the same name."""

    def __setattr__(self, name, value):
        if isinstance(value, types.ModuleType) and name in _ON_FIRST_USE:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
