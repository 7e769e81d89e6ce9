"""Models written in the formats that models are published in, by the packages that define them.

Each format writes a weight [out, in] and returns its tensors by name, and the weight as the package
dequantizes it: transformers and compressed-tensors; for AWQ, fbgemm and ModelOpt, whose packages need a
GPU, a computation of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from tests.helpers import tensors_of

Tensors = dict[str, torch.Tensor]
F8 = torch.float8_e4m3fn
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Format:
    """A format of published models."""

    settings: dict[str, Any]
    """The quantization_config."""
    write: Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]
    """Gets the name of a module and its weight in bfloat16."""
    name: str
    """Name of the format that a plan shows."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further entries of config.json."""


def fp8(block: list[int] | None, scale_fmt: str = "float", suffix: str = "weight_scale_inv") -> Any:
    """FP8 as transformers writes and reads it."""
    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt)
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=config))

    def write(stem: str, W: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        made = quantize.convert({f"{stem}.weight": W})
        codes, scales = made[f"{stem}.weight"], made[f"{stem}.weight_scale_inv"]
        dense = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=W.dtype)
        if suffix == "qscale_weight":
            return {
                f"{stem}.weight": codes, f"{stem}.{suffix}": scales.reshape(()),
                f"{stem}.qscale_act": torch.tensor(0.5),
            }, dense  # fmt: skip
        if suffix == "bytes":  # MXFP8 with exponents as plain bytes
            return {
                f"{stem}.weight": codes, f"{stem}.weight_scale_inv": scales.view(torch.uint8)
            }, dense  # fmt: skip
        return {f"{stem}.weight": codes, f"{stem}.{suffix}": scales}, dense

    return write


def fp4_codes(values: torch.Tensor) -> torch.Tensor:
    """The nearest FP4 number to each value, as codes 0 … 15."""
    table = torch.tensor(FP4)
    codes = (values.abs()[..., None] - table).abs().argmin(-1)
    return (codes + 8 * (values < 0)).to(torch.uint8)


def pairs(codes: torch.Tensor) -> torch.Tensor:
    """Two codes in a byte, the first in its lower half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def fp4_of_deepseek(stem: str, W: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """FP4 in bytes of type I8 with exponents as scales, as DeepSeek-V4 has its experts."""
    groups = W.float().unflatten(1, (-1, 32))
    exponents = torch.ceil(torch.log2(groups.abs().amax(-1) / 6))
    codes = pairs(fp4_codes((groups / exponents.exp2()[..., None]).flatten(1))).view(torch.int8)
    scales = exponents.exp2().to(torch.float8_e8m0fnu)
    dense = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=W.dtype)
    return {f"{stem}.weight": codes, f"{stem}.scale": scales}, dense


def mixed_deepseek(stem: str, W: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """DeepSeek-V4: FP4 in the MLP (there its experts), FP8 with exponents elsewhere."""
    return fp4_of_deepseek(stem, W) if ".mlp." in stem else fp8([32, 32], "ue8m0", "scale")(stem, W)


def row_scaled(stem: str, W: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """FP8 with a scale per row, as fbgemm has it."""
    scales = W.float().abs().amax(1, keepdim=True) / 448
    codes = (W.float() / scales).to(F8)
    dense = torch.stack([row.float() * scale for row, scale in zip(codes, scales, strict=True)])
    return {f"{stem}.weight": codes, f"{stem}.weight_scale": scales}, dense.to(W.dtype)


def fp8_of_modelopt(stem: str, W: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """FP8 with one scale."""
    scale = W.float().abs().max() / 448
    codes = (W.float() / scale).to(F8)
    return {
        f"{stem}.weight": codes, f"{stem}.weight_scale": scale,
        f"{stem}.input_scale": torch.tensor(0.01),
    }, (codes.float() * scale).to(W.dtype)  # fmt: skip


def nvfp4_of_modelopt(stem: str, W: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """FP4 with a scale in FP8 for 16 numbers, and a factor for the whole weight."""
    groups = W.float().unflatten(1, (-1, 16))
    factor = W.float().abs().max() / (6 * 448)
    scales = (groups.abs().amax(-1) / 6 / factor).to(F8)
    codes = fp4_codes(groups / (scales.float() * factor)[..., None]).flatten(1)
    values = torch.tensor(FP4)[codes.int() % 8] * (1 - 2 * (codes >= 8).float())
    dense = (values.unflatten(1, (-1, 16)) * (scales.float() * factor)[..., None]).flatten(1)
    return {
        f"{stem}.weight": pairs(codes), f"{stem}.weight_scale": scales,
        f"{stem}.weight_scale_2": factor, f"{stem}.input_scale": torch.tensor(0.01),
    }, dense.to(W.dtype)  # fmt: skip


def awq(stem: str, W: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """The GEMM layout of AWQ, row by row, in groups of 32."""
    rows, columns = W.shape
    groups = W.float().unflatten(1, (-1, 32))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).to(torch.float16)
    zeros = torch.round(-low / scales.float()).int().clamp(0, 15)
    codes = torch.round(groups / scales.float()[..., None]) + zeros[..., None]
    codes = codes.clamp(0, 15).int().flatten(1)
    dense = (codes.unflatten(1, (-1, 32)) - zeros[..., None]) * scales.float()[..., None]
    qweight = torch.zeros(columns, rows // 8, dtype=torch.int64)
    qzeros = torch.zeros(columns // 32, rows // 8, dtype=torch.int64)
    places = {
        0: 0,
        1: 4,
        2: 1,
        3: 5,
        4: 2,
        5: 6,
        6: 3,
        7: 7,
    }  # channel of eight -> place in the word
    for i in range(rows):
        qweight[:, i // 8] |= codes[i].long() << (4 * places[i % 8])
        qzeros[:, i // 8] |= zeros[i].long() << (4 * places[i % 8])
    return {
        f"{stem}.qweight": _signed(qweight), f"{stem}.qzeros": _signed(qzeros),
        f"{stem}.scales": scales.T.contiguous(),
    }, dense.flatten(1).to(W.dtype)  # fmt: skip


def _signed(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def compressed(file_format: str, activations: dict[str, Any] | None = None, **weights: Any) -> Any:
    """A format of compressed-tensors, written and read by the library."""
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=file_format)
    compressor = BaseCompressor.get_value_from_registry(file_format)
    block = {
        "tensor": lambda W: W.shape,
        "channel": lambda W: (1, W.shape[1]),
        "block": lambda W: args.block_structure,
    }.get(weights["strategy"], lambda W: (1, args.group_size))

    def write(stem: str, W: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, columns = block(W)
        tiles = W.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
        state = {"weight": W}
        if weights["strategy"] == "tensor_group":
            state["weight_global_scale"] = generate_gparam(W.min(), W.max())
        scales, zeros = calculate_qparams(
            low, high, args, global_scale=state.get("weight_global_scale")
        )
        state |= {"weight_scale": scales.to(W.dtype), "weight_zero_point": zeros}
        packed = compressor.compress(state, scheme)
        try:
            dense = compressor.decompress(dict(packed), scheme)["weight"]
        except NotImplementedError as error:  # compressed-tensors before 0.18, for MXFP4
            pytest.skip(f"the installed compressed-tensors has no reference: {error}")
        return {f"{stem}.{key}": value.contiguous() for key, value in packed.items()}, dense.to(
            W.dtype
        )

    settings = {
        "quant_method": "compressed-tensors", "format": file_format,
        "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"], "input_activations": activations,
                "weights": args.model_dump(mode="json"), "format": file_format,
            }
        },
    }  # fmt: skip
    return settings, write


DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
FP8_WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True}
FORMATS: dict[str, Format] = {
    "fp8-block": Format(
        {"quant_method": "fp8", "weight_block_size": [32, 32]}, fp8([32, 32]), "FP8"
    ),
    "fp8-tensor": Format(
        {"quant_method": "fp8", "weight_block_size": None}, fp8(None, suffix="qscale_weight"), "FP8"
    ),
    "mxfp8": Format(
        {"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
        fp8([1, 32], "ue8m0", "bytes"), "MXFP8",
    ),
    "deepseek-v4": Format(
        {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
        mixed_deepseek, "MXFP4", {"expert_dtype": "fp4"},
    ),
    "fbgemm": Format({"quant_method": "fbgemm_fp8"}, row_scaled, "FP8"),
    "modelopt-fp8": Format(
        {"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_of_modelopt, "FP8"
    ),
    "modelopt-nvfp4": Format(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, nvfp4_of_modelopt,
        "NVFP4",
    ),
    "awq": Format(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        awq, "4-bit AWQ",
    ),
    "compressed-fp8-tensor": Format(
        *compressed("float-quantized", DYNAMIC, **FP8_WEIGHTS, strategy="tensor"), "FP8"
    ),
    "compressed-fp8-channel": Format(
        *compressed("float-quantized", DYNAMIC, **FP8_WEIGHTS, strategy="channel"), "FP8"
    ),
    "compressed-fp8-block": Format(
        *compressed(
            "float-quantized", DYNAMIC, **FP8_WEIGHTS, strategy="block", block_structure=[16, 32]
        ), "FP8",
    ),
    "compressed-int8": Format(
        *compressed(
            "int-quantized", {**DYNAMIC, "type": "int"}, num_bits=8, type="int", symmetric=True,
            strategy="channel",
        ), "INT8",
    ),
    "compressed-int8-zeros": Format(
        *compressed(
            "naive-quantized", num_bits=8, type="int", symmetric=False, strategy="group",
            group_size=32,
        ), "INT8",
    ),
    "compressed-int4": Format(
        *compressed(
            "pack-quantized", num_bits=4, type="int", symmetric=True, strategy="group",
            group_size=32,
        ), "INT4",
    ),
    "compressed-mxfp8": Format(
        *compressed(
            "mxfp8-quantized", **FP8_WEIGHTS, strategy="group", group_size=32,
            scale_dtype=torch.uint8, zp_dtype=torch.uint8,
        ), "MXFP8",
    ),
    "compressed-mxfp4": Format(
        *compressed(
            "mxfp4-pack-quantized", num_bits=4, type="float", symmetric=True, strategy="group",
            group_size=32, scale_dtype=torch.uint8, zp_dtype=torch.uint8,
        ), "MXFP4",
    ),
    "compressed-nvfp4": Format(
        *compressed(
            "nvfp4-pack-quantized", num_bits=4, type="float", symmetric=True,
            strategy="tensor_group", group_size=16, scale_dtype=F8, zp_dtype=F8,
        ), "NVFP4",
    ),
}  # fmt: skip


def publish(model: Path, folder: Path, published: Format) -> tuple[Path, Path]:
    """Writes a model in a format, and once more with the dequantized weights in bfloat16.

    All layers of the blocks are written in the format, one file each.
    """
    config = json.loads((model / "config.json").read_text())
    stored, dense = Tensors(), Tensors()
    for name, W in tensors_of(model).items():
        stored[name] = dense[name] = W.to(torch.bfloat16)
        if name.endswith("proj.weight"):
            del stored[name]
            made, dense[name] = published.write(name.removesuffix(".weight"), W.to(torch.bfloat16))
            stored |= made
    config |= {"dtype": "bfloat16"}
    return (
        write_model(
            model, folder / "published", stored,
            {**config, "quantization_config": published.settings, **published.more},
        ),
        write_model(model, folder / "dense", dense, config),
    )  # fmt: skip


def write_model(model: Path, folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    """Writes tensors and a config, with the side files of a model."""
    folder.mkdir(parents=True)
    for file in model.iterdir():
        if file.name.startswith("tokenizer"):
            shutil.copy(file, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
