"""Models by name. Every size is set, also of blocks a pattern does not have.

Sizes of the released models: Nemotron 3 Nano, arXiv 2512.20848; Nemotron Nano 2,
arXiv 2508.14444.
"""

from elastic_jax.config import ModelConfig


def tiny(pattern: str = "MEM*ME") -> ModelConfig:
    """A toy hybrid with every axis: trains on a laptop in minutes."""
    return ModelConfig(
        pattern=pattern,
        vocab=64,
        embed=96,
        ssm_groups=2,
        heads_per_group=4,
        ssm_head_dim=32,
        ssm_state=32,
        kv_heads=2,
        q_per_kv=2,
        head_dim=16,
        experts=8,
        expert_ffn=64,
        shared_ffn=64,
        ffn=128,
        top_k=2,
        routed_scaling_factor=2.5,
    )


def nemotron3_nano() -> ModelConfig:
    """Nemotron 3 Nano 30B-A3B, the parent of Star Elastic."""
    return ModelConfig(
        pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        vocab=131072,
        embed=2688,
        ssm_groups=8,
        heads_per_group=8,
        ssm_head_dim=64,
        ssm_state=128,
        kv_heads=2,
        q_per_kv=16,
        head_dim=128,
        experts=128,
        expert_ffn=1856,
        shared_ffn=3712,
        ffn=1856,
        top_k=6,
        routed_scaling_factor=2.5,
    )


def nemotron_nano_v2() -> ModelConfig:
    """Nemotron Nano 12B v2, a dense hybrid and the parent of Nemotron Elastic."""
    return ModelConfig(
        pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
        vocab=131072,
        embed=5120,
        ssm_groups=8,
        heads_per_group=16,
        ssm_head_dim=80,
        ssm_state=128,
        kv_heads=8,
        q_per_kv=5,
        head_dim=128,
        experts=8,
        expert_ffn=7680,
        shared_ffn=7680,
        ffn=20480,
        top_k=2,
    )
