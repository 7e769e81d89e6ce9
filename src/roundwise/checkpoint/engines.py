"""Rules of the inference engines: which checkpoints each serves, and which layers it fuses.

Engines that fuse layers (q, k and v into qkv_proj, for example) look the settings up under the fused
name, so a quantization config needs rules for those names too.

`ENGINES` is the table: what each engine reads, in which version, and whether tests/clients has seen it
or it was read from the engine's source code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from roundwise.config import QuantizeConfig
from roundwise.core.quantized_weight import WIDTHS

#: vLLM's fused layers -> the layers that each is made of.
PACKED_MODULES_MAPPING = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

#: Families whose original files have fused experts, and whose publishers' own GPTQ files, with one layer
#: per expert, are read by vLLM.
READ_ONE_BY_ONE = ("qwen3_5_moe", "gemma4")
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


def conflicting_packed_modules(settings: Callable[[str], Any], names: Iterable[str]) -> list[str]:
    """Returns the fused names whose members have different settings.

    Args:
        settings: returns the settings of a layer.
        names: all quantized layers.
    """
    return [
        packed
        for packed, members in packed_modules(names)
        if any(settings(member) != settings(members[0]) for member in members)
    ]


@dataclass(frozen=True)
class ServedLayer:
    """Settings of a quantized layer, as far as engines depend on them."""

    bits: int
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    format: str = "gptq"
    """gptq, gptq_v2 or compressed-tensors."""
    expert_naming: ExpertNaming | None = None
    """Naming of the experts in the checkpoint, if the layer belongs to one."""
    conflicting_module: str | None = None
    """Name of a fused layer that this layer belongs to and whose members have different settings."""
    is_head: bool = False
    is_conv1d: bool = False


@dataclass(frozen=True)
class Reading:
    """One way in which an engine reads quantized files, and what it takes in that way."""

    bits: frozenset[int]
    asymmetric: bool
    group_sizes: frozenset[int] | None
    """None: all."""
    format: Literal["gptq", "compressed-tensors", "gguf"] = "gptq"
    """Format of the files; gptq: of either version."""
    option: str = ""
    """Option that the engine needs for it."""
    act_order: bool = False
    head: bool = True
    """A quantized output head is read."""
    seen: bool = False
    """True: tests/clients runs it; False: read from the engine's source code."""

    def takes_format(self, layer: ServedLayer) -> bool:
        """Tells whether a layer is in the format of this reading."""
        return self.format == layer.format.removesuffix("_v2")

    def refusal(self, layer: ServedLayer) -> str | None:
        """Returns why a layer cannot be read in this way, once it is in the format; None: it can."""
        return next(self._refusals(layer), None)

    def _refusals(self, layer: ServedLayer) -> Iterator[str]:
        """Yields every reason why a layer cannot be read in this way."""
        if layer.bits not in self.bits:
            known = ", ".join(map(str, sorted(self.bits)))
            yield f"its kernels take {known} bits, not {layer.bits}"
        if not layer.sym and not self.asymmetric:
            yield "it takes symmetric weights only, these are asymmetric"
        # One group for all channels is the same group in any order.
        if layer.desc_act and layer.group_size != -1 and not self.act_order:
            yield "it takes no act-order files (desc_act)"
        if self.format == "gguf" and layer.group_size % 32 and layer.group_size != -1:
            yield f"groups of {layer.group_size} do not fill its blocks of 32 weights"
        if self.format == "gguf" and layer.bits == 8 and not layer.sym:
            yield "none of its types holds asymmetric codes of 8 bits exactly"
        if self.group_sizes is not None and layer.group_size not in self.group_sizes:
            sizes = ", ".join(str(size) for size in sorted(self.group_sizes) if size > 0)
            yield f"it has no kernel for groups of {layer.group_size} ({sizes} or -1)"
        if layer.is_conv1d and self.format == "compressed-tensors":
            yield "Conv1D layers cannot be stored as compressed-tensors"
        if layer.is_head and not self.head:
            yield "it reads no quantized output head"

    def way(self, layer: ServedLayer) -> str:
        """Returns what a user must do so that a layer is read in this way."""
        command = "convert --to" if self.format == "gguf" else "--format"
        as_format = "" if self.takes_format(layer) else f"as {command} {self.format}"
        return " ".join(part for part in (as_format, self.option and f"with {self.option}") if part)


@dataclass(frozen=True)
class Engine:
    """An inference engine and the ways in which it reads quantized files; the usual one comes first."""

    version: str
    """Version that the table was checked with."""
    readings: tuple[Reading, ...]
    device: str = ""


HUMMING = "--quantization humming"
_COMMON_GROUPS = frozenset((-1, 32, 64, 128))
_ALL_BITS = frozenset(range(2, 9))
_OURS = frozenset(WIDTHS)
#: GPUs from SM75 on.
_HUMMING = Reading(frozenset(range(1, 9)), True, None, option=HUMMING, head=False)
_GPTQ_MARLIN = Reading(frozenset([4, 8]), False, _COMMON_GROUPS)
VLLM_CPU, VLLM_GPU = "vLLM, CPU", "vLLM, GPU"

#: Engine -> what it reads. Versions of November 2026; rows that are not `seen` are from its source code.
ENGINES: dict[str, Engine] = {
    VLLM_CPU: Engine(
        "0.32.0",
        (
            Reading(frozenset([4]), False, _COMMON_GROUPS, seen=True),
            Reading(frozenset([4]), True, None, "compressed-tensors", seen=True),
        ),
        "cpu",
    ),
    VLLM_GPU: Engine(
        "0.33",
        (_GPTQ_MARLIN, _HUMMING, Reading(_ALL_BITS, True, None, "compressed-tensors")),
        "gpu",
    ),
    "SGLang": Engine(
        "0.5.23",
        (
            _GPTQ_MARLIN,
            _HUMMING,
            Reading(frozenset([4, 8]), True, _COMMON_GROUPS, "compressed-tensors"),
        ),
        "gpu",
    ),
    "llama.cpp": Engine(
        "0.3.36 of its Python package", (Reading(_OURS, True, None, "gguf", seen=True),)
    ),
    "ExLlamaV2": Engine("0.3.2", (Reading(frozenset([4]), True, None, act_order=True),)),
    "GPTQModel": Engine(
        "7.7.0", (Reading(frozenset([2, 3, 4, 8]), True, None, act_order=True, seen=True),)
    ),
    "transformers with roundwise": Engine(
        "5.23",
        (
            Reading(_OURS, True, None, act_order=True, seen=True),
            Reading(_OURS, True, None, "compressed-tensors", act_order=True, seen=True),
        ),
    ),
}


def choose_option(name: str, layers: Iterable[ServedLayer]) -> tuple[str, str | None]:
    """Chooses how an engine reads a checkpoint in the format that it has.

    Args:
        name: name of the engine in `ENGINES`.
        layers: settings of its layers.

    Returns:
        The option that the engine needs, or an empty text; and why it does not serve the checkpoint.
    """
    distinct, first = list(dict.fromkeys(layers)), None
    for reading in ENGINES[name].readings:
        if all(map(reading.takes_format, distinct)):
            reason = _refusal_of_all(name, reading, distinct)
            if reason is None:
                return reading.option, None
            first = first or reason
    return "", first or _WRONG_FORMAT


_WRONG_FORMAT = "it does not read files in this format"


def _refusal_of_all(name: str, reading: Reading, layers: list[ServedLayer]) -> str | None:
    """Returns why an engine cannot read one of some layers in a way; None: it can read all."""
    for layer in layers:
        reason = reading.refusal(layer)
        if reason is None and ENGINES[name].device:
            reason = _fusing_refusal(layer, gpu=ENGINES[name].device == "gpu")
        if reason is None and name == "GPTQModel":
            reason = _gptqmodel_refusal(layer)
        if reason is not None:
            return reason
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


def expert_naming(projection: str, *, fused: bool, family: str = "") -> ExpertNaming:
    """Returns how files name the experts that a projection belongs to.

    Args:
        projection: its name, such as w1 or gate_proj.
        fused: the files of the original model hold all experts in one tensor.
        family: `model_type` of the model.
    """
    if fused and not family.startswith(READ_ONE_BY_ONE):
        return "fused"
    return "w1" if projection in ("w1", "w2", "w3") else "gate_proj"


def served_by(layers: Iterable[ServedLayer]) -> dict[str, str | None]:
    """Returns for each engine why it does not serve a checkpoint with these layers; None if it does.

    The reason ends with the ways in which the engine takes the same layers after all: with an option, or
    in another format.
    """
    distinct = list(dict.fromkeys(layers))
    return {name: _refusal_and_ways(name, distinct) for name in ENGINES}


def _refusal_and_ways(name: str, layers: list[ServedLayer]) -> str | None:
    ways, reason = list[str](), _WRONG_FORMAT
    for reading in ENGINES[name].readings:
        refusal = _refusal_of_all(name, reading, layers)
        way = reading.way(layers[0]) if layers else ""
        if refusal is None and not way:
            return None
        if refusal is None:
            ways.append(way)
        elif not way or reading.format == "gguf":  # the only format of its engine
            reason = refusal
    return f"{reason}; it takes them {' or '.join(ways)}" if ways else reason
