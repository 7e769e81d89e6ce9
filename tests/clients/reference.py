"""An independent reader of GPTQ checkpoints: numpy only, written from the format, not from us.

It imports nothing of roundwise and shares no idea with it: tensors are read from the bytes of the
safetensors file, packed words are taken apart bit by bit (slow and obvious, the same three lines
for 2, 3, 4 and 8 bits), and the dense float32 weights go into a plain transformers model.

    W[n, k] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n])
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

Array = NDArray[np.generic]

_DTYPES = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "I64": "<i8", "BF16": "<u2"}


def read_tensors(directory: Path) -> dict[str, Array]:
    """All tensors of a checkpoint, of however many shards; bfloat16 comes back as float32."""
    tensors: dict[str, Array] = {}
    for path in sorted(directory.glob("*.safetensors")):
        blob = path.read_bytes()
        start = 8 + int.from_bytes(blob[:8], "little")
        for name, entry in json.loads(blob[8:start]).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            raw = np.frombuffer(blob[start + begin : start + end], _DTYPES[entry["dtype"]])
            if entry["dtype"] == "BF16":  # the upper half of a float32
                raw = (raw.astype(np.uint32) << 16).view(np.float32)
            tensors[name] = raw.reshape(entry["shape"])
    return tensors


def unpack(words: Array, bits: int) -> NDArray[np.int64]:
    """Codes [K, N] of packed words [K * bits / 32, N]: a column is one little-endian bit stream.

    For 2, 4 and 8 bits no code crosses a word; for 3 bits codes 10 and 21 of each 32 do, and the
    stream needs no special case for it.
    """
    place = np.arange(32, dtype=np.uint32)[None, :, None]
    stream = (words.view(np.uint32)[:, None, :] >> place) & 1
    digits = stream.reshape(-1, bits, words.shape[1]).astype(np.int64)
    codes: NDArray[np.int64] = (digits << np.arange(bits)[None, :, None]).sum(axis=1)
    return codes


def dequantize(
    tensors: dict[str, Array], name: str, bits: int, checkpoint_format: str
) -> NDArray[np.float32]:
    """The dense weight [out_features, in_features] of one quantized linear layer."""
    codes = unpack(tensors[f"{name}.qweight"], bits)
    zeros = unpack(tensors[f"{name}.qzeros"].T, bits).T
    scales = tensors[f"{name}.scales"].astype(np.float32)
    g_idx = tensors[f"{name}.g_idx"]
    if checkpoint_format == "gptq":
        # v1 stores zero - 1. A zero of 0 would be stored as all ones, which some readers take for
        # 2^bits and others let spill into the neighbouring code: no two clients agree on it.
        if (zeros == 2**bits - 1).any():
            raise ValueError(f"{name}: a zero point of 0 in a v1 file is ambiguous")
        zeros = zeros + 1
    elif checkpoint_format != "gptq_v2":
        raise ValueError(f"{checkpoint_format!r} is not a GPTQ checkpoint format")
    weight: NDArray[np.float32] = (scales[g_idx] * (codes - zeros[g_idx]).astype(np.float32)).T
    return weight


def bits_of(name: str, config: dict[str, Any]) -> int:
    """Its width: that of the first rule that matches its name, else the checkpoint's."""
    for rule, changes in config.get("dynamic", {}).items():
        if rule.startswith("+:") and re.match(rule[2:], name):
            return int(changes.get("bits", config["bits"]))
    return int(config["bits"])


def read_dense(directory: Path) -> dict[str, NDArray[np.float32]]:
    """The checkpoint's state dict with every quantized layer replaced by its dense weight."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gptq", config["quant_method"]
    tensors = read_tensors(directory)
    quantized = [k.removesuffix(".qweight") for k in tensors if k.endswith(".qweight")]
    assert quantized, f"{directory} has no quantized layer"
    dense = {
        f"{name}.weight": dequantize(
            tensors, name, bits_of(name, config), config["checkpoint_format"]
        )
        for name in quantized
    }
    packed = {f"{n}.{part}" for n in quantized for part in ("qweight", "qzeros", "scales", "g_idx")}
    rest = {k: v.astype(np.float32) for k, v in tensors.items() if k not in packed}
    return dense | rest


def dense_model(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A plain transformers model with the checkpoint's dequantized weights."""
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), dtype=torch.float32, attn_implementation="eager"
    )
    state = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in read_dense(directory).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{directory}: missing {missing}, unexpected {unexpected}")
    if "lm_head.weight" in missing:
        assert config["tie_word_embeddings"], "lm_head.weight is missing and not tied"
        model.tie_weights()
    return model.to(dtype).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [windows, length, vocab] of every position, in float32."""
    windows = torch.from_numpy(input_ids)
    rows = [model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in windows]
    return torch.stack(rows).numpy()
