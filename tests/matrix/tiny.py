"""Makes small random models of all text classes of the installed transformers, from their own configs.

A config is made with its default values, then its sizes are shrunk by the names of their fields. So a
class that a new release of transformers adds needs no line here, unless its sizes depend on each other
in a way of their own: `OVERRIDES` has those.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

VOCABULARY = 128
#: Ids below it are special tokens of some model; calibration text has none of them.
FIRST_TEXT_TOKEN = 32
#: Endings of the names of classes that write text.
WRITERS = ("ForCausalLM", "ForConditionalGeneration", "ForSeq2SeqLM")
#: A model with more parameters was not shrunk.
MAX_PARAMETERS = 30_000_000
HEAD_DIM = 16

#: Pattern of a field's name -> its largest value in a small config; the first that matches it counts.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*|n_vocab|.*codebook_size|.*group_vocab|mamba_d_ssm", VOCABULARY),
    (
        r"(mamba_n|mamba_num|n_mamba)_heads|rotary_dim|num_filters|.*(conv|kernel|chunk)_channels?",
        8,
    ),
    (r"index_head_dim|qk_head_dim", 32),
    (r"index_topk", 64),
    (r".*(state_size|d_state|num_mel_bins|n_mels)", 16),
    (r".*(head_dim|d_head|headdim|head_size|kv_channels)|d_kv", HEAD_DIM),
    (r".*(key_value|kv|linear_num_key|query_group|num_key)_?(n_)?(heads|groups)?", 2),
    (r".*heads?|.*attention_heads.*", 4),
    (r".*(lora_rank|_rank|lora_dim)", 32),
    (r"(num_)?(n|expert|mamba_n)_?groups?|topk_group|.*shared_experts|zero_expert_num", 1),
    (r"num_mem_blocks|.*(first_k_dense_replace|moe_layer_start_index|offset)", 1),
    (r".*(num|n|local|routed)_(local_|routed_)?experts", 4),
    (r".*(experts_per_tok(en)?|top_?k(_experts)?|moe_k|num_selected_experts)", 2),
    (r".*expert.*(size|dim)|moe_.*(size|dim)", 32),
    (r".*(intermediate|ffn|ffn_hidden)_(size|dim)|.*(d_ff|dim_ff|inner|inner_dim|mlp_dim)", 128),
    (r".*(hidden|embedding|bottleneck)_(size|dim)s?|hidden_sizes|.*(d_model|n_embd|embed_dim)", 64),
    (r".*(projection|proj|input|output|latent|model|emb)_dim|dim|.*(width|_channels)", 64),
    (r".*hidden_size_.*|.*feature_size|upsample_groups", 64),
    (r".*max_(\w+_)?position.*|n_positions|n_ctx|max_seq_len.*|.*max_target_.*", 64),
    (r"num_position_embeddings", 64),
    (r".*(sliding_window.*|window_size|attention_window|local_attention)", 16),
    (r".*(period|sparse_step|o_groups)", 2),
    (r"num_kv_shared_layers|.*nextn.*", 0),
)
#: Fields that hold a number of layers.
LAYERS = re.compile(r"depth|n_layers?|(\w+_)?layers|(\w+_)?num_(\w+_)?layers(_per_stack)?")
#: Fields that list layers by their index, and fields with ids of tokens.
INDICES = re.compile(r".*(layers|indexe?s|indices|idxs|layer_ids)")
TOKENS = re.compile(
    r".*token_(id|index)(s|es)?|.*_(token|eos|bos|pad)_ids?|\w+_(start|end|newline)_id"
)

#: model_type -> fields that have no default, or whose sizes depend on each other in a way of their own.
OVERRIDES: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 4, "IMGIMGAZ": 5}},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 5, "<|visual token 000000|>": 6}},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 2},
    "falcon_h1": {"mamba_d_head": 16},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gradium_phonon_tts": {"flow_head_config": {"condition_dim": 64}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "mamba2": {"num_heads": 8},
    "mistral4": {"head_dim": 32},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "pocket_tts": {"flow_head_config": {"condition_dim": 64}},
    "qwen4_exp_text": {
        "eos_token_id": 1, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32,
        "indexer_budget": 16, "indexer_compress_ratio": 4, "ple_layer_ids": [1],
        "ple_embed_dim": 64, "hc_lowrank": 32, "ngram_vocab_size_base": 97,
        "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2,
    },
    "reformer": {"axial_pos_embds": False},
    "step3p5": {"sliding_window": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 128, "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {"attention_hidden_size": 128},
}  # fmt: skip


def class_names() -> list[str]:
    """The classes of the matrix: all that write text, and encoders of text that have no such class."""
    written = [name for name in dir(transformers) if name.endswith(WRITERS)]
    writers = [n for n in written if not n.startswith("Auto") and "PreTrained" not in n]
    configs = {find(name).config_class for name in writers}
    listed: list[str] = []
    for names in MODEL_MAPPING_NAMES.values():
        listed += (names,) if isinstance(names, str) else names
    encoders = [
        name
        for name in listed
        if name.endswith("Model")
        and getattr(find(name), "config_class", None) not in {None, *configs}
        and _takes_text_alone(find(name))
    ]
    return sorted({*writers, *encoders})


def _takes_text_alone(cls: Any) -> bool:
    inputs = {*inspect.signature(cls.forward).parameters}
    others = {"pixel_values", "input_values", "input_features", "bbox", "visual_feats"}
    return "input_ids" in inputs and not inputs & others


def find(name: str) -> Any:
    """A class of transformers; None: it needs a package that is not installed."""
    try:
        found = getattr(transformers, name)
        return found if found.main_input_name else None
    except (ImportError, AttributeError):
        return None


def tiny_config(cls: Any) -> Any:
    """A config with small sizes for a class of models."""
    config = cls.config_class()
    # Some classes divide rotary frequencies into sections whose default sizes are in their code.
    parts = [
        part for part in vars(config).values() if isinstance(part, transformers.PreTrainedConfig)
    ]
    modules = {type(part).__module__.replace("configuration", "modeling") for part in parts}
    sections = any("mrope_section" in _source(name) for name in {cls.__module__, *modules})
    data = config.to_dict()
    _shrink(data, sections=sections)
    return cls.config_class.from_dict(data)


def _source(module: str) -> str:
    try:
        return inspect.getsource(importlib.import_module(module))
    except ImportError:
        return ""


def tiny_model(name: str) -> Any:
    """A small model of a class, in float32; its matrices are random and none of its heads is tied."""
    cls = find(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config(cls)
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(config).parameters())
        assert size <= MAX_PARAMETERS, f"{size:,} parameters"
        model = cls(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


def _shrink(data: dict[str, Any], *, sections: bool) -> None:
    """Shrinks a config as a dictionary, and the configs in it."""
    picked = _pick_layers(data)
    heads = data.get("num_attention_heads")
    is_grouped = data.get("num_key_value_heads", heads) not in (None, heads)
    tokens = iter(range(3, FIRST_TEXT_TOKEN))
    for key, value in data.items():
        if isinstance(value, dict) and "model_type" in value:
            _shrink(value, sections=sections)
        elif isinstance(value, dict) and key.startswith("rope"):
            _shrink_rope(value, data, sections=sections)
        elif TOKENS.fullmatch(key):
            data[key] = _small_token(value, tokens)
        else:
            data[key] = _of_layers(key, value, *(picked or (0, [0, 1])))
    for part in [data, *(data.get("per_layer_config") or {}).values()]:
        if "num_key_value_heads" in part and not is_grouped:
            part["num_key_value_heads"] = part["num_attention_heads"]
    if data.get("head_dim", 0) is None and "qk_rope_head_dim" not in data:
        data["head_dim"] = HEAD_DIM
    _override(data, OVERRIDES.get(str(data.get("model_type")), {}))


def _override(data: dict[str, Any], values: dict[str, Any]) -> None:
    """Replaces fields of a config, and single fields of the configs in it."""
    for key, value in values.items():
        part = data.get(key)
        if isinstance(value, dict) and isinstance(part, dict) and "model_type" in part:
            _override(part, value)
        else:
            data[key] = value


def _of_layers(key: str, value: Any, count: int, chosen: list[int]) -> Any:
    """A field for the chosen ones of all layers; of other fields, a small value."""
    if key == "per_layer_config" and value:
        parts = {int(index): part for index, part in value.items()}
        kept = {i: parts[c] for i, c in enumerate(chosen) if c in parts}
        return {i: {k: _small(k, v) for k, v in part.items()} for i, part in kept.items()}
    if isinstance(value, list) and value and len(value) == count:
        return [_small(key, value[index]) for index in chosen]
    if type(value) is int and LAYERS.fullmatch(key):
        return min(value, len(chosen) if value == count else 2)
    if INDICES.fullmatch(key) and _is_indices(value):
        return [chosen.index(v) for v in value if v in chosen] or [0]
    return _small(key, value)


def _pick_layers(data: dict[str, Any]) -> tuple[int, list[int]] | None:
    """Chooses the layers to keep: one of each kind, at least two.

    Returns:
        The number of layers and the indices of those to keep; None: no field is about single layers.
    """
    counts = {v for k, v in data.items() if LAYERS.fullmatch(k) and type(v) is int and v > 1}
    for count in sorted(counts, reverse=True):
        kinds = [v for v in data.values() if isinstance(v, list) and len(v) == count]
        kinds += [
            [str(index) in layers or f"{index:02}" in layers for index in range(count)]
            for layers in [data.get("per_layer_config") or {}]
            if layers
        ]
        members = [
            [index in value for index in range(count)]
            for key, value in data.items()
            if INDICES.fullmatch(key) and _is_indices(value) and max(value) < count
        ]
        if kinds or members:
            first: dict[str, int] = {}
            for index in range(count):
                first.setdefault(repr([kind[index] for kind in [*kinds, *members]]), index)
            chosen = sorted(first.values())[:4]
            if len(chosen) < 2:
                chosen = [0, 1]
            return count, chosen
    return None


def _is_indices(value: Any) -> bool:
    return bool(isinstance(value, list) and value and all(type(v) is int for v in value)) and (
        value == sorted(set(value)) and value[0] >= 0
    )


def _small(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_small(key, part) for part in value]
    if type(value) is not int:
        return value
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, key)), value)
    return min(value, size)


def _small_token(value: Any, free: Iterator[int]) -> Any:
    if isinstance(value, list):
        return [_small_token(part, free) for part in value]
    if type(value) is not int or value < FIRST_TEXT_TOKEN:
        return value
    return next(free)


def _shrink_rope(rope: dict[str, Any], data: dict[str, Any], *, sections: bool) -> None:
    """Fits rotary frequencies to a small head."""
    for part in rope.values():
        if isinstance(part, dict):
            _shrink_rope(part, data, sections=sections)
    if any(key.endswith("_factor") and isinstance(value, list) for key, value in rope.items()):
        rope["rope_type"] = "default"  # it has a factor for each frequency
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = 64
    if sections and "rope_type" in rope:
        half = (
            int(
                min(data.get("head_dim") or HEAD_DIM, HEAD_DIM)
                * rope.get("partial_rotary_factor", 1.0)
            )
            // 2
        )
        rope["mrope_section"] = [half - half // 3 * 2, half // 3, half // 3]
