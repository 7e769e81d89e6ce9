"""Small random models of transformers' own configs: what the table in docs/families.md is made from.

    python -m tests.matrix.families docs/families.md

A family is one class of config; what sets it apart from a Llama is in its sizes here.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import roundwise as rw
from roundwise.model.streamed import open_streamed_model
from roundwise.plan.plan import plan

BEGIN, END = "<!-- families -->", "<!-- end: families -->"
VOCABULARY = 128
PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None,
}  # fmt: skip
GROUPED = {**PLAIN, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 16}
PADDED = {**PLAIN, "pad_token_id": 2}
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64
}  # fmt: skip
EXPERTS = {**HEADS, "num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    **HEADS, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "n_shared_experts": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
SPAN: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96, "max_position_embeddings": 64,
}  # fmt: skip
EYE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
QWEN_EYE = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
}  # fmt: skip
QWEN_TOKENS = {
    "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8
}  # fmt: skip
ROPE3 = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


@dataclass(frozen=True)
class Family:
    """A class of models and how a small one is made."""

    kind: str
    config: str
    sizes: Callable[[], dict[str, Any]]
    model: str | None = None
    """Its class; None: the causal language model of the config."""
    noise: float = 0.08
    """Added to all weights, so that none is zero or one; 0 where that would overflow."""
    exact: torch.dtype = torch.float64
    """What outputs are compared in."""
    method: str = "gptq"
    why_not: str | None = None
    """What a run with calibration says instead."""

    def make(self) -> Any:
        """The model."""
        config = getattr(transformers, self.config)(**self.sizes())
        cls = getattr(transformers, self.model) if self.model else None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = cls(config) if cls else transformers.AutoModelForCausalLM.from_config(config)
            made = made.float()
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.add_(self.noise * torch.randn(parameter.shape))
        return made.eval()


def _decoders() -> dict[str, Family]:
    sizes = {
        "Llama": HEADS, "Mistral": HEADS, "Qwen2": GROUPED, "Qwen3": HEADS, "Gemma": HEADS,
        "Gemma2": HEADS, "Gemma3Text": HEADS, "VaultGemma": HEADS, "Phi": GROUPED,
        "Phi3": {**GROUPED, "pad_token_id": 2}, "Olmo": GROUPED, "Olmo2": GROUPED, "Olmo3": HEADS,
        "Cohere": HEADS, "Cohere2": HEADS, "StableLm": GROUPED, "Starcoder2": GROUPED,
        "Granite": GROUPED, "Glm": HEADS, "Glm4": HEADS, "Helium": HEADS, "Ernie4_5": HEADS,
        "SmolLM3": HEADS, "Exaone4": HEADS, "HunYuanDenseV1": HEADS, "Apertus": HEADS,
        "Arcee": HEADS, "Nemotron": HEADS, "DiffLlama": GROUPED, "Doge": HEADS, "Persimmon": PLAIN,
        "GPTNeoX": PLAIN, "Falcon": PLAIN, "Bloom": PLAIN, "Mpt": PLAIN, "XGLM": PLAIN,
        "BioGpt": PLAIN, "OPT": {**PLAIN, "ffn_dim": 96, "word_embed_proj_dim": 64},
        "GPT2": {**GPT, "n_inner": 96}, "GPTBigCode": {**GPT, "n_inner": 96},
        "GPTJ": {**GPT, "rotary_dim": 8}, "CodeGen": {**GPT, "rotary_dim": 8},
        "GPTNeo": {
            **PLAIN, "num_layers": 2, "num_heads": 4, "num_hidden_layers": 2,
            "attention_types": [[["global", "local"], 1]],
        },
        "Gemma3nText": {
            **HEADS, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
            "laurel_rank": 32, "activation_sparsity_pattern": [0.0, 0.0],
        },
    }  # fmt: skip
    sizes["GPTNeo"] = {
        k: v
        for k, v in sizes["GPTNeo"].items()
        if k not in ("num_hidden_layers", "num_attention_heads")
    }
    made = {name: Family("decoder", f"{name}Config", lambda s=s: s) for name, s in sizes.items()}
    made["XGLM"] = replace(made["XGLM"], exact=torch.float32)  # its mask is made for float32
    return made


def _mixtures() -> dict[str, Family]:
    sizes = {
        "Mixtral": LOCAL, "Phimoe": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        "Qwen2Moe": {
            **GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
        "Qwen3Moe": {**EXPERTS, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
        "Olmoe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
        "DeepseekV2": {**{k: v for k, v in ROUTED.items() if k != "head_dim"}, **LATENT},
        "DeepseekV3": {
            **{k: v for k, v in ROUTED.items() if k != "head_dim"}, **LATENT, "n_group": 2,
            "topk_group": 1,
        },
        "Glm4Moe": {**ROUTED, "n_group": 1, "topk_group": 1},
        "Dots1": {**ROUTED, "n_shared_experts": 1},
        "Ernie4_5_Moe": {
            **HEADS, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32,
            "moe_layer_start_index": 1,
        },
        "HunYuanMoEV1": {**HEADS, "num_experts": 4, "moe_topk": 2},
        "GptOss": {**LOCAL, "sliding_window": 12},
        "GraniteMoe": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        "MiniMax": {
            **LOCAL, "layer_types": ["full_attention", "linear_attention"], "block_size": 16
        },
        "Llama4Text": {
            **LOCAL, "intermediate_size_mlp": 96, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
        },
        "JetMoe": {
            "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2,
            "num_key_value_heads": 2, "kv_channels": 16, "intermediate_size": 96,
            "num_local_experts": 4, "num_experts_per_tok": 2,
        },
    }  # fmt: skip
    return {name: Family("mixture", f"{name}Config", lambda s=s: s) for name, s in sizes.items()}


def _hybrids() -> dict[str, Family]:
    state = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16,
        "time_step_rank": 32,
    }  # fmt: skip
    sizes: dict[str, tuple[dict[str, Any], float]] = {
        "Mamba": (state, 0.08),
        "FalconMamba": (state, 0.08),
        "Mamba2": ({
            "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8,
            "head_dim": 16, "state_size": 16, "n_groups": 1,
        }, 0.08),
        # With noise on all weights its activations overflow.
        "FalconH1": ({**HEADS, **MAMBA2, "mamba_d_ssm": 128, "mamba_n_groups": 1}, 0.0),
        "Bamba": ({**GROUPED, **MAMBA2, "attn_layer_indices": [1]}, 0.08),
        "Jamba": ({
            **GROUPED, "num_experts": 2, "num_experts_per_tok": 2, "attn_layer_period": 2,
            "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
            "mamba_d_state": 16, "mamba_dt_rank": 32, "use_mamba_kernels": False,
        }, 0.08),
        "Zamba2": ({
            **GROUPED, "layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 16,
            "mamba_headdim": 16, "n_mamba_heads": 8, "mamba_ngroups": 1, "num_mem_blocks": 1,
        }, 0.08),
        "Qwen3Next": ({
            **EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
            "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
        }, 0.08),
        "GraniteMoeHybrid": ({
            **GROUPED, **MAMBA2, "num_local_experts": 4, "num_experts_per_tok": 2,
            "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"],
        }, 0.08),
        "NemotronH": ({
            **{k: v for k, v in HEADS.items() if k != "num_hidden_layers"}, "n_routed_experts": 4,
            "layers_block_type": ["mamba", "attention", "moe"], "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
            "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16,
        }, 0.08),
        "Lfm2": (HEADS, 0.08),
        "Lfm2Moe": ({
            **EXPERTS, "moe_intermediate_size": 32, "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention"],
        }, 0.08),
        "RecurrentGemma": ({
            **HEADS, "intermediate_size": 128, "lru_width": 64,
            "block_types": ["recurrent", "attention"],
        }, 0.08),
        "Rwkv": ({
            "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2,
            "attention_hidden_size": 64, "intermediate_size": 96,
        }, 0.08),
    }  # fmt: skip
    return {
        name: Family("state space or hybrid", f"{name}Config", lambda s=s: s, noise=noise)
        for name, (s, noise) in sizes.items()
    }


def _encoders() -> dict[str, Family]:
    modern = {"global_attn_every_n_layers": 2, "cls_token_id": 0, "sep_token_id": 1}
    sizes = {
        "Bert": PADDED, "Roberta": PADDED, "ModernBert": {**PADDED, **modern}, "MPNet": PADDED,
        "Electra": {**PADDED, "embedding_size": 64}, "Albert": {**PADDED, "embedding_size": 64},
        "DebertaV2": PADDED,
        "DistilBert": {
            "vocab_size": VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96,
            "max_position_embeddings": 64,
        },
    }  # fmt: skip
    return {
        name: Family("encoder", f"{name}Config", lambda s=s: s, model=f"{name}ForMaskedLM")
        for name, s in sizes.items()
    }


def _both() -> dict[str, Family]:
    t5 = {
        "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2,
        "num_heads": 4, "pad_token_id": 0, "decoder_start_token_id": 0,
    }  # fmt: skip
    listening = {
        **SPAN, "max_source_positions": 32, "max_target_positions": 64, "num_mel_bins": 16,
        "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
        "suppress_tokens": None, "begin_suppress_tokens": None,
    }  # fmt: skip
    del listening["max_position_embeddings"]
    made = {
        name: Family(
            "encoder and decoder", f"{name}Config", lambda s=s: s,
            model=f"{name}ForConditionalGeneration",
        )
        for name, s in {
            "T5": t5, "Bart": SPAN, "MBart": SPAN, "Pegasus": SPAN, "M2M100": SPAN
        }.items()
    }  # fmt: skip
    made["Whisper"] = Family(
        "encoder and decoder", "WhisperConfig", lambda: listening,
        model="WhisperForConditionalGeneration", method="rtn",
        why_not="takes input_features instead of text, so it cannot be calibrated: use --method rtn",
    )  # fmt: skip
    return made


def _towers() -> dict[str, Family]:
    t = transformers
    qwen_text = {**GROUPED, "rope_parameters": ROPE3}
    mixture = {**EXPERTS, "moe_intermediate_size": 32, "rope_parameters": ROPE3}
    mllama = {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "patch_size": 14,
            "num_global_layers": 1, "attention_heads": 2, "image_size": 28,
            "vision_output_dim": 64, "intermediate_layers_indices": [0],
        },
        "text_config": {
            **GROUPED, "num_hidden_layers": 3, "pad_token_id": 2, "cross_attention_layers": [1]
        },
        "image_token_index": 5,
    }  # fmt: skip
    sizes: dict[str, Callable[[], dict[str, Any]]] = {
        "Llava": lambda: {
            "vision_config": t.CLIPVisionConfig(**EYE), "text_config": t.LlamaConfig(**HEADS),
            "image_token_index": 5,
        },
        "Gemma3": lambda: {
            "vision_config": t.SiglipVisionConfig(**EYE), "mm_tokens_per_image": 4,
            "text_config": t.Gemma3TextConfig(**HEADS), "image_token_index": 5,
        },
        "PaliGemma": lambda: {
            "vision_config": {**EYE, "model_type": "siglip_vision_model"}, "projection_dim": 64,
            "text_config": {**HEADS, "model_type": "gemma"}, "image_token_index": 5,
        },
        "Mistral3": lambda: {
            "vision_config": t.PixtralVisionConfig(**EYE), "image_token_index": 5,
            "text_config": t.MistralConfig(**HEADS),
        },
        "Idefics3": lambda: {
            "vision_config": EYE, "text_config": t.LlamaConfig(**HEADS), "image_token_id": 5
        },
        "Qwen2_5_VL": lambda: {
            "vision_config": {k: v for k, v in QWEN_EYE.items() if "deep" not in k},
            "text_config": qwen_text, **QWEN_TOKENS,
        },
        "Qwen3VL": lambda: {
            "vision_config": QWEN_EYE, "text_config": {**qwen_text, "head_dim": 16}, **QWEN_TOKENS
        },
        "Qwen3VLMoe": lambda: {
            "vision_config": QWEN_EYE, "text_config": mixture, **QWEN_TOKENS
        },
        "Mllama": lambda: mllama,
    }  # fmt: skip
    return {
        name: Family(
            "language model with towers", f"{name}Config", s,
            model=f"{name}ForConditionalGeneration",
        )
        for name, s in sizes.items()
    }  # fmt: skip


FAMILIES = {
    **_decoders(), **_mixtures(), **_hybrids(), **_encoders(), **_both(), **_towers()
}  # fmt: skip


def settings(family: Family) -> rw.QuantizeConfig:
    """What every family is quantized with."""
    return rw.QuantizeConfig(
        group_size=32, recipe="textbook", expert_tokens=1, method=family.method
    )


def row(name: str, family: Family, folder: Path) -> str:
    """A line of the table, from a plan."""
    streamed = open_streamed_model(folder)
    planned = plan(streamed, settings(family), samples=4, seq_len=32)
    blocks = [block.module for block in [*streamed.blocks, *streamed.skipped_blocks]]
    weights = {f"{n}": w for block in blocks for n, w in block.named_parameters()}
    total = sum(w.numel() for block in blocks for w in block.parameters())
    linears = [module for module in planned.modules if module.bits]
    part = sum(m.shape[0] * m.shape[1] for m in linears) / total
    reasons: dict[str, list[str]] = {}
    for module in planned.modules:
        if not module.bits and module.reason:
            short = module.name.rpartition(".")[2]
            reasons.setdefault(module.reason, []).append(short)
    notes = [f"`{'`, `'.join(dict.fromkeys(n))}`: {reason}" for reason, n in reasons.items()]
    if any("expert" in n and w.ndim == 3 for n, w in weights.items()):
        notes.append("experts: their class computes them in a way of its own")
    if family.why_not:
        notes.append(f"with calibration: {family.why_not}")
    return f"| {name} | {len(linears)} | {part:.0%} | {'; '.join(notes)} |"


def table() -> Iterator[str]:
    """The page's tables, one for each kind."""
    for kind in dict.fromkeys(family.kind for family in FAMILIES.values()):
        yield f"\n## {kind[0].upper()}{kind[1:]}\n"
        yield "| family | linear layers | of the blocks' weights | what stays, and why |"
        yield "|---|---|---|---|"
        for name, family in FAMILIES.items():
            if family.kind == kind:
                with tempfile.TemporaryDirectory() as folder:
                    family.make().save_pretrained(folder)
                    yield row(name, family, Path(folder))


def main(page: Path) -> None:
    """Writes the tables into a page, between its marks."""
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    lines = "\n".join(table())
    page.write_text(f"{head}{BEGIN}\n{lines}\n\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(Path(sys.argv[1]))
