"""What a run needs: memory where it computes, and room on the disk. Nothing is loaded.

`plan` says it, `quantize` goes by it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from roundwise.checkpoint.gptq_format import packed_bytes
from roundwise.config import Mode, QuantizeConfig
from roundwise.errors import OutputError
from roundwise.model.blocks import weight_of
from roundwise.model.streamed import StreamedModel
from roundwise.plan import cost_model
from roundwise.system.device import HOST
from roundwise.system.memory import available_memory, format_size, resident_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """What a run holds at its peak, where it computes."""

    mode: Mode
    device: str
    offloaded: bool
    """Batches wait elsewhere, for want of room: in a file, or on an accelerator's host."""
    keeps_freed: bool
    """Freed memory is kept for what comes next: a fifth faster, with holes that count in the peak."""
    peak_bytes: int
    parts: dict[str, int]
    """Bytes by what they are for; "libraries" is what this process holds without a model,
    where the CPU computes."""
    budget: int

    @property
    def reuses_freed(self) -> bool:
        """Freed memory is kept, if only until a batch goes to the file where it waits."""
        return self.keeps_freed or (self.offloaded and self.device == "cpu")

    @property
    def fits(self) -> bool:
        """The peak is within the budget."""
        return self.peak_bytes <= self.budget


def plan_memory(
    streamed: StreamedModel,
    config: QuantizeConfig,
    *,
    tokens: int,
    batch: int,
    mode: Mode | None = None,
    budget: int | None = None,
    sharing: int = 1,
) -> MemoryPlan:
    """The mode that fits and the peak it leads to: true_sequential if it fits, else block.

    Where nothing fits, what needs least. On the CPU batches wait in a file rather than in memory where
    that saves true_sequential, and freed memory is kept where there is room for that; on an accelerator
    batches wait on the host where not even block fits.

    Args:
        skeleton: of the model.
        config: settings.
        tokens: of calibration; 0 for rounding to nearest.
        batch: tokens of one forward.
        mode: asked for by the user; None: what fits.
        budget: bytes; None: nine tenths of what is available, and what this process holds already.
        sharing: how many processes share what is available.
    """
    shapes, device = cost_model.shapes_of(streamed, config), streamed.device
    held = resident_bytes() if device == HOST else 0
    vocabulary = int(streamed.model.config.get_text_config().vocab_size or 0)
    budget = budget or int(0.9 * available_memory(device)) // sharing + held
    modes: list[Mode] = [mode] if mode else ["true_sequential", "block"]
    choices = [(each, False) for each in modes]
    if device == HOST and tokens and "true_sequential" in modes:
        choices.insert(1, ("true_sequential", True))
    elif device != HOST and "block" in modes:
        choices.append(("block", True))
    tried: list[MemoryPlan] = []
    kept = (True, False) if device == HOST and tokens else (False,)
    for (choice, offloaded), keeps_freed in product(choices, kept):
        peaks = [
            cost_model.memory(
                each, config, tokens=tokens, batch=batch, mode=choice, offloaded=offloaded, keeps_freed=keeps_freed
            )
            for each in shapes
        ]  # fmt: skip
        peaks += [
            cost_model.gradients(each, config, tokens=tokens, vocabulary=vocabulary)
            for each in shapes[:1]
        ]
        largest = max(peaks, key=lambda parts: sum(parts.values()), default={})
        parts = {**({"libraries": held} if held else {}), **largest}
        peak = sum(parts.values())
        tried.append(MemoryPlan(choice, str(device), offloaded, keeps_freed, peak, parts, budget))
        if tried[-1].fits:
            return tried[-1]
    return min(tried, key=lambda memory: memory.peak_bytes)


def plan_disk(
    streamed: StreamedModel, config: QuantizeConfig, memory: MemoryPlan, *, tokens: int
) -> dict[str, int]:
    """Bytes that a run needs in its output folder, by what they are for: the result, and beside it."""
    found = {"result": bytes_after(streamed, config, set())[0]}
    for shapes in cost_model.shapes_of(streamed, config)[:1] if tokens else []:
        found |= cost_model.disk(
            shapes, config, tokens=tokens, mode=memory.mode, offloaded=memory.offloaded
        )
    return found


def bytes_after(
    streamed: StreamedModel, config: QuantizeConfig, chosen: set[str]
) -> tuple[int, int]:
    """Bytes of all tensors of the result, and of its quantized layers alone.

    Those of `chosen` layers are what the target gives them.
    """
    after = sum(info.nbytes for info in streamed.checkpoint.tensors.values())
    stored = 0
    for block in streamed.blocks:
        for name, linear in block.linears.items():
            settings = config.for_module(name)
            if settings is not None:
                source = streamed.checkpoint.tensors[streamed.checkpoint_name_of[f"{name}.weight"]]
                rows, columns = weight_of(linear).shape
                packed = packed_bytes(rows, columns, settings)
                if name in chosen and config.target_bpw:
                    packed = round(config.target_bpw * rows * columns / 8)
                after += packed - source.nbytes
                stored += packed
    return after, stored


def over_budget_message(memory: MemoryPlan) -> str:
    """That it does not fit, and what would help most."""
    most = max((name for name in memory.parts if name != "libraries"), key=memory.parts.__getitem__)
    advice = {
        "paused activations": "a smaller --batch-size"
        if memory.offloaded
        else "fewer --samples, a shorter --seq-len"
        + (
            ", or --mode true_sequential"
            if memory.mode == "block" and memory.device == "cpu"
            else ""
        ),
        "logits and their gradient": "--output-tokens 0, which needs none",
        "forward of a batch": "a smaller --batch-size",
    }.get(most, "--recipe textbook" if "drift" in memory.parts else "more memory")
    return (
        f"the run is expected to need {memory.peak_bytes / 1e9:.1f} GB on {memory.device}, more than "
        f"the {memory.budget / 1e9:.1f} GB there are: most of it is {most} "
        f"({memory.parts[most] / 1e9:.1f} GB); what helps: {advice}"
    )


def check_disk_space(out: Path, parts: dict[str, int]) -> None:
    """There is room for what the run will write, as far as that can be told.

    Raises:
        OutputError: there is not.
    """
    free, needed = shutil.disk_usage(out).free, sum(parts.values())
    if needed > free:
        listed = ", ".join(f"{name} {format_size(part)}" for name, part in parts.items())
        less = "; --output-tokens 0 needs no gradients" if "gradients" in parts else ""
        raise OutputError(
            f"{out} has room for {format_size(free)}, the run needs {format_size(needed)} ({listed}){less}"
        )
