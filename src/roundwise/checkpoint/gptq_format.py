"""The standard GPTQ format: names, tensors and the configuration that readers look for.

v1 ("gptq") stores zero points minus one, "gptq_v2" stores them as they are. Both are written by
AutoGPTQ, GPTQModel and us, and read by vLLM, transformers and others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from roundwise.checkpoint.engines import packed_rules, with_packed_names
from roundwise.checkpoint.reader import Checkpoint, TensorInfo
from roundwise.checkpoint.untrusted import read_json
from roundwise.config import QuantizeConfig
from roundwise.core.quantized_weight import QuantizedWeight, codes_per_block, pack, unpack
from roundwise.errors import CheckpointError, ConfigError
from roundwise.version import __version__

#: What replaces NAME.weight.
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def check_shape(name: str, out_features: int, in_features: int, config: QuantizeConfig) -> None:
    """Raises ConfigError, with the sizes that would fit, when a weight cannot be stored."""
    size = config.group_size
    if size != -1 and in_features % size:
        fits = [str(n) for n in (16, 32, 64, 128, 256, 512) if in_features % n == 0] + ["-1"]
        raise ConfigError(
            f"{name} has {in_features} input channels, which group_size={size} does not divide: "
            f"use {' or '.join(fits)}, for this module alone with "
            f"--override '{name}=group_size:{fits[-2] if len(fits) > 1 else -1}'"
        )
    block = codes_per_block(config.bits)
    for label, features in (("input", in_features), ("output", out_features)):
        if features % block:
            raise ConfigError(
                f"{name} has {features} {label} channels; {config.bits}-bit codes pack in multiples "
                f"of {block}: give it another width with --override '{name}=bits:8' "
                f"or leave it as it is with --skip '{name}'"
            )


def packed_bytes(rows: int, columns: int, config: QuantizeConfig) -> int:
    """Bytes of qweight, qzeros, scales and g_idx of a weight [rows, columns]."""
    groups = config.groups(columns)
    block = codes_per_block(config.bits)
    words = (columns // block) * rows + groups * (rows // block)
    return 4 * words * (block * config.bits // 32) + 2 * groups * rows + 4 * columns


def encode(q: QuantizedWeight, config: QuantizeConfig) -> dict[str, torch.Tensor]:
    """The four tensors of a quantized weight, by suffix.

    qweight int32 [in·bits/32, out], qzeros int32 [groups, out·bits/32], scales float16
    [groups, out], g_idx int32 [in].
    """
    zeros = (q.zeros - 1) & config.maxq if config.format == "gptq" else q.zeros
    return {
        "qweight": pack(q.codes.T, q.bits),
        "qzeros": pack(zeros, q.bits).T.contiguous(),
        "scales": q.scales.T.contiguous(),
        "g_idx": q.g_idx,
    }


def decode(tensors: dict[str, torch.Tensor], checkpoint_format: str, name: str) -> QuantizedWeight:
    """The inverse of `encode` for any tool's file; the width follows from the shapes.

    Args:
        tensors: qweight, qzeros, scales and, unless trivial, g_idx.
        checkpoint_format: "gptq" (zeros stored minus one) or "gptq_v2".
        name: for messages.

    Raises:
        CheckpointError: shapes that contradict each other.
    """
    qweight, qzeros, scales = (tensors[suffix] for suffix in SUFFIXES[:3])
    bits, groups = infer_bits(tensors, name), scales.shape[0]
    whole = {qweight.dtype, qzeros.dtype} == {torch.int32}
    if not whole or not scales.is_floating_point():
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
    """Width of the codes: qzeros is [groups, out·bits/32] and scales is [groups, out]."""
    qzeros, scales, qweight = tensors["qzeros"], tensors["scales"], tensors["qweight"]
    if any(t.ndim != 2 for t in (qzeros, scales, qweight)) or not scales.numel():
        raise CheckpointError(f"{name}: qweight, qzeros and scales must be matrices")
    bits, rest = divmod(qzeros.shape[1] * 32, scales.shape[1])
    if rest or bits not in (2, 3, 4, 8) or qzeros.shape[0] != scales.shape[0]:
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
    left: Iterable[str] = (),
    names: Iterable[str] = (),
) -> dict[str, Any]:
    """`quantization_config` of config.json, with the keys that vLLM, transformers and others read.

    Args:
        config: settings.
        true_sequential: the mode.
        left: names of linears that stay whatever the settings say.
        names: of all others.
    """
    dynamic = {**_skip_rules(left), **packed_rules(config, names)}
    for pattern, changes in config.dynamic.items():
        # Readers match dynamic patterns from the start of the name; ours may stand anywhere in it.
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
        # Readers expect a number, or nothing.
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
    """Rules of `dynamic` that leave some linears as they are, in every block."""
    patterns = (re.sub(r"\d+", r"\\d+", re.escape(name)) for name in names)
    return {f"-:.*{pattern}": {} for pattern in dict.fromkeys(patterns)}


def settings_from_weight(q: QuantizedWeight) -> dict[str, Any]:
    """The settings of a weight that can be told from the weight itself."""
    groups, columns = q.scales.shape[1], len(q.g_idx)
    size = -(-columns // groups)
    return {
        "bits": q.bits,
        "group_size": -1 if groups == 1 else size,
        "sym": bool((q.zeros == 2 ** (q.bits - 1)).all()),
        "desc_act": not torch.equal(q.g_idx, torch.arange(columns, dtype=torch.int32) // size),
    }


def config_from_settings(
    kinds: dict[str, dict[str, Any]], checkpoint_format: str, left: Iterable[str], *, lm_head: bool
) -> dict[str, Any]:
    """`quantization_config` of a checkpoint of which nothing is known but its weights.

    Args:
        kinds: what `settings_from_weight` says of each layer.
        checkpoint_format: gptq or gptq_v2.
        left: names of linears that are not quantized.
        lm_head: whether the head is.
    """
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, kind in kinds.items():
        alike.setdefault(tuple(kind.values()), []).append(name)
    usual, *others = sorted(alike.values(), key=len, reverse=True)
    dynamic = _skip_rules(left)
    for names in others:
        dynamic[f"+:(?:{'|'.join(map(re.escape, with_packed_names(names)))})$"] = kinds[names[0]]
    return {
        "quant_method": "gptq",
        **kinds[usual[0]],
        "lm_head": lm_head,
        "checkpoint_format": checkpoint_format,
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [f"roundwise:{__version__}"]},
    }


def parse_dynamic_rules(settings: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """`QuantizeConfig.dynamic` from the `dynamic` of a quantization_config, ours or another tool's."""
    found: dict[str, dict[str, Any] | None] = {}
    for rule, changes in (settings.get("dynamic") or {}).items():
        pattern = rule.removeprefix("-:").removeprefix("+:")
        # There, patterns match from the start of the name; `.*(?:…)` is how ours were made to.
        ours = pattern.startswith(".*(?:") and pattern.endswith(")")
        pattern = pattern[5:-1] if ours else f"^(?:{pattern})"
        found[pattern] = None if rule.startswith("-:") else dict(changes)
    return found


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantized linear as it stands in a checkpoint."""

    name: str
    parts: dict[str, TensorInfo]

    def bits(self) -> int:
        """Width of its codes, from the shapes alone; CheckpointError when they contradict each other."""
        shapes = {key: torch.empty(info.shape, device="meta") for key, info in self.parts.items()}
        return infer_bits(shapes, self.name)

    def in_features(self) -> int:
        """Input channels, from the shapes alone."""
        return self.parts["qweight"].shape[0] * 32 // self.bits()

    def read(self, checkpoint_format: str) -> QuantizedWeight:
        """Its codes, scales and zeros."""
        tensors = {suffix: info.read() for suffix, info in self.parts.items()}
        return decode(tensors, checkpoint_format, self.name)


def quantized_layers(checkpoint: Checkpoint) -> Iterator[QuantizedLayer]:
    """All quantized linears of a GPTQ checkpoint, recognised by their tensors.

    Raises:
        CheckpointError: one of a layer's tensors is missing.
    """
    for tensor in checkpoint.tensors:
        if tensor.endswith(".qweight"):
            name = tensor.removesuffix(".qweight")
            parts = {
                suffix: checkpoint.tensors[f"{name}.{suffix}"]
                for suffix in SUFFIXES
                if f"{name}.{suffix}" in checkpoint.tensors
            }
            missing = {"qweight", "qzeros", "scales"} - set(parts)
            if missing:
                raise CheckpointError(f"{name} lacks {', '.join(sorted(missing))}")
            yield QuantizedLayer(name, parts)


def read_quantization_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """`quantization_config` of config.json, or the quantize_config.json of older tools.

    Raises:
        CheckpointError: neither is there, or the method is not gptq.
    """
    settings = checkpoint.config.get("quantization_config")
    if settings is None and (checkpoint.folder / "quantize_config.json").exists():
        settings = read_json(checkpoint.folder / "quantize_config.json")
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{checkpoint.folder} is not quantized: there is no quantization_config"
        )
    method = settings.get("quant_method", "gptq")
    if method != "gptq":
        packed = method == "compressed-tensors"
        hint = ": `roundwise convert --to gptq` makes it that" if packed else ""
        raise CheckpointError(
            f"{checkpoint.folder} is quantized with {method}, not in the GPTQ format{hint}"
        )
    return settings
