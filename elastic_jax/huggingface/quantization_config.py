"""What a directory says of its quantized weights, to be written and to be checked.

Two schemes: ModelOpt's, which NVIDIA ships, in hf_quant_config.json and again in
config.json; and that of compressed-tensors, in config.json alone. Reading, the tensors
themselves say which of them is stored how; what is said here must agree with them.
The keys are those that the loaders of vLLM, SGLang and TensorRT-LLM ask for.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from elastic_jax.huggingface.untrusted import refuse, short
from elastic_kernels.quant_array import BLOCK

MODELOPT, COMPRESSED = "modelopt", "compressed-tensors"
MIXED = "MIXED_PRECISION"
# Name of what a module computes in -> how its weight is stored. Without scales of
# its inputs, NVFP4 is weight-only; FP8 has no name of its own for that.
ALGORITHMS = {"FP8": "fp8", "NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4"}
# vLLM refuses hf_quant_config.json by any other name: it is that of the layout.
PRODUCER = {"name": "modelopt", "version": "written by elastic_jax"}
COMPRESSIONS = {"nvfp4": "nvfp4-pack-quantized", "fp8": "float-quantized"}
MIXED_COMPRESSION = "mixed-precision"


@dataclass(frozen=True)
class Stored:
    """How a quantized weight is stored.

    Attributes:
      format: `"fp8"` or `"nvfp4"`.
      inputs: whether there are scales of what it meets.
    """

    format: str
    inputs: bool

    @property
    def algorithm(self) -> str:
        """Its name in ModelOpt's files."""
        weight_only = self.format == "nvfp4" and not self.inputs
        return "W4A16_NVFP4" if weight_only else self.format.upper()


@dataclass(frozen=True)
class Declared:
    """What a directory says of its quantized weights.

    Attributes:
      scheme: whose layout it is.
      formats: those that there may be.
      modules: module -> format, of those that are named one by one.
      notes: lines about what is not taken over.
    """

    scheme: str
    formats: tuple[str, ...]
    modules: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# ------------------------------------------------------------------------- reading


def declared(values: Any) -> Declared:
    """What `quantization_config` of config.json says, or `quantization` of ModelOpt's.

    Raises:
      ValueError: a scheme, an algorithm or a block size that is not known.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected an object, got {short(values)}")
    method = values.get("quant_method", MODELOPT)
    if method == COMPRESSED:
        return _compressed(values)
    if method != MODELOPT:
        raise ValueError(
            f"quant_method {short(method)}, known: {[MODELOPT, COMPRESSED]}; start "
            "from the BF16 checkpoint"
        )
    algorithm, size = values.get("quant_algo"), values.get("group_size")
    if size is not None and (type(size) is not int or size != BLOCK):
        raise ValueError(f"group_size {short(size)}, only {BLOCK} is known")
    notes = ()
    if values.get("kv_cache_quant_algo") or values.get("kv_cache_scheme"):
        notes = ("quantization of the KV cache is dropped: caches here have no scales",)
    if algorithm != MIXED:
        return Declared(MODELOPT, (_format(algorithm),), notes=notes)
    layers = values.get("quantized_layers")
    if not isinstance(layers, dict) or not layers:
        raise ValueError(f"{MIXED}, but quantized_layers is {short(layers)}")
    odd = [name for name, said in layers.items() if not isinstance(said, dict)]
    refuse("quantized_layers: expected objects", map(short, odd))
    modules = {n: _format(said.get("quant_algo")) for n, said in layers.items()}
    return Declared(MODELOPT, tuple(sorted({*modules.values()})), modules, notes)


def _format(algorithm: Any) -> str:
    if not isinstance(algorithm, str) or algorithm.upper() not in ALGORITHMS:
        raise ValueError(
            f"quant_algo {short(algorithm)}, known: {[*ALGORITHMS, MIXED]}; start from "
            "the BF16 checkpoint"
        )
    return ALGORITHMS[algorithm.upper()]


def _compressed(values: Mapping[str, Any]) -> Declared:
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"config_groups: expected groups, got {short(groups)}")
    found = set()
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise ValueError(f"config_groups: {short(name)} has no weights")
        known = {
            "fp8": {"num_bits": 8, "type": "float", "strategy": "tensor"},
            "nvfp4": {"num_bits": 4, "type": "float", "group_size": BLOCK},
        }
        fitting = [f for f, said in known.items() if said.items() <= _plain(weights)]
        if not fitting:
            raise ValueError(
                f"config_groups: weights of {short(name)} are {short(weights)}; known "
                "are FP8 with one scale a tensor, and NVFP4: start from the BF16 "
                "checkpoint"
            )
        found |= {*fitting}
    notes = ()
    if values.get("kv_cache_scheme"):
        notes = ("quantization of the KV cache is dropped: caches here have no scales",)
    return Declared(COMPRESSED, tuple(sorted(found)), notes=notes)


def _plain(values: Mapping[str, Any]) -> set[tuple[str, Any]]:
    """The items that can be compared."""
    return {(k, v) for k, v in values.items() if type(v) in (int, str)}


# ------------------------------------------------------------------------- writing


def modelopt(
    stored: Mapping[str, Stored], excluded: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`quantization_config` for config.json, and all of hf_quant_config.json.

    Args:
      stored: module -> how it is stored.
      excluded: modules that have weights of products, but are not quantized; a star
        at the end stands for what is within.
    """
    kinds = sorted({s.algorithm for s in stored.values()})
    algorithm = kinds[0] if len(kinds) == 1 else MIXED
    common: dict[str, Any] = {"quant_algo": algorithm}
    sizes = {name: _group_size(s.format) for name, s in stored.items()}
    if any(sizes.values()):
        common["group_size"] = BLOCK
    if algorithm == MIXED:
        common["quantized_layers"] = {
            name: {"quant_algo": s.algorithm, **sizes[name]}
            for name, s in stored.items()
        }
    groups = {
        f"group_{i}": {
            **_arguments({s for s in stored.values() if s.algorithm == kind}),
            "targets": ["Linear"]
            if algorithm != MIXED
            else [name for name, s in stored.items() if s.algorithm == kind],
        }
        for i, kind in enumerate(kinds)
    }
    inside = {
        "quant_method": MODELOPT,
        **common,
        "config_groups": groups,
        "ignore": excluded,
        "producer": PRODUCER,
    }
    apart = {
        "producer": PRODUCER,
        "quantization": {
            **common,
            "kv_cache_quant_algo": None,
            "exclude_modules": excluded,
        },
    }
    return inside, apart


def _group_size(format: str) -> dict[str, int]:
    return {"group_size": BLOCK} if format == "nvfp4" else {}


def _arguments(alike: set[Stored]) -> dict[str, Any]:
    """Weights and inputs of modules that compute in one way."""
    (format,) = {s.format for s in alike}
    bits = {"num_bits": 4 if format == "nvfp4" else 8, "type": "float"}
    said = {"dynamic": False, **bits, **_group_size(format)}
    inputs = said if any(s.inputs for s in alike) else None
    return {"weights": said, "input_activations": inputs}


def compressed(stored: Mapping[str, Stored], excluded: list[str]) -> dict[str, Any]:
    """`quantization_config` of compressed-tensors; arguments as of `modelopt`.

    Modules are named by patterns, for transformers and vLLM call the model's trunk by
    other names than the files do.
    """
    kinds = sorted({*stored.values()}, key=lambda s: (s.format, s.inputs))
    groups = {}
    for i, kind in enumerate(kinds):
        names = [name for name, s in stored.items() if s == kind]
        weights = {"symmetric": True, "dynamic": False, "type": "float"}
        if kind.format == "nvfp4":
            weights |= {"num_bits": 4, "strategy": "tensor_group", "group_size": BLOCK}
            weights["scale_dtype"] = "torch.float8_e4m3fn"
            inputs = {**weights, "dynamic": "local"}
        else:
            weights |= {"num_bits": 8, "strategy": "tensor"}
            inputs = weights
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else _patterns(names),
            "weights": weights,
            "input_activations": inputs if kind.inputs else None,
            "output_activations": None,
            "format": COMPRESSIONS[kind.format],
        }
    formats = {COMPRESSIONS[kind.format] for kind in kinds}
    return {
        "quant_method": COMPRESSED,
        "format": formats.pop() if len(formats) == 1 else MIXED_COMPRESSION,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _patterns(excluded),
        "kv_cache_scheme": None,
    }


def _patterns(modules: list[str]) -> list[str]:
    """Regular expressions for modules, the experts of a block in one."""

    def pattern(name: str) -> str:
        tail = re.escape(name.partition(".")[2] or name)
        tail = re.sub(r"experts\\\.\d+\\\.", r"experts\\.\\d+\\.", tail)
        tail = f"{tail[:-2]}.*" if tail.endswith(r"\*") else f"{tail}$"
        return f"re:.*{tail}"

    return list(dict.fromkeys(map(pattern, modules)))
