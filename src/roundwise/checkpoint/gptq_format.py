"""The standard GPTQ format: packed tensors of a weight, and the quantization_config that is written.

`quantization_config.py` and `quantized_layers.py` read checkpoints in it. v1 ("gptq") stores zero points
minus one, v2 ("gptq_v2") stores them unchanged. AutoGPTQ, GPTQModel and roundwise write both; vLLM,
transformers and others read them. docs/format.md describes the format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from roundwise.checkpoint.engines import ignore_patterns, packed_rules, with_packed_names
from roundwise.config import QuantizeConfig
from roundwise.core.quantized_weight import QuantizedWeight, codes_per_block, pack, unpack
from roundwise.version import __version__

#: Suffixes of the tensors that replace NAME.weight.
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def group_size_divides(in_features: int, group_size: int) -> bool:
    """Returns True if groups of this size divide the input channels of a layer; -1 always does."""
    return group_size == -1 or in_features % group_size == 0


def fills_words(out_features: int, in_features: int, bits: int) -> bool:
    """Returns True if the codes of a weight of this shape fill whole 32-bit words on both sides."""
    block = codes_per_block(bits)
    return in_features % block == 0 and out_features % block == 0


def words_problem(out_features: int, in_features: int, bits: int) -> str:
    """Returns the sentence about a weight whose codes do not fill whole words."""
    return (
        f"{bits}-bit codes are stored in multiples of {codes_per_block(bits)}, "
        f"which {out_features} x {in_features} is not"
    )


def packed_bytes(rows: int, columns: int, config: QuantizeConfig) -> int:
    """Returns the bytes of qweight, qzeros, scales and g_idx of a weight.

    Args:
        rows: output channels.
        columns: input channels.
        config: settings of the layer.
    """
    groups = config.groups(columns)
    block = codes_per_block(config.bits)
    words = (columns // block) * rows + groups * (rows // block)
    return 4 * words * (block * config.bits // 32) + 2 * groups * rows + 4 * columns


def encode(q: QuantizedWeight, config: QuantizeConfig) -> dict[str, torch.Tensor]:
    """Returns the four tensors of a quantized weight by suffix, as docs/format.md describes them.

    Args:
        q: the weight.
        config: settings of the layer; `format` decides how zero points are stored.

    Returns:
        qweight int32 [in·bits/32, out], qzeros int32 [groups, out·bits/32], scales float16
        [groups, out] and g_idx int32 [in].
    """
    zeros = (q.zeros - 1) & (2**q.bits - 1) if config.format == "gptq" else q.zeros
    return {
        "qweight": pack(q.codes.T, q.bits),
        "qzeros": pack(zeros, q.bits).T.contiguous(),
        "scales": q.scales.T.contiguous(),
        "g_idx": q.g_idx,
    }


def decode(
    tensors: dict[str, torch.Tensor], checkpoint_format: str, *, bits: int, group_size: int
) -> QuantizedWeight:
    """Inverse of `encode`, for files of any tool; `QuantizedLayer` checks that the tensors fit together.

    Args:
        tensors: qweight, qzeros, scales and, unless group k holds channels k·g … k·g + g - 1, g_idx.
        checkpoint_format: "gptq" (zero points stored minus one) or "gptq_v2".
        bits: width of a code.
        group_size: g, the input channels of a group.
    """
    codes = unpack(tensors["qweight"], bits).T.contiguous()
    zeros = decode_zeros(tensors["qzeros"], checkpoint_format, bits)
    g_idx = tensors.get("g_idx")
    if g_idx is None:
        g_idx = torch.arange(codes.shape[1]) // group_size
    return QuantizedWeight(
        codes=codes, scales=tensors["scales"].T.contiguous(), zeros=zeros,
        g_idx=g_idx.to(torch.int32), bits=bits,
    )  # fmt: skip


def decode_zeros(qzeros: torch.Tensor, checkpoint_format: str, bits: int) -> torch.Tensor:
    """Returns the zero points, int32 [out, groups]; Args as for `decode`."""
    zeros = unpack(qzeros.T.contiguous(), bits).to(torch.int32)
    return (zeros + 1) & (2**bits - 1) if checkpoint_format == "gptq" else zeros


def quantization_config(
    config: QuantizeConfig,
    *,
    true_sequential: bool,
    skipped: Iterable[str] = (),
    linears: Iterable[str] = (),
    ignored: Iterable[str] = (),
) -> dict[str, Any]:
    """Returns the `quantization_config` of config.json that vLLM, transformers and others read.

    Args:
        config: settings of the run.
        true_sequential: the run was in true_sequential mode.
        skipped: names of linear layers that are never quantized, whatever the settings say.
        linears: names of all other linear layers.
        ignored: names of modules that only the files have, such as draft layers.
    """
    linears = [*linears]
    quantized = [name for name in linears if config.for_module(name) is not None]
    dynamic = {
        **_ignore_rules(ignored, quantized),
        **_skip_rules(skipped, quantized),
        **packed_rules(config, linears),
    }
    for pattern, changes in config.dynamic.items():
        # Readers match dynamic patterns from the start of the name; ours may match anywhere in it.
        anchored = f".*(?:{pattern})"
        dynamic[f"-:{anchored}" if changes is None else f"+:{anchored}"] = changes or {}
    return {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": config.desc_act,
        "sym": config.sym,
        "lm_head": config.lm_head,
        "checkpoint_format": config.format,
        "true_sequential": true_sequential,
        "damp_percent": config.damp_percent,
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": run_meta(config),
    }


def run_meta(config: QuantizeConfig) -> dict[str, Any]:
    """Returns what a quantization config says of the run that made the checkpoint.

    Args:
        config: settings of the run.
    """
    return {
        "quantizer": [f"roundwise:{__version__}"],
        "method": config.method,
        "order": config.order,
        **({"rotate": {"seed": config.rotation_seed}} if config.rotate else {}),
        **({"towers": True} if config.towers else {}),
    }


def _skip_rules(names: Iterable[str], quantized: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns `dynamic` rules that skip layers.

    Args:
        names: names of the layers; a rule is for the layer of this name in every block, unless it is
            quantized in another block.
        quantized: names of the quantized layers.
    """
    kept = [_without_numbers(name) for name in quantized]
    patterns = [
        re.escape(name)
        if any(other.endswith(_without_numbers(name)) for other in kept)
        else re.sub(r"\d+", r"\\d+", re.escape(name))
        for name in names
    ]
    return {f"-:.*{pattern}$": {} for pattern in dict.fromkeys(patterns)}


def _ignore_rules(ignored: Iterable[str], quantized: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns `dynamic` rules that skip modules that only the files have."""
    return {f"-:{pattern}": {} for pattern in ignore_patterns(ignored, quantized).values()}


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "0", name)


@dataclass(frozen=True)
class LayerSettings:
    """Settings of a quantized layer that its weight alone reveals, under their names in the config."""

    bits: int
    group_size: int
    """Input channels per group; -1: one group for all."""
    sym: bool
    desc_act: bool


def settings_from_weight(q: QuantizedWeight) -> LayerSettings:
    """Infers a layer's settings from its codes, zero points and group indices."""
    groups, columns = q.scales.shape[1], len(q.g_idx)
    size = -(-columns // groups)
    return LayerSettings(
        bits=q.bits,
        group_size=-1 if groups == 1 else size,
        sym=bool((q.zeros == 2 ** (q.bits - 1)).all()),
        desc_act=not torch.equal(q.g_idx, torch.arange(columns, dtype=torch.int32) // size),
    )


def config_from_settings(
    layers: dict[str, LayerSettings],
    checkpoint_format: str,
    unquantized: Iterable[str],
    *,
    ignored: Iterable[str] = (),
    lm_head: bool,
) -> dict[str, Any]:
    """Returns the `quantization_config` of a checkpoint of which only the weights are known.

    The most common settings become the defaults; other layers get `dynamic` rules.

    Args:
        layers: settings of each quantized layer, by name.
        checkpoint_format: gptq or gptq_v2.
        unquantized: names of linear layers that are not quantized.
        ignored: names of modules that only the files have, such as draft layers.
        lm_head: the output head is quantized.
    """
    names_by_settings: dict[LayerSettings, list[str]] = {}
    for name, settings in layers.items():
        names_by_settings.setdefault(settings, []).append(name)
    (default, _), *others = sorted(
        names_by_settings.items(), key=lambda item: len(item[1]), reverse=True
    )
    modules = ignore_patterns(ignored, layers)
    inside = tuple(f"{module}." for module in modules)
    dense = [name for name in unquantized if name not in modules and not name.startswith(inside)]
    dynamic = _ignore_rules(modules, layers) | _skip_rules(dense, layers)
    for settings, names in others:
        pattern = "|".join(map(re.escape, with_packed_names(names)))
        dynamic[f"+:(?:{pattern})$"] = asdict(settings)
    return {
        "quant_method": "gptq",
        **asdict(default),
        "lm_head": lm_head,
        "checkpoint_format": checkpoint_format,
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [f"roundwise:{__version__}"]},
    }
