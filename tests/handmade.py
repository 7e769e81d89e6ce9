"""GPTQ checkpoints as another tool would write them: packed by hand, and the weights that they hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

#: A config as tools write it; tests change entries.
PLAIN: dict[str, Any] = {
    "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
}  # fmt: skip
Change = Callable[[dict[str, torch.Tensor]], None]


def stream(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Packs codes [n, m] along n into int32 [n·bits/32, m], one bit after the other."""
    n, m = codes.shape
    flat = (codes[:, None, :] >> np.arange(bits)[None, :, None]) & 1
    in_words = flat.reshape(n * bits // 32, 32, m).astype(np.uint64)
    words = (in_words << np.arange(32, dtype=np.uint64)[None, :, None]).sum(1)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def packed(
    W: torch.Tensor, *, bits: int = 4, group: int = 32, sym: bool = True, v1: bool = True,
    groups_of: np.ndarray | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:  # fmt: skip
    """Rounds W [out, in] to nearest: its tensors by suffix, and the weight they stand for.

    `groups_of`: group of each channel; None: k // group.
    """
    w = W.double().numpy()
    rows, columns = w.shape
    size, maxq = (columns if group == -1 else group), 2**bits - 1
    g_idx = np.arange(columns) // size if groups_of is None else groups_of
    count = int(g_idx.max()) + 1
    scales, zeros = np.ones((count, rows)), np.full((count, rows), 2 ** (bits - 1))
    codes = np.zeros((columns, rows), dtype=np.int64)
    for k in range(count):
        members = np.flatnonzero(g_idx == k)
        part = w[:, members]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        scale = 2 * np.abs(part).max(1) / maxq if sym else (high - low) / maxq
        scales[k] = torch.from_numpy(scale).half().double().numpy()
        if not sym:
            zeros[k] = np.clip(np.rint(-low / scales[k]), 1, maxq)
        rounded = np.rint(part / scales[k][:, None]) + zeros[k][:, None]
        codes[members] = np.clip(rounded, 0, maxq).T
    tensors = {
        "qweight": stream(codes, bits),
        "qzeros": stream(((zeros - v1) % 2**bits).T, bits).T.contiguous(),
        "scales": torch.from_numpy(scales).half(),
        "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
    }
    dense = scales[g_idx] * (codes - zeros[g_idx])
    return tensors, torch.from_numpy(dense.T.copy()).float()


def is_linear(name: str) -> bool:
    """Tells whether a tensor is the weight of a linear layer in a block of a small Llama."""
    return name.endswith("_proj.weight")


def write(
    source: Path, out: Path, config: dict[str, Any], *, change: Change = lambda tensors: None,
    chosen: Callable[[str], bool] = is_linear, where: str = "config.json", g_idx: bool = True,
    file: str = "model.safetensors", **options: Any,
) -> Any:  # fmt: skip
    """Writes a GPTQ checkpoint of a small model and returns the model it stands for.

    Args:
        source: folder of the model.
        out: folder to write.
        config: quantization config, as it is.
        change: changes the tensors before they are written.
        chosen: tells from its name whether a weight is quantized.
        where: config.json or quantize_config.json.
        g_idx: write g_idx.
        file: name of the weight file.
        options: of `packed`.
    """
    shutil.copytree(source, out)
    dense = transformers.AutoModelForCausalLM.from_pretrained(source).float().eval()
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    for name in [name for name in tensors if chosen(name)]:
        parts, W = packed(tensors.pop(name).float(), **options)
        stem = name.removesuffix(".weight")
        with torch.no_grad():
            dense.get_submodule(stem).weight.copy_(W)
        tensors |= {f"{stem}.{key}": part for key, part in parts.items() if g_idx or key != "g_idx"}
    change(tensors)
    save_file(tensors, out / file, {"format": "pt"})
    settings = json.loads((out / "config.json").read_text())
    if where == "config.json":
        settings["quantization_config"] = config
    else:
        (out / where).write_text(json.dumps(config))
    (out / "config.json").write_text(json.dumps(settings))
    return dense
