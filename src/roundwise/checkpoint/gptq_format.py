"""Reads and writes the standard GPTQ format: tensor names, packed tensors and quantization_config.

v1 ("gptq") stores zero points minus one, v2 ("gptq_v2") stores them unchanged. AutoGPTQ, GPTQModel and
roundwise write both; vLLM, transformers and others read them. docs/format.md describes the format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from roundwise.checkpoint.engines import packed_rules, with_packed_names
from roundwise.checkpoint.reader import Checkpoint, TensorInfo
from roundwise.checkpoint.untrusted import read_json
from roundwise.config import QuantizeConfig
from roundwise.core.quantized_weight import WIDTHS, QuantizedWeight, codes_per_block, pack, unpack
from roundwise.errors import CheckpointError
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


def shape_problem(out_features: int, in_features: int, config: QuantizeConfig) -> str | None:
    """Returns why the format cannot store a weight with these settings; None: it can."""
    if not group_size_divides(in_features, config.group_size):
        return f"group_size={config.group_size} does not divide {in_features} input channels"
    if not fills_words(out_features, in_features, config.bits):
        return (
            f"{config.bits}-bit codes are stored in multiples of {codes_per_block(config.bits)}, "
            f"which {out_features} x {in_features} is not"
        )
    return None


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


def decode(tensors: dict[str, torch.Tensor], checkpoint_format: str, name: str) -> QuantizedWeight:
    """Inverse of `encode`, for files of any tool; the width follows from the shapes.

    Args:
        tensors: qweight, qzeros, scales and, unless group k holds channels k·g … k·g + g - 1, g_idx.
        checkpoint_format: "gptq" (zero points stored minus one) or "gptq_v2".
        name: the layer's name, for error messages.

    Raises:
        CheckpointError: shapes or types contradict each other, or g_idx names groups that do not exist.
    """
    qweight, qzeros, scales = (tensors[suffix] for suffix in SUFFIXES[:3])
    bits, groups = infer_bits(tensors, name), scales.shape[0]
    packed_as_int32 = {qweight.dtype, qzeros.dtype} == {torch.int32}
    if not packed_as_int32 or not scales.is_floating_point():
        raise CheckpointError(
            f"{name}: qweight and qzeros must be int32 and scales floating point, they are "
            f"{qweight.dtype}, {qzeros.dtype} and {scales.dtype}"
        )
    codes = unpack(qweight, bits).T.contiguous()
    zeros = unpack(qzeros.T.contiguous(), bits).to(torch.int32)
    if checkpoint_format == "gptq":
        zeros = (zeros + 1) & (2**bits - 1)
    g_idx = tensors.get("g_idx")
    if g_idx is None:
        g_idx = torch.arange(codes.shape[1], dtype=torch.int32) // (-(-codes.shape[1] // groups))
    if g_idx.shape != (codes.shape[1],) or int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise CheckpointError(
            f"{name}.g_idx does not assign {codes.shape[1]} channels to {groups} groups"
        )
    return QuantizedWeight(
        codes=codes, scales=scales.T.contiguous(), zeros=zeros,
        g_idx=g_idx.to(torch.int32), bits=bits,
    )  # fmt: skip


def infer_bits(tensors: dict[str, torch.Tensor], name: str) -> int:
    """Returns the width of the codes, from qzeros [groups, out·bits/32] and scales [groups, out].

    Args:
        tensors: qweight, qzeros and scales; only their shapes are used.
        name: the layer's name, for error messages.

    Raises:
        CheckpointError: the shapes contradict each other.
    """
    qzeros, scales, qweight = tensors["qzeros"], tensors["scales"], tensors["qweight"]
    if any(t.ndim != 2 for t in (qzeros, scales, qweight)) or not scales.numel():
        raise CheckpointError(f"{name}: qweight, qzeros and scales must be matrices")
    bits, remainder = divmod(qzeros.shape[1] * 32, scales.shape[1])
    if remainder or bits not in WIDTHS or qzeros.shape[0] != scales.shape[0]:
        raise CheckpointError(
            f"{name}: qzeros {list(qzeros.shape)} and scales {list(scales.shape)} do not fit together"
        )
    if qweight.shape[1] != scales.shape[1]:
        raise CheckpointError(
            f"{name}: qweight {list(qweight.shape)} and scales {list(scales.shape)} do not fit together"
        )
    return bits


def quantization_config(
    config: QuantizeConfig,
    *,
    true_sequential: bool,
    skipped: Iterable[str] = (),
    linears: Iterable[str] = (),
) -> dict[str, Any]:
    """Returns the `quantization_config` of config.json that vLLM, transformers and others read.

    Args:
        config: settings of the run.
        true_sequential: the run was in true_sequential mode.
        skipped: names of linear layers that are never quantized, whatever the settings say.
        linears: names of all other linear layers.
    """
    dynamic = {**_skip_rules(skipped), **packed_rules(config, linears)}
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
        # Readers expect a number here, so "auto" goes under meta.
        **({"damp_percent": config.damp_percent} if config.damp_percent != "auto" else {}),
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {
            "quantizer": [f"roundwise:{__version__}"],
            "method": config.method,
            "order": config.order,
            **({"damp_percent": "auto"} if config.damp_percent == "auto" else {}),
            **({"prescale": "awq"} if config.prescales else {}),
            **({"rotate": {"seed": config.rotation_seed}} if config.rotate else {}),
        },
    }


def _skip_rules(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns `dynamic` rules that skip these layers in every block."""
    patterns = (re.sub(r"\d+", r"\\d+", re.escape(name)) for name in names)
    return {f"-:.*{pattern}": {} for pattern in dict.fromkeys(patterns)}


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
    lm_head: bool,
) -> dict[str, Any]:
    """Returns the `quantization_config` of a checkpoint of which only the weights are known.

    The most common settings become the defaults; other layers get `dynamic` rules.

    Args:
        layers: settings of each quantized layer, by name.
        checkpoint_format: gptq or gptq_v2.
        unquantized: names of linear layers that are not quantized.
        lm_head: the output head is quantized.
    """
    names_by_settings: dict[LayerSettings, list[str]] = {}
    for name, settings in layers.items():
        names_by_settings.setdefault(settings, []).append(name)
    (default, _), *others = sorted(
        names_by_settings.items(), key=lambda item: len(item[1]), reverse=True
    )
    dynamic = _skip_rules(unquantized)
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


def parse_dynamic_rules(settings: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """Converts the `dynamic` rules of a quantization_config to those of `QuantizeConfig.dynamic`.

    Args:
        settings: a quantization_config, of roundwise or another tool.

    Returns:
        Pattern -> changed settings; None: layers that match are not quantized.
    """
    rules: dict[str, dict[str, Any] | None] = {}
    for rule, changes in (settings.get("dynamic") or {}).items():
        pattern = rule.removeprefix("-:").removeprefix("+:")
        # In the file, patterns match from the start of the name; roundwise writes its own as `.*(?:…)`.
        ours = pattern.startswith(".*(?:") and pattern.endswith(")")
        pattern = pattern[5:-1] if ours else f"^(?:{pattern})"
        rules[pattern] = None if rule.startswith("-:") else dict(changes)
    return rules


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantized linear layer of a checkpoint."""

    name: str
    tensors: dict[str, TensorInfo]
    """The layer's tensors by suffix, such as qweight."""

    def bits(self) -> int:
        """Returns the width of the codes; reads no data.

        Raises:
            CheckpointError: the shapes of the layer's tensors contradict each other.
        """
        shapes = {key: torch.empty(info.shape, device="meta") for key, info in self.tensors.items()}
        return infer_bits(shapes, self.name)

    def in_features(self) -> int:
        """Returns the number of input channels; reads no data.

        Raises:
            CheckpointError: the shapes of the layer's tensors contradict each other.
        """
        return self.tensors["qweight"].shape[0] * 32 // self.bits()

    def read(self, checkpoint_format: str) -> QuantizedWeight:
        """Returns the layer's codes, scales and zero points; Args and Raises as for `decode`."""
        tensors = {suffix: info.read() for suffix, info in self.tensors.items()}
        return decode(tensors, checkpoint_format, self.name)


def quantized_layers(checkpoint: Checkpoint) -> Iterator[QuantizedLayer]:
    """Yields all quantized linear layers of a GPTQ checkpoint, found by their qweight tensors.

    Raises:
        CheckpointError: a layer has no qzeros or no scales.
    """
    for tensor in checkpoint.tensors:
        if tensor.endswith(".qweight"):
            name = tensor.removesuffix(".qweight")
            tensors = {
                suffix: checkpoint.tensors[f"{name}.{suffix}"]
                for suffix in SUFFIXES
                if f"{name}.{suffix}" in checkpoint.tensors
            }
            missing = {"qweight", "qzeros", "scales"} - set(tensors)
            if missing:
                raise CheckpointError(f"{name} lacks {', '.join(sorted(missing))}")
            yield QuantizedLayer(name, tensors)


def read_quantization_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the `quantization_config` of config.json, or the quantize_config.json of older tools.

    Raises:
        CheckpointError: the checkpoint has neither, or its method is not gptq.
    """
    settings = checkpoint.config.get("quantization_config")
    if settings is None and (checkpoint.folder / "quantize_config.json").exists():
        settings = read_json(checkpoint.folder / "quantize_config.json")
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{checkpoint.folder} is not quantized: it has no quantization_config"
        )
    method = settings.get("quant_method", "gptq")
    if method != "gptq":
        convertible = method == "compressed-tensors"
        hint = ": run `roundwise convert --to gptq` first" if convertible else ""
        raise CheckpointError(
            f"{checkpoint.folder} is quantized with {method}, not in the GPTQ format{hint}"
        )
    return settings
