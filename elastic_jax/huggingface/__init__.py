"""Hugging Face, both ways: read a Nemotron-H parent, write any submodel."""

from elastic_jax.huggingface.reading import (
    from_hf,
    open_hf,
    read_companions,
    read_config,
)
from elastic_jax.huggingface.writing import model_card, to_hf

__all__ = [
    "from_hf",
    "model_card",
    "open_hf",
    "read_companions",
    "read_config",
    "to_hf",
]
