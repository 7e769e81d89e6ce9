"""Dense GGUF files of small models, as llama.cpp's converter writes them: names, and how tensors change.

Written from that converter's behaviour, in numpy, and shares nothing with the package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

Array = np.ndarray[Any, np.dtype[np.float32]]
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA, "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "gpt2": gguf.MODEL_ARCH.GPT2, "bloom": gguf.MODEL_ARCH.BLOOM,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE, "phi3": gguf.MODEL_ARCH.PHI3,
}  # fmt: skip


def permuted(W: Array, heads: int) -> Array:
    """Rows of q or k in the order that llama.cpp's rotary embedding wants: halves interleaved."""
    return W.reshape(heads, 2, W.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(W.shape)


def changed(name: str, tensor: Array, config: dict[str, Any]) -> Array:
    """A tensor of a Hugging Face checkpoint as llama.cpp has it."""
    family = config["model_type"]
    if family == "llama" and re.search(r"\.[qk]_proj\.", name):
        key = "num_attention_heads" if ".q_proj" in name else "num_key_value_heads"
        return permuted(tensor, config[key])
    if family == "gemma3_text" and name.endswith("norm.weight"):
        return tensor + 1
    if family == "gpt2" and re.search(r"\.c_(attn|proj|fc)\.weight$", name):
        return tensor.T
    if family == "bloom" and "query_key_value" in name:
        # From (head, q or k or v, channel) to (q or k or v, head, channel).
        by_head = tensor.reshape(config["n_head"], 3, -1, *tensor.shape[1:])
        return by_head.swapaxes(0, 1).reshape(tensor.shape)
    return tensor


def tensors_of_llama_cpp(folder: Path) -> Iterator[tuple[str, Array]]:
    """Names and values, in float32, of all tensors of a model."""
    config = json.loads((folder / "config.json").read_text())
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    names = gguf.get_tensor_name_map(ARCHITECTURES[config["model_type"]], layers)
    experts: dict[str, dict[int, Array]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = changed(name, tensor.float().numpy(), config)
        expert = re.match(r"(.*\.experts)\.(\d+)\.(.*)", name)
        if expert:
            joined = f"{expert[1]}.{expert[3]}"
            experts.setdefault(joined, {})[int(expert[2])] = values
            continue
        yield names.get_name(name, (".weight", ".bias")) or name, values
    for name, members in experts.items():
        stacked = np.stack([members[index] for index in range(len(members))])
        yield names.get_name(name, (".weight",)) or name, stacked


def write_template(folder: Path, path: Path, kind: str = "F16") -> Path:
    """Writes the dense GGUF file of a model: matrices in some type, vectors and routers in F32.

    The metadata are enough for llama.cpp to run a Llama on token ids.
    """
    config = json.loads((folder / "config.json").read_text())
    family = config["model_type"]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[family]])
    writer.add_name("a small model")
    writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{kind}" if kind != "F32" else "ALL_F32"]))
    if family == "llama":
        add_llama_metadata(writer, config)
    for name, values in tensors_of_llama_cpp(folder):
        is_small = values.ndim < 2 or "ffn_gate_inp" in name
        stored = gguf.GGMLQuantizationType["F32" if is_small else kind]
        data = gguf.quants.quantize(np.ascontiguousarray(values), stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_llama_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Adds what llama.cpp must know of a Llama without a tokenizer."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def read_gguf(path: Path) -> dict[str, tuple[str, Array]]:
    """Type and values of each tensor, as the `gguf` package decodes them."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type),
        )
        for tensor in gguf.GGUFReader(path).tensors
    }
