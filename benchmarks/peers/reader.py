"""Independent reader of quantized checkpoints: uses numpy only, no code of roundwise or its peers.

It reads every tool's output, so that no tool is evaluated with its own reader. It reads

- the GPTQ format, v1 and v2, with any g_idx:
  W[n, k] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n]);
- compressed-tensors `pack-quantized`: W[n, k] = scale[n, g] * (code[n, k] - zero[n, g]) where codes
  and zeros are stored with 2^(bits-1) added, and a symmetric file has no zeros.

Both pack codes as one continuous little-endian bit stream.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
GPTQ = ("qweight", "qzeros", "scales", "g_idx")
PACKED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


@dataclass
class Dense:
    """A checkpoint with every quantized layer replaced by its dense weight [out, in]."""

    state: dict[str, Floats]
    layers: list[str]
    """Names of the layers that were quantized."""
    trivial: bool
    """Each group is a run of neighbouring columns."""


def read_tensors(folder: Path) -> dict[str, NDArray[Any]]:
    """Returns all tensors of the safetensors files in a folder; bfloat16 becomes float32."""
    tensors: dict[str, NDArray[Any]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        body = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:body])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (body + offset for offset in entry["data_offsets"])
            values = np.frombuffer(content[begin:end], DTYPES[entry["dtype"]])
            if entry["dtype"] == "BF16":  # the upper half of a float32
                values = (values.astype(np.uint32) << 16).view(np.float32)
            tensors[name] = values.reshape(entry["shape"])
    return tensors


def unpack(words: NDArray[Any], bits: int, count: int) -> NDArray[np.int64]:
    """Returns `count` codes from each row of 32-bit words, lowest bits first, across word borders."""
    rows = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    stream = np.unpackbits(rows, axis=1, bitorder="little")[:, : count * bits]
    digits = stream.reshape(len(words), count, bits).astype(np.int64)
    return digits @ (1 << np.arange(bits))


def gptq_weight(tensors: dict[str, NDArray[Any]], bits: int, version: str) -> Floats:
    """Returns the dense weight [out, in] from the four GPTQ tensors of one layer."""
    g_idx = tensors["g_idx"]
    scales = tensors["scales"].astype(np.float32)
    codes = unpack(tensors["qweight"].T, bits, len(g_idx))  # [out, in]
    zeros = unpack(tensors["qzeros"], bits, scales.shape[1])  # [groups, out]
    if version == "gptq":  # v1 stores zero - 1
        if bool((zeros == 2**bits - 1).any()):
            raise ValueError("a zero point of 0 in a v1 file: readers do not agree on its meaning")
        zeros = zeros + 1
    elif version != "gptq_v2":
        raise ValueError(f"checkpoint_format {version!r} is unknown")
    weight: Floats = scales[g_idx].T * (codes - zeros[g_idx].T).astype(np.float32)
    return weight


def packed_weight(tensors: dict[str, NDArray[Any]], bits: int) -> Floats:
    """Returns the dense weight [out, in] from the compressed-tensors tensors of one layer."""
    rows, columns = (int(size) for size in tensors["weight_shape"])
    scale = tensors["weight_scale"].astype(np.float32)  # [out, groups]
    offset = 2 ** (bits - 1)
    codes = unpack(tensors["weight_packed"], bits, columns) - offset
    zeros = np.zeros(scale.shape, np.int64)
    if "weight_zero_point" in tensors:
        zeros = unpack(tensors["weight_zero_point"].T, bits, rows).T - offset
    group = tensors.get("weight_g_idx")
    if group is None:
        group = np.arange(columns) // (columns // scale.shape[1])
    weight: Floats = scale[:, group] * (codes - zeros[:, group]).astype(np.float32)
    return weight


def read_dense(folder: Path) -> Dense:
    """Reads a checkpoint and decodes its quantized layers.

    Raises:
        ValueError: unknown format, or no quantized layer.
    """
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    method = config["quant_method"]
    marker, parts = {"gptq": ("qweight", GPTQ), "compressed-tensors": ("weight_packed", PACKED)}[
        method
    ]
    tensors = read_tensors(folder)
    layers = [name.removesuffix("." + marker) for name in tensors if name.endswith("." + marker)]
    if not layers:
        raise ValueError(f"{folder} has no quantized layer")
    dense: dict[str, Floats] = {}
    trivial = True
    for layer in layers:
        own = {
            part: tensors.pop(f"{layer}.{part}") for part in parts if f"{layer}.{part}" in tensors
        }
        if method == "gptq":
            weight = gptq_weight(own, config["bits"], config.get("checkpoint_format", "gptq"))
        else:
            if config["format"] != "pack-quantized":
                raise ValueError(f"format {config['format']!r} is unknown")
            weight = packed_weight(own, config["config_groups"]["group_0"]["weights"]["num_bits"])
        dense[f"{layer}.weight"] = weight
        order = own.get("g_idx", own.get("weight_g_idx"))
        trivial = trivial and (order is None or bool((np.diff(order) >= 0).all()))
    rest = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    return Dense(dense | rest, layers, trivial)
