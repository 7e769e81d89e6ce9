"""Small mixtures of experts, which differ in their configs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import transformers

from tests.helpers import LLAMA

SMALL = {**LLAMA, "num_hidden_layers": 2}


def _without(*names: str) -> dict[str, object]:
    return {key: value for key, value in SMALL.items() if key not in names}


@dataclass(frozen=True)
class Mixture:
    """A model family with experts: a small config, and expected names."""

    config: Callable[[], transformers.PretrainedConfig]
    experts: str
    """Path of the first module of experts."""
    stored: str
    """Name in the files of expert 3's first projection in that module, without `.weight`."""


MIXTURES = {
    "mixtral": Mixture(
        lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
        "model.layers.0.mlp.experts", "model.layers.0.block_sparse_moe.experts.3.w1",
    ),
    "qwen3_moe": Mixture(
        lambda: transformers.Qwen3MoeConfig(
            **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            decoder_sparse_step=1, norm_topk_prob=True,
        ),
        "model.layers.0.mlp.experts", "model.layers.0.mlp.experts.3.gate_proj",
    ),
    # A shared expert with a gate of its own.
    "qwen2_moe": Mixture(
        lambda: transformers.Qwen2MoeConfig(
            **_without("head_dim"), num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=32, shared_expert_intermediate_size=64,
        ),
        "model.layers.0.mlp.experts", "model.layers.0.mlp.experts.3.gate_proj",
    ),
    # Latent attention, a shared expert, a dense first layer, experts chosen in groups.
    "deepseek_v3": Mixture(
        lambda: transformers.DeepseekV3Config(
            **_without("head_dim", "num_key_value_heads"), num_key_value_heads=4,
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=32,
            kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
        ),
        "model.layers.1.mlp.experts", "model.layers.1.mlp.experts.3.gate_proj",
    ),
    # All experts in one tensor, transposed, gate and up interleaved, with biases.
    "gpt_oss": Mixture(
        lambda: transformers.GptOssConfig(
            **SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=12
        ),
        "model.layers.0.mlp.experts", "model.layers.0.mlp.experts.3.gate_proj",
    ),
    # All experts in one tensor, with another name.
    "granitemoe": Mixture(
        lambda: transformers.GraniteMoeConfig(
            **_without("head_dim"), num_local_experts=4, num_experts_per_tok=2
        ),
        "model.layers.0.block_sparse_moe.experts",
        "model.layers.0.block_sparse_moe.experts.3.gate_proj",
    ),
    # Experts without a gate, in blocks of several kinds.
    "nemotron_h": Mixture(
        lambda: transformers.NemotronHConfig(
            **_without("num_hidden_layers"), layers_block_type=["attention", "moe"],
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            moe_shared_expert_intermediate_size=32, mamba_num_heads=4, mamba_head_dim=16,
            ssm_state_size=16,
        ),
        "model.layers.1.mixer.experts", "backbone.layers.1.mixer.experts.3.up_proj",
    ),
}  # fmt: skip
