"""The operations elastic_jax exists to make fast, one folder each."""

from elastic_kernels.attention.api import causal_attention
from elastic_kernels.gated_norm.api import gated_rms_norm
from elastic_kernels.grouped_matmul.api import expert_mlp, grouped_matmul
from elastic_kernels.products import FakeQuant, Observed, contract
from elastic_kernels.quant_array import QuantArray
from elastic_kernels.ssd.api import ssd

__all__ = [
    "FakeQuant",
    "Observed",
    "QuantArray",
    "causal_attention",
    "contract",
    "expert_mlp",
    "gated_rms_norm",
    "grouped_matmul",
    "ssd",
]
