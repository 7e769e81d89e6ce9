"""Rules of the inference engines: which checkpoints each serves, and which layers it fuses.

Engines that fuse layers (q, k and v into qkv_proj, for example) look the settings up under the fused
name, so a quantization config needs rules for those names too.

`ENGINES` is the table: what each engine reads, in which version, and whether tests/clients has seen it
or it was read from the engine's source code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from roundwise.config import QuantizeConfig

#: vLLM's fused layers -> the layers that each is made of.
PACKED_MODULES_MAPPING = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
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


def ignore_patterns(ignored: Iterable[str], quantized: Iterable[str]) -> dict[str, str]:
    """Returns patterns for modules that only the files have, such as draft layers (MTP), by module.

    Engines build such layers under names of their own, such as `model.layers.61.mtp_block.…`, and look
    for rules like `.*layers\\.61\\..*` or, in vLLM, for `mtp` in a rule.

    Args:
        ignored: names of the modules.
        quantized: names of the quantized layers; no pattern matches one.
    """
    names = [*quantized]
    patterns = {}
    for module in ignored:
        parts = module.split(".")
        end = ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
        wide = ".*mtp.*" if "mtp" in module else rf".*{re.escape(end)}\..*"
        hits = any(re.match(wide, name) for name in names)
        patterns[module] = rf"(?:.*\.)?{re.escape(module)}(?:\..*)?$" if hits else wide
    return patterns


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


@dataclass(frozen=True)
class Reading:
    """One way in which an engine reads quantized files, and what it takes in that way."""

    how: str
    """Empty: a GPTQ file as it is; else what to do for it."""
    bits: frozenset[int]
    asymmetric: bool
    group_sizes: frozenset[int] | None
    """None: all."""
    act_order: bool = False
    seen: bool = False
    """True: tests/clients runs it; False: read from the engine's source code."""

    def refusal(self, layer: ServedLayer) -> str | None:
        """Returns why a layer cannot be read in this way; None if it can."""
        if layer.bits not in self.bits:
            known = ", ".join(map(str, sorted(self.bits)))
            return f"its kernels take {known} bits, not {layer.bits}"
        if not layer.sym and not self.asymmetric:
            return "it takes symmetric weights only, these are asymmetric"
        if layer.desc_act and not self.act_order:
            return "it takes no act-order files (desc_act)"
        if self.group_sizes is not None and layer.group_size not in self.group_sizes:
            sizes = ", ".join(str(size) for size in sorted(self.group_sizes) if size > 0)
            return f"it has no kernel for groups of {layer.group_size} ({sizes} or -1)"
        return None


@dataclass(frozen=True)
class Engine:
    """An inference engine and the ways in which it reads quantized files; the first is the usual one."""

    version: str
    """Version that the table was checked with."""
    readings: tuple[Reading, ...]
    device: str = ""


HUMMING, CONVERTED = (
    "with --quantization humming",
    "after `roundwise convert --to compressed-tensors`",
)
_COMMON_GROUPS = frozenset((-1, 32, 64, 128))
_ALL_BITS = frozenset(range(2, 9))
#: GPUs from SM75 on; the output head is not read quantized.
_HUMMING = Reading(HUMMING, frozenset(range(1, 9)), True, None)

#: Engine -> what it reads. Versions of November 2026; rows that are not `seen` are from its source code.
ENGINES: dict[str, Engine] = {
    "vLLM, CPU": Engine(
        "0.32.0",
        (
            Reading("", frozenset([4]), False, _COMMON_GROUPS, seen=True),
            Reading(CONVERTED, frozenset([4]), True, _COMMON_GROUPS),
        ),
        "cpu",
    ),
    "vLLM, GPU (Marlin)": Engine(
        "0.33",
        (
            Reading("", frozenset([4, 8]), False, _COMMON_GROUPS),
            _HUMMING,
            Reading(CONVERTED, _ALL_BITS, True, _COMMON_GROUPS),
        ),
        "gpu",
    ),
    "SGLang": Engine(
        "0.5.23",
        (
            Reading("", frozenset([4, 8]), False, _COMMON_GROUPS),
            _HUMMING,
            Reading(CONVERTED, frozenset([4, 8]), True, _COMMON_GROUPS),
        ),
        "gpu",
    ),
    "ExLlamaV2": Engine("0.3.2", (Reading("", frozenset([4]), True, None, act_order=True),)),
    "GPTQModel": Engine(
        "7.7.0", (Reading("", frozenset([2, 3, 4, 8]), True, None, act_order=True, seen=True),)
    ),
    "transformers with roundwise": Engine(
        "5.23", (Reading("", frozenset([2, 3, 4, 8]), True, None, act_order=True, seen=True),)
    ),
}


def vllm_refusal(layer: ServedLayer, *, gpu: bool) -> str | None:
    """Returns why vLLM refuses a layer of a GPTQ file; None if it serves it.

    Args:
        layer: settings of the layer.
        gpu: vLLM runs on a GPU.
    """
    return _refusal("vLLM, GPU (Marlin)" if gpu else "vLLM, CPU", layer)


def _refusal(name: str, layer: ServedLayer) -> str | None:
    """Returns why an engine refuses a layer of a GPTQ file, and how it takes it after all."""
    engine = ENGINES[name]
    reason = engine.readings[0].refusal(layer)
    if reason is not None:
        others = [other.how for other in engine.readings[1:] if other.refusal(layer) is None]
        return f"{reason}; it takes them {' or '.join(others)}" if others else reason
    if engine.device:
        return _fusing_refusal(layer, gpu=engine.device == "gpu")
    if name == "GPTQModel":
        return _gptqmodel_refusal(layer)
    return None


def _fusing_refusal(layer: ServedLayer, *, gpu: bool) -> str | None:
    """Returns why vLLM and SGLang cannot fuse a layer, or serve it as an expert; None if they can."""
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


def _gptqmodel_refusal(layer: ServedLayer) -> str | None:
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
    return {
        name: next((reason for layer in distinct if (reason := _refusal(name, layer))), None)
        for name in ENGINES
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
