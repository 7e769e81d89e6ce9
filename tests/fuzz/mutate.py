"""Changes to JSON that keep it JSON: a fuzzer that only flips bytes hardly gets past the parser."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

NUMBERS = [
    0, -1, 1, 2, 3, 7, 31, 32, 33, 64, 255, 1000, 65_537, 10**6, 10**9, 2**31 - 1, 2**31, 2**32,
    2**63 - 1, 2**63, 10**30, -(2**31), 0.0, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"),
]  # fmt: skip
TEXTS = [
    "", ".", "..", "../x", "/etc/passwd", "a/b", "\0", "\ud800", "a" * 300, "*", "(", "%s", "{}",
    "model.safetensors", "0.safetensors", "roundwise.json", "config.json", "F32", "F16", "BF16", "I32",
    "U8", "F8_E4M3", "F4", "BOOL", "I64", "C64", "bfloat16", "float16", "int8", "auto", "torch",
    "gptq", "gptq_v2", "awq", "bitsandbytes", "fp8", "compressed-tensors", "rtn", "block",
    "true_sequential", "none", "llama", "gpt2", "qwen3", "mistral", "gemma3_text", "opt", "bloom",
    "falcon", "mixtral", "mamba", "t5", "bert", "whisper", "clip", "llava", "gpt_oss", "deepseek_v3",
    "LlamaForCausalLM", "silu", "gelu", "default", "linear", "dynamic", "yarn", "llama3", "eager",
    "full_attention", "sliding_attention", "model.layers.0.self_attn.q_proj.weight", "self_attn",
    "owner/name--code.Model", "https://example.com/x",
]  # fmt: skip
KEYS = [
    "quantization_config", "quant_method", "bits", "group_size", "checkpoint_format", "dynamic", "meta",
    "rotate", "seed", "sym", "desc_act", "model_type", "architectures", "auto_map", "text_config",
    "vision_config", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "head_dim",
    "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rope_scaling",
    "rope_parameters", "rope_theta", "dtype", "torch_dtype", "tie_word_embeddings", "layer_types",
    "num_local_experts", "num_experts", "sliding_window", "pad_token_id", "hidden_act", "quantizer",
    "weight_map", "metadata", "__metadata__", "dtype", "shape", "data_offsets", "fingerprint", "block",
    "shard", "sha256", "activations", "layers", "files", "run", "given", "prescale", "norm", "weight",
    "axis", "ratio", "offset", "bias", "name", "fallback", "threads", "mode", "config", "calibration",
    "version", "nbytes", "blocks", "others", "text", "messages", "role", "content",
    "attn_implementation", "_attn_implementation",
]  # fmt: skip


def mutate(data: bytes, limit: int, seed: int, flip: Callable[[bytes, int], bytes]) -> bytes:
    """Other data, at most `limit` bytes: JSON, or lines of it, changed in a few places, or flipped.

    Args:
        data: what to start from.
        limit: bytes.
        seed: of the choice.
        flip: the fuzzer's own mutation.
    """
    draw = random.Random(seed)
    if draw.random() < 0.2:
        return flip(data, limit)
    lines = data.split(b"\n") if b"\n{" in data else [data]
    index = draw.randrange(len(lines))
    try:
        holder = [json.loads(lines[index])]
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            _change(holder, draw)
        lines[index] = json.dumps(holder[0]).encode()
    except (ValueError, RecursionError):
        return flip(data, limit)
    changed = b"\n".join(lines)
    return changed if len(changed) <= limit else flip(data, limit)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything below a value."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    )
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


def _change(holder: list[Any], draw: random.Random) -> None:
    places = list(_places(holder))
    container, key = draw.choice(places)
    other, place = draw.choice(places)
    kind = draw.randrange(8)
    if kind == 0:
        container[key] = _anything(draw)
    elif kind == 1 and container is not holder:
        del container[key]
    elif kind == 2 and isinstance(container, dict):
        container[draw.choice(KEYS)] = _anything(draw)
    elif kind == 3:
        container[key] = json.loads(json.dumps(other[place]))
    elif kind == 4:
        container[key] = draw.choice(([container[key]], {draw.choice(KEYS): container[key]}))
    elif kind == 5 and isinstance(container[key], int | float):
        number = container[key]
        container[key] = draw.choice((number + 1, number - 1, -number, 2 * number, number * 1000))
    elif kind == 6 and isinstance(container, dict):
        container[str(draw.choice((*KEYS, *TEXTS)))] = container.pop(key)
    elif kind == 7 and isinstance(container, list):
        container.insert(draw.randrange(len(container) + 1), _anything(draw))
    else:
        container[key] = draw.choice(NUMBERS)


def _anything(draw: random.Random) -> Any:
    return draw.choice(
        (draw.choice(NUMBERS), draw.choice(NUMBERS), draw.choice(TEXTS), None, True, False, [], {},
         [draw.choice(NUMBERS)], {draw.choice(KEYS): draw.choice(TEXTS)})
    )  # fmt: skip
