"""What does not go as asked: found before work begins, or read off the record of each layer.

With `strict` it is an error, otherwise the last lines of a run. Advice (few samples, a text that repeats
itself) is no part of it: there, everything goes as asked. Knows what was asked for and what is recorded;
computes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from roundwise.config import Mode, QuantizeConfig
from roundwise.core.backends import cpp, triton
from roundwise.errors import FallbackError, StrictError
from roundwise.model.blocks import Block, weight_of
from roundwise.model.fake_forward import CallTrace
from roundwise.model.streamed import StreamedModel
from roundwise.plan.memory import MemoryPlan, over_budget_message
from roundwise.run.loop import Progress
from roundwise.system.device import HOST

#: Part of the blocks' matrices that may stay as they are without a word: routers, small convolutions.
UNSAID = 0.1
#: How reasons begin why a linear stays that go without saying: routers and gates of experts.
EXPECTED = ("a router", "a gate")


def check_run(streamed: StreamedModel, config: QuantizeConfig, calls: CallTrace) -> list[str]:
    """What the model and this installation do not allow, whatever the text."""
    return [
        *_idle_patterns(streamed, config),
        *_stay(streamed, config),
        *_repeated(calls),
        *_no_linears(streamed, config),
        *_native(streamed.device),
    ]


def memory_issues(memory: MemoryPlan, asked: Mode | None, sequential: MemoryPlan) -> list[str]:
    """What the memory does not allow.

    Args:
        memory: what is planned.
        asked: mode that the user asked for, if any.
        sequential: what mode true_sequential would hold.
    """
    if not memory.fits:
        return [over_budget_message(memory)]
    if asked is None and memory.mode != sequential.mode:
        return [
            f"mode is {memory.mode}: true_sequential is expected to need "
            f"{sequential.peak_bytes / 1e9:.1f} GB, more than the {memory.budget / 1e9:.1f} GB "
            f"there are; --mode {memory.mode} asks for it"
        ]
    return []


def layer_issue(layer: dict[str, Any]) -> str | None:
    """What the record of one layer says, without the layer's name; None: all as asked."""
    if layer["fallback"] and layer.get("relative_error") is not None:
        return str(layer["fallback"])
    if layer["fallback"]:
        rounded = "rounded to nearest: " if layer["relative_error"] is None else ""
        return f"{rounded}{layer['fallback']}"
    if len(layer["damp_tried"]) > 1:
        return f"damping raised to {layer['damp_percent']:g}: the Hessian was indefinite with less"
    if "damp_losses" in layer and layer["damp_losses"] is None:
        return (
            f"damping {layer['damp_percent']:g}: no token that was held out reached it to choose by"
        )
    return None


def layer_issues(layers: list[dict[str, Any]]) -> list[str]:
    """One line for all layers that differ in nothing but numbers in their names."""
    found: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        text = layer_issue(layer)
        if text:
            # Each expert has a number of its own; a line for each would hide all others.
            alike = re.sub(r"\d+(?= of \d+ calibration tokens)", "few", text)
            pattern = re.sub(r"\.\d+(?=\.)", ".*", layer["name"])
            found.setdefault((pattern, alike), []).append(f"{layer['name']}: {text}")
    return [
        lines[0] if len(lines) == 1 else f"{pattern} ({len(lines)} layers): {alike}"
        for (pattern, alike), lines in found.items()
    ]


def raise_if_strict(lines: list[str]) -> None:
    """Ends a strict run before it begins.

    Raises:
        StrictError: there are any lines.
    """
    if lines:
        raise StrictError(f"not as asked, and --strict was given: {'; '.join(lines)}")


def raise_if_layers_strict(layers: list[dict[str, Any]]) -> None:
    """Ends a strict run over layers that are finished.

    Raises:
        FallbackError: one of them did not go as asked.
    """
    lines = layer_issues(layers)
    if lines:
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise FallbackError(
            f"not as asked, and --strict was given: {'; '.join(lines[:3])}{more}; finished blocks are "
            "kept, and the same command without --strict goes on"
        )


def strict_progress(progress: Callable[[Progress], None] | None) -> Callable[[Progress], None]:
    """`progress` that ends the run at the first layer that does not go as asked."""

    def step(reached: Progress) -> None:
        raise_if_layers_strict([reached.layer] if reached.layer else [])
        if progress is not None:
            progress(reached)

    return step


def _idle_patterns(streamed: StreamedModel, config: QuantizeConfig) -> list[str]:
    """Patterns of --override and --skip that decide about no layer."""
    names = [
        name
        for block in [*streamed.blocks, *streamed.skipped_blocks]
        for name in [*block.linears, *block.skipped_linears, *_matrices(block)]
    ]
    used = {
        next((pattern for pattern in config.dynamic if re.search(pattern, name)), None)
        for name in names
    }
    return [
        f"{pattern!r} (--override, --skip) decides about no layer: no name matches, or an earlier "
        "pattern takes them all"
        for pattern in config.dynamic
        if pattern not in used
    ]


def _stay(streamed: StreamedModel, config: QuantizeConfig) -> list[str]:
    """One line for each reason why linears stay that nobody asked to leave; routers always do."""
    reasons: dict[str, list[str]] = {}
    for block in [*streamed.blocks, *streamed.skipped_blocks]:
        for name, reason in block.skipped_linears.items():
            if not reason.startswith(EXPECTED) and config.for_module(name) is not None:
                reasons.setdefault(reason, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} stay: {reason}"
        for reason, names in reasons.items()
    ]


def _repeated(calls: CallTrace) -> list[str]:
    """Layers that are called several times: only what they read first counts."""
    if not calls.repeated:
        return []
    return [
        f"{calls.repeated[0]} and others are called several times in a forward: they are fitted to "
        "what they read the first time"
    ]


def _no_linears(streamed: StreamedModel, config: QuantizeConfig) -> list[str]:
    """Weights of the blocks that belong to no linear layer, if they are a part worth a word."""
    linears = sum(
        weight_of(linear).numel() for block in streamed.blocks for linear in block.linears.values()
    )
    others = {
        name: size
        for block in streamed.blocks
        for name, size in _matrices(block).items()
        if config.for_module(name) is not None
    }
    part = sum(others.values()) / (linears + sum(others.values()))
    if part < UNSAID:
        return []
    largest = max(others, key=others.__getitem__)
    return [
        f"{part:.0%} of the blocks' weights belong to no linear layer and stay as they are: "
        f"{largest} ({others[largest]:,}) and the like; --skip asks for it"
    ]


def _matrices(block: Block) -> dict[str, int]:
    """Name and size of each matrix of a block that is no linear layer's weight."""
    return {
        name: weight.numel()
        for name, weight in block.module.named_parameters(prefix=block.prefix)
        if weight.ndim > 1
        and name.removesuffix(".weight") not in {**block.linears, **block.skipped_linears}
    }


def _native(device: torch.device) -> list[str]:
    if device.type == "cuda" and not triton.available():
        return ["Triton is not installed: the run is slower; pip install triton"]
    status = cpp.load()[1]
    if device != HOST or status.active or "switched off" in status.reason:
        return []
    return [
        f"native code is not used ({status.reason}): the run is slower; {cpp.VARIABLE}=off asks "
        "for that"
    ]
