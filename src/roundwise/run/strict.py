"""Issues: what cannot be done as asked, found before work begins or read off the record of each layer.

With `strict` an issue is an error; otherwise it is one of the last lines of a run. Advice (few samples,
a text that repeats itself) is not an issue: there, everything is done as asked. This module computes
nothing; it compares what was asked for with what is there.
"""

from __future__ import annotations

import re

import torch

from roundwise.checkpoint.manifest import LayerRecord
from roundwise.config import Mode, QuantizeConfig
from roundwise.core.backends import cpp, triton
from roundwise.errors import FallbackError, StrictError
from roundwise.model.blocks import Block, weight_of
from roundwise.model.fake_forward import CallTrace
from roundwise.model.streamed import StreamedModel
from roundwise.plan.memory import MemoryPlan, over_budget_message
from roundwise.system.device import HOST

#: Part of the blocks' matrices that may stay dense without a word: routers, small convolutions.
NOT_REPORTED = 0.1
#: Beginnings of the reasons for skipping a linear that are not reported: routers and gates of experts.
EXPECTED = ("a router", "a gate")


def check_run(streamed: StreamedModel, config: QuantizeConfig, calls: CallTrace) -> list[str]:
    """The issues that model, settings and this installation have, whatever the text.

    Args:
        streamed: the model.
        config: settings.
        calls: the layers that the model's forward calls.
    """
    return [
        *_unused_patterns(streamed, config),
        *_skipped_linears(streamed, config),
        *_repeated_calls(calls),
        *_other_weights(streamed, config),
        *_unrotated(streamed, config),
        *_missing_backend(streamed.device),
    ]


def memory_issues(memory: MemoryPlan, requested: Mode | None, sequential: MemoryPlan) -> list[str]:
    """The issues that memory has.

    Args:
        memory: the plan.
        requested: mode that the user asked for; None: none.
        sequential: the plan for mode true_sequential.
    """
    if not memory.fits:
        return [over_budget_message(memory)]
    if requested is None and memory.mode != sequential.mode:
        return [
            f"mode is {memory.mode}: true_sequential is expected to need "
            f"{sequential.peak_bytes / 1e9:.1f} GB, more than the {memory.budget / 1e9:.1f} GB "
            f"available; --mode {memory.mode} asks for it"
        ]
    return []


def layer_issue(layer: LayerRecord) -> str | None:
    """The issue of one layer, without its name; None: it was quantized as asked."""
    if layer.fallback is not None:
        return layer.fallback if layer.relative_error is not None else (
            f"rounded to nearest: {layer.fallback}"
        )  # fmt: skip
    if len(layer.damp_tried) > 1:
        return f"damping raised to {layer.damp_percent:g}: the Hessian was indefinite with less"
    return None


def layer_issues(layers: list[LayerRecord]) -> list[str]:
    """The issues of all layers; one line for all that differ in nothing but numbers in their names."""
    alike: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        text = layer_issue(layer)
        if text:
            # Each expert has a number of its own; a line for each would hide all others.
            pattern = re.sub(r"\.\d+(?=\.)", ".*", layer.name)
            kind = re.sub(r"\d+(?= of \d+ calibration tokens)", "few", text)
            alike.setdefault((pattern, kind), []).append(f"{layer.name}: {text}")
    return [
        lines[0] if len(lines) == 1 else f"{pattern} ({len(lines)} layers): {kind}"
        for (pattern, kind), lines in alike.items()
    ]


def raise_if_strict(issues: list[str] | tuple[str, ...]) -> None:
    """Ends a strict run before it begins.

    Raises:
        StrictError: there are issues.
    """
    if issues:
        raise StrictError(f"not as asked, and --strict was given: {'; '.join(issues)}")


def raise_if_layers_strict(layers: list[LayerRecord]) -> None:
    """Ends a strict run over finished layers.

    Raises:
        FallbackError: one of them has an issue.
    """
    issues = layer_issues(layers)
    if issues:
        more = f" (and {len(issues) - 3} more)" if len(issues) > 3 else ""
        raise FallbackError(
            f"not as asked, and --strict was given: {'; '.join(issues[:3])}{more}; finished blocks are "
            "kept, and the same command without --strict resumes"
        )


def _unused_patterns(streamed: StreamedModel, config: QuantizeConfig) -> list[str]:
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
        "pattern matches them all"
        for pattern in config.dynamic
        if pattern not in used
    ]


def _skipped_linears(streamed: StreamedModel, config: QuantizeConfig) -> list[str]:
    """One line per reason why linears are skipped that the user did not skip; not for routers."""
    reasons: dict[str, list[str]] = {}
    for block in [*streamed.blocks, *streamed.skipped_blocks]:
        for name, reason in block.skipped_linears.items():
            if not reason.startswith(EXPECTED) and config.for_module(name) is not None:
                reasons.setdefault(reason, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} stay dense: {reason}"
        for reason, names in reasons.items()
    ]


def _repeated_calls(calls: CallTrace) -> list[str]:
    """Layers that are called several times: only their first input counts."""
    if not calls.repeated:
        return []
    return [
        f"{calls.repeated[0]} and others are called several times in a forward: they are fitted to "
        "their first input only"
    ]


def _other_weights(streamed: StreamedModel, config: QuantizeConfig) -> list[str]:
    """Weights of the blocks that belong to no linear layer, if they are a large part."""
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
    if part < NOT_REPORTED:
        return []
    largest = max(others, key=others.__getitem__)
    return [
        f"{part:.0%} of the blocks' weights belong to no linear layer and stay dense: "
        f"{largest} ({others[largest]:,}) and similar; --skip asks for it"
    ]


def _matrices(block: Block) -> dict[str, int]:
    """Name -> size, of each matrix of a block that is no linear layer's weight."""
    return {
        name: weight.numel()
        for name, weight in block.module.named_parameters(prefix=block.prefix)
        if weight.ndim > 1
        and name.removesuffix(".weight") not in {**block.linears, **block.skipped_linears}
    }


def _unrotated(streamed: StreamedModel, config: QuantizeConfig) -> list[str]:
    """Draft layers, which a rotation leaves as they are."""
    ignored = streamed.ignored_modules() if config.rotate else []
    return [
        f"{name} is not rotated with the model: if it is a draft layer, it no longer fits"
        for name in ignored[:1]
    ]


def _missing_backend(device: torch.device) -> list[str]:
    if device.type == "cuda" and not triton.available():
        return ["Triton is not installed: the run is slower; pip install triton"]
    status = cpp.load()[1]
    if device != HOST or status.active or "switched off" in status.reason:
        return []
    return [
        f"native code is not used ({status.reason}): the run is slower; {cpp.VARIABLE}=off asks "
        "for that"
    ]
