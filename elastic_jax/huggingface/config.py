"""config.json of Nemotron-H, to a `ModelConfig` and back.

The file is data. A field is taken, checked against the one value that this model can
have, kept for the way back, or not looked at; none is followed anywhere. Names and
defaults are those of transformers' `NemotronHConfig`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elastic_jax.axes import BLOCK_KINDS
from elastic_jax.config import LONGEST_PATTERN, ModelConfig
from elastic_jax.huggingface.quantization_config import Declared, declared
from elastic_jax.huggingface.untrusted import refuse, short

# Names of blocks in `layers_block_type`, of transformers 5 and before.
BLOCK_NAMES = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "moe": "E",
    "mlp": "-",
}

# Our field -> theirs, the letters of the blocks that need it, and what it is where
# transformers need not write it.
SIZES: Mapping[str, tuple[str, str, int | None]] = {
    "vocab": ("vocab_size", "M*E-", None),
    "embed": ("hidden_size", "M*E-", None),
    "ssm_groups": ("n_groups", "M", None),
    "heads_per_group": ("mamba_num_heads", "M", None),
    "ssm_head_dim": ("mamba_head_dim", "M", None),
    "ssm_state": ("ssm_state_size", "M", None),
    "conv_width": ("conv_kernel", "M", 4),
    "kv_heads": ("num_key_value_heads", "*", None),
    "q_per_kv": ("num_attention_heads", "*", None),
    "head_dim": ("head_dim", "*", None),
    "experts": ("n_routed_experts", "E", None),
    "expert_ffn": ("moe_intermediate_size", "E", None),
    "shared_ffn": ("moe_shared_expert_intermediate_size", "E", None),
    "top_k": ("num_experts_per_tok", "E", None),
    "n_group": ("n_group", "E", 1),
    "topk_group": ("topk_group", "E", 1),
    "ffn": ("intermediate_size", "-", None),
}
# Ours count within a group, theirs count them all.
WITHIN = {"heads_per_group": "ssm_groups", "q_per_kv": "kv_heads"}
ABSENT = {"experts": 2}  # sizes of blocks that are not there; 1 where not named

# What this model is: any other value would be another model.
FIXED: Mapping[str, Any] = {
    "model_type": "nemotron_h",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "use_conv_bias": True,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "norm_topk_prob": True,
    "moe_latent_size": None,
}

# Kept for the way back, where the value is of this kind: (kind, default).
CARRIED: Mapping[str, tuple[type | tuple[type, ...], Any]] = {
    "pad_token_id": (int, 0),
    "bos_token_id": (int, 1),
    "eos_token_id": ((int, list), 2),
    "max_position_embeddings": (int, 4096),
    "initializer_range": (float, 0.02),
    "chunk_size": (int, 128),
    "time_step_min": (float, 0.001),
    "time_step_max": (float, 0.1),
    "time_step_floor": (float, 1e-4),
    "residual_in_fp32": (bool, False),
    "rescale_prenorm_residual": (bool, True),
    "mamba_ssm_cache_dtype": (str, "float32"),  # one of `CACHE_DTYPES`
    "num_logits_to_keep": (int, 1),
    "rope_theta": ((int, float), None),
    "partial_rotary_factor": ((int, float), None),
    "attention_dropout": ((int, float), 0.0),
    "hidden_dropout": ((int, float), 0.0),
    "expand": (int, 2),
}
CACHE_DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass(frozen=True)
class Described:
    """What a config.json says.

    Attributes:
      cfg: the model.
      carried: fields of no effect here that the way back should keep.
      notes: lines for the user about what is not taken over.
      dtype: that weights are used in, `bfloat16` where that is not said.
      quantization: of its weights, if it says anything about that.
    """

    cfg: ModelConfig
    carried: Mapping[str, Any]
    notes: tuple[str, ...]
    dtype: str = "bfloat16"
    quantization: Declared | None = None


def from_json(values: Any) -> Described:
    """The model that a config.json describes.

    Raises:
      ValueError: with everything that is missing, impossible or of another model.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {short(values)}")
    problems = [*_other_models(values)]
    try:
        pattern = _pattern(values)
    except ValueError as error:
        refuse("this is no Nemotron-H that we know", [*problems, str(error)])
    found: dict[str, Any] = {"pattern": pattern}
    for ours, (theirs, letters, default) in SIZES.items():
        needed = any(letter in pattern for letter in letters)
        value = values.get(theirs, default)
        if value is None and not needed:
            value = found[WITHIN[ours]] if ours in WITHIN else ABSENT.get(ours, 1)
        if type(value) is not int or value < 1:
            said = f"got {short(value)}" if theirs in values else "it is missing"
            kinds = [BLOCK_KINDS[x] for x in letters if x in pattern]
            blocks = "" if letters == "M*E-" else f" ({', '.join(kinds)} blocks)"
            problems.append(f"{theirs}: expected a positive int{blocks}, {said}")
            value = 1
        found[ours] = value
    for ours, groups in WITHIN.items():
        if found[ours] % found[groups]:
            problems.append(
                f"{SIZES[ours][0]} {found[ours]} is not a multiple of "
                f"{SIZES[groups][0]} {found[groups]}"
            )
        found[ours] = max(1, found[ours] // found[groups])
    found["norm_eps"] = _epsilon(values, problems)
    factor = values.get("routed_scaling_factor", 1.0)
    found["routed_scaling_factor"] = _number("routed_scaling_factor", factor, problems)
    quantization = None
    if "quantization_config" in values and values["quantization_config"] is not None:
        try:
            quantization = declared(values["quantization_config"])
        except ValueError as error:
            problems.append(f"quantization_config: {error}")
    cfg = None
    try:
        cfg = ModelConfig(**found)
    except ValueError as error:
        problems += [line.strip() for line in str(error).splitlines()[1:]]
    refuse("this is no Nemotron-H that we know", problems)
    carried = {
        name: values[name]
        for name in CARRIED
        if name in values and _may_be_carried(name, values[name])
    }
    notes = (*_notes(values), *(quantization.notes if quantization else ()))
    return Described(cfg, carried, notes, _dtype(values), quantization)


def to_json(cfg: ModelConfig, dtype: str, carried: Mapping[str, Any]) -> dict[str, Any]:
    """config.json for a model whose blocks of one kind are all alike.

    Transformers, vLLM and the converter of llama.cpp read it. `time_step_limit` is left
    out: its default holds an infinity, for which JSON has no word.

    Args:
      dtype: of most tensors, `bfloat16`.
      carried: as of `Described`.

    Raises:
      ValueError: a carried field that no config.json of this model has.
    """
    if not isinstance(carried, Mapping):
        raise ValueError(f"carried: expected fields by name, got {short(carried)}")
    odd = [
        f"{short(name)}: {short(value)}"
        for name, value in carried.items()
        if name not in CARRIED or not _may_be_carried(name, value)
    ]
    refuse("carried fields that config.json cannot have", odd)
    values = {
        "architectures": ["NemotronHForCausalLM"],
        **FIXED,
        "torch_dtype": dtype,
        "hybrid_override_pattern": cfg.pattern,
        "num_hidden_layers": cfg.layers,
        "layer_norm_epsilon": cfg.norm_eps,
        "norm_eps": cfg.norm_eps,
        "use_cache": True,
    }
    del values["moe_latent_size"]
    for ours, (theirs, letters, _) in SIZES.items():
        # That there are experts is how llama.cpp tells the two architectures apart.
        if letters != "E" or "E" in cfg.pattern:
            values[theirs] = _one(cfg, ours) * (
                _one(cfg, WITHIN[ours]) if ours in WITHIN else 1
            )
    if "E" in cfg.pattern:
        values["n_shared_experts"] = 1
        values["routed_scaling_factor"] = cfg.routed_scaling_factor
    else:
        del values["norm_topk_prob"]
    for name, (_, default) in CARRIED.items():
        value = carried.get(name, default)
        if value is not None:
            values[name] = value
    return values


def _one(cfg: ModelConfig, field: str) -> int:
    """A size that all blocks share."""
    size = getattr(cfg, field)
    return size if isinstance(size, int) else max(size, default=1)


def _pattern(values: Mapping[str, Any]) -> str:
    """One letter per block, from whichever field says it."""
    said = {}
    letters = values.get("hybrid_override_pattern")
    if letters is not None:
        if not isinstance(letters, str) or not letters:
            raise ValueError(
                f"hybrid_override_pattern: expected letters of {[*BLOCK_KINDS]}, got "
                f"{short(letters)}"
            )
        said["hybrid_override_pattern"] = letters
    for field in ("layers_block_type", "layer_types"):
        kinds = values.get(field)
        if kinds is None:
            continue
        known = isinstance(kinds, list) and len(kinds) <= LONGEST_PATTERN
        if not known or not all(isinstance(k, str) and k in BLOCK_NAMES for k in kinds):
            raise ValueError(
                f"{field}: expected a list of at most {LONGEST_PATTERN} of "
                f"{[*BLOCK_NAMES]}, got {short(kinds)}"
            )
        said[field] = "".join(BLOCK_NAMES[kind] for kind in kinds)
    if not said:
        raise ValueError(
            "neither hybrid_override_pattern nor layers_block_type is there"
        )
    if len(set(said.values())) > 1:
        raise ValueError(f"{' and '.join(said)} disagree: {short([*said.values()])}")
    (pattern,) = set(said.values())
    depth = values.get("num_hidden_layers", len(pattern))
    if type(depth) is not int or depth != len(pattern):
        raise ValueError(
            f"num_hidden_layers is {short(depth)}, but the pattern has {len(pattern)}"
        )
    return pattern


def _other_models(values: Mapping[str, Any]):
    """Fields that say that this is another model, or that ask to follow an address."""
    for name, expected in FIXED.items():
        value = values.get(name)
        if value is not None and (type(value), value) != (type(expected), expected):
            yield f"{name}: only {expected!r} is known, got {short(value)}"
    if values.get("compression_config") is not None:
        yield "compression_config: quantized weights; start from the BF16 checkpoint"
    if values.get("n_shared_experts", 1) not in (1, None):
        # One width holds them all: `moe_shared_expert_intermediate_size`.
        if (
            type(values["n_shared_experts"]) is not int
            or values["n_shared_experts"] < 1
        ):
            yield f"n_shared_experts: got {short(values['n_shared_experts'])}"
    code = values.get("auto_map")
    if code is not None and not _names_own_classes(code):
        yield f"auto_map: names code elsewhere, {short(code)}; nothing is followed"
    for name, value in values.items():
        if isinstance(value, str) and "://" in value:
            yield f"{short(name)}: holds an address, {short(value)}; remove it"


def _names_own_classes(code: Any) -> bool:
    return isinstance(code, dict) and all(
        isinstance(v, str)
        and len(v) < 200
        and v.replace("_", "").replace(".", "").isalnum()
        for v in code.values()
    )


def _notes(values: Mapping[str, Any]):
    if values.get("auto_map") is not None:
        yield "auto_map is dropped: the code that it names is neither read nor needed"
    if values.get("num_nextn_predict_layers"):
        yield "multi-token prediction is dropped: num_nextn_predict_layers becomes 0"
    limit = values.get("time_step_limit")
    if isinstance(limit, list) and limit and limit[0] not in (0, 0.0):
        yield f"time_step_limit {short(limit)} is not applied: dt is not clamped here"


def _dtype(values: Mapping[str, Any]) -> str:
    for name in ("torch_dtype", "dtype"):
        if values.get(name) in ("bfloat16", "float16", "float32"):
            return values[name]
    return "bfloat16"


def _epsilon(values: Mapping[str, Any], problems: list[str]) -> float:
    names = ("layer_norm_epsilon", "norm_eps", "rms_norm_eps")
    said = {name: values[name] for name in names if values.get(name) is not None}
    each = [_number(name, value, problems) for name, value in said.items()]
    if len(set(each)) > 1:
        problems.append(f"the epsilon of norms differs: {short(said)}")
    return next(iter(each), 1e-5)


def _number(name: str, value: Any, problems: list[str]) -> float:
    """A positive float32; 1 where it is none."""
    if type(value) in (int, float) and 2.0**-126 <= value < 2.0**127:
        return value
    problems.append(f"{name}: expected a positive number, got {short(value)}")
    return 1.0


def _may_be_carried(name: str, value: Any) -> bool:
    kind, _ = CARRIED[name]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, str):
        return str in kinds and value in CACHE_DTYPES
    if isinstance(value, list):
        numbers = all(type(n) is int and abs(n) < 2**63 for n in value)
        return list in kinds and len(value) <= 64 and numbers
    if isinstance(value, int):
        return (int in kinds or float in kinds) and abs(value) < 2**63
    return isinstance(value, float) and float in kinds and math.isfinite(value)
