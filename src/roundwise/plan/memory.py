"""Chooses the mode of a run by memory, and estimates its peak memory and disk space; loads nothing.

`plan` prints it, `quantize` follows it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from roundwise.checkpoint.formats import packed_bytes
from roundwise.checkpoint.sharding import divide_into_shards
from roundwise.config import Mode, QuantizeConfig
from roundwise.errors import OutputError
from roundwise.model.blocks import Block, weight_of
from roundwise.model.build import embedding_shape
from roundwise.model.expert_weights import unquantized_tensors
from roundwise.model.streamed import StreamedModel
from roundwise.plan import cost_model
from roundwise.system.device import HOST
from roundwise.system.memory import available_memory, format_size, resident_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Mode of a run, and its peak memory on the device that computes."""

    mode: Mode
    device: str
    offloaded: bool
    """Paused batches are offloaded for lack of memory: to a file, or to an accelerator's host."""
    keeps_freed: bool
    """Freed memory is kept for the next tensors: a fifth faster, but holes add to the peak."""
    peak_bytes: int
    parts: dict[str, int]
    """Bytes by purpose; on the CPU, "libraries" is what this process holds before the run."""
    budget: int

    @property
    def reuses_freed(self) -> bool:
        """True if freed memory is kept, even if only until a batch is offloaded to a file."""
        return self.keeps_freed or (self.offloaded and self.device == "cpu")

    @property
    def fits(self) -> bool:
        """True if the peak is within the budget."""
        return self.peak_bytes <= self.budget

    def as_dict(self) -> dict[str, Any]:
        """Returns plain JSON values, under the keys of `roundwise plan --json`."""
        return {
            "mode": self.mode, "device": self.device, "parked": self.offloaded,
            "keeps": self.keeps_freed, "peak_bytes": self.peak_bytes, "parts": self.parts,
            "budget": self.budget, "fits": self.fits,
        }  # fmt: skip


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
    """Returns the first plan that fits into memory, or the smallest one if none fits.

    Mode true_sequential is tried first, then block. On the CPU, freed memory is kept if there is room,
    and batches are offloaded to a file if that makes true_sequential fit. On an accelerator, batches are
    offloaded to the host if not even block fits.

    Args:
        streamed: the model.
        config: settings.
        tokens: calibration tokens of all batches together; 0 for rounding to nearest.
        batch: tokens of the largest batch.
        mode: mode that the user asked for; None: the one that fits.
        budget: bytes; None: nine tenths of the available memory, plus what this process already holds.
        sharing: number of processes that share the available memory.
    """
    shapes, device = cost_model.block_shapes(streamed, config), streamed.device
    held = resident_bytes() if device == HOST else 0
    vocabulary = embedding_shape(streamed.model)[0]
    budget = budget or int(0.9 * available_memory(device)) // sharing + held
    keep_choices = (True, False) if device == HOST and tokens else (False,)
    tried: list[MemoryPlan] = []
    for (choice, offloaded), keeps_freed in product(_choices(mode, device, tokens), keep_choices):
        peaks = [
            cost_model.memory_bytes(
                each, config, tokens=tokens, batch=batch, mode=choice, offloaded=offloaded,
                keeps_freed=keeps_freed,
            )
            for each in shapes
        ]  # fmt: skip
        peaks += [
            cost_model.gradient_bytes(each, config, tokens=tokens, vocabulary=vocabulary)
            for each in shapes[:1]
        ]
        largest = max(peaks, key=lambda parts: sum(parts.values()), default={})
        parts = {**({"libraries": held} if held else {}), **largest}
        peak = sum(parts.values())
        tried.append(MemoryPlan(choice, str(device), offloaded, keeps_freed, peak, parts, budget))
        if tried[-1].fits:
            return tried[-1]
    return min(tried, key=lambda memory: memory.peak_bytes)


def _choices(mode: Mode | None, device: torch.device, tokens: int) -> list[tuple[Mode, bool]]:
    """Returns the modes to try in order, each without or with offloaded batches."""
    modes: list[Mode] = [mode] if mode else ["true_sequential", "block"]
    choices = [(each, False) for each in modes]
    if device == HOST and tokens and "true_sequential" in modes:
        choices.insert(1, ("true_sequential", True))
    elif device != HOST and "block" in modes:
        choices.append(("block", True))
    return choices


def plan_disk(
    streamed: StreamedModel, config: QuantizeConfig, memory: MemoryPlan, *, tokens: int
) -> dict[str, int]:
    """Returns the bytes that a run needs in its output folder, by purpose.

    Args:
        streamed: the model.
        config: settings.
        memory: the memory plan of the run.
        tokens: calibration tokens of all batches together.
    """
    parts = {"result": bytes_after(streamed, config, set())[0]}
    for shapes in cost_model.block_shapes(streamed, config)[:1] if tokens else []:
        parts |= cost_model.disk_bytes(
            shapes, config, tokens=tokens, mode=memory.mode, offloaded=memory.offloaded
        )
    # Activations and gradients are gone when shards are made.
    joining = _joining_bytes(streamed, config) - (sum(parts.values()) - parts["result"])
    return parts | ({"joining": joining} if joining > 0 else {})


def _joining_bytes(streamed: StreamedModel, config: QuantizeConfig) -> int:
    """Returns the bytes beside the result while shards are made of blocks: those there twice.

    What later shards take of the tensors outside the blocks is still free.
    """
    blocks = [
        sum(info.nbytes for info in streamed.block_tensors(index).values())
        + _quantized_bytes(streamed, block, config, set())[0]
        for index, block in enumerate(streamed.blocks)
    ]
    others = unquantized_tensors(streamed.other_tensors(), set()).values()
    sizes: list[int] = [*blocks, *(info.nbytes for info in others)]
    return max(
        sum(blocks[shard.start : shard.stop]) - sum(sizes[max(shard.stop, len(blocks)) :])
        for shard in divide_into_shards(sizes).values()
    )


def bytes_after(
    streamed: StreamedModel, config: QuantizeConfig, chosen: set[str]
) -> tuple[int, int]:
    """Returns the bytes of all tensors of the result, and of its quantized layers alone.

    Args:
        streamed: the model.
        config: settings.
        chosen: layers whose width is still to be chosen; they count as `config.target_bpw` bits.
    """
    after = sum(info.nbytes for info in streamed.checkpoint.tensors.values())
    stored = 0
    for block in streamed.blocks:
        more, packed = _quantized_bytes(streamed, block, config, chosen)
        after += more
        stored += packed
    return after, stored


def _quantized_bytes(
    streamed: StreamedModel, block: Block, config: QuantizeConfig, chosen: set[str]
) -> tuple[int, int]:
    """Returns by how many bytes a block grows when it is quantized, and those of its packed layers."""
    more = stored = 0
    for name, linear in block.linears.items():
        settings = config.for_module(name)
        if settings is not None:
            source = streamed.checkpoint.tensors[streamed.checkpoint_name_of[f"{name}.weight"]]
            rows, columns = weight_of(linear).shape
            packed = packed_bytes(rows, columns, settings)
            if name in chosen and config.target_bpw:
                packed = round(config.target_bpw * rows * columns / 8)
            more += packed - source.nbytes
            stored += packed
    return more, stored


def over_budget_message(memory: MemoryPlan) -> str:
    """Returns the message that a run does not fit into memory, and what would help most."""
    largest = max(
        (name for name in memory.parts if name != "libraries"), key=memory.parts.__getitem__
    )
    fewer_tokens = "fewer --samples, a shorter --seq-len"
    if memory.mode == "block" and memory.device == "cpu":
        fewer_tokens += ", or --mode true_sequential"
    advice = {
        "paused activations": "a smaller --batch-size" if memory.offloaded else fewer_tokens,
        "logits and their gradient": "--output-tokens 0, which needs none",
        "forward of a batch": "a smaller --batch-size",
    }.get(largest, "--recipe textbook" if "drift" in memory.parts else "more memory")
    return (
        f"the run is expected to need {memory.peak_bytes / 1e9:.1f} GB on {memory.device}, more than "
        f"the {memory.budget / 1e9:.1f} GB available: the largest part is {largest} "
        f"({memory.parts[largest] / 1e9:.1f} GB); try {advice}"
    )


def check_disk_space(out: Path, parts: dict[str, int]) -> None:
    """Checks that the disk has room for what a run is estimated to write.

    Args:
        out: output folder.
        parts: bytes by purpose, from `plan_disk`.

    Raises:
        OutputError: there is too little room.
    """
    free, needed = shutil.disk_usage(out).free, sum(parts.values())
    if needed > free:
        listed = ", ".join(f"{name} {format_size(part)}" for name, part in parts.items())
        less = "; --output-tokens 0 needs no gradients" if "gradients" in parts else ""
        raise OutputError(
            f"{out} has room for {format_size(free)}, but the run needs {format_size(needed)} "
            f"({listed}){less}"
        )
