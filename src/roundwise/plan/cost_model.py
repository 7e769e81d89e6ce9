"""What a run will take, from shapes alone: memory by what it holds, time by what it computes.

Every term names something that the code really keeps; nothing is fitted to a total. Times are products
over what this machine multiplies in a short trial, with the share of it that each phase reaches.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.linalg import matmul
from roundwise.core.solver import workspace
from roundwise.forward.output_gradients import tokens_at_a_time
from roundwise.model.blocks import Block, weight_of
from roundwise.model.moe import ROLES
from roundwise.model.streamed import StreamedModel
from roundwise.system.device import synchronize
from roundwise.system.half_matmul import cpu_half_matmul

#: float32 matrices of the solver's workspace that solving a part of the rows holds at a time.
SOLVING, REFINING = 8, 14
#: Share of the machine's matrix products that each phase reaches (docs/performance.md).
EFFICIENCY = {
    "forward": 0.72, "hessian": 0.77, "drift": 0.7, "factor": 0.4, "solve": 0.45, "refine": 0.3,
    "survey": 0.5, "gradients": 0.5,
}  # fmt: skip
#: Group sizes that a survey tries beside the one asked for, the tokens it plays a block with, about, and
#: units of a block that may differ (all experts are one).
OPTION_GROUPS, OPTION_TOKENS, MOST_UNITS = (32, 128), 2048, 8
#: Side of the trial's matrices and its seconds.
TRIAL, ACCELERATED_TRIAL, SECONDS = 1024, 8192, 0.5


@dataclass(frozen=True)
class LinearShape:
    """A quantized linear of the largest block."""

    rows: int
    columns: int
    part: float = 1.0
    """Of all tokens, as many pass it in the model: an expert sees but few."""

    @property
    def entries(self) -> int:
        """Of its weight."""
        return self.rows * self.columns


@dataclass(frozen=True)
class BlockShapes:
    """What the forecast is made from."""

    linears: list[LinearShape]
    inputs: list[LinearShape]
    """One linear for each input that is summed up: what q, k and v share counts once."""
    block_bytes: int
    hidden: int
    itemsize: int
    blocks: int
    device: torch.device
    """That computes."""

    @property
    def widest(self) -> int:
        """Largest in_features."""
        return max(linear.columns for linear in self.inputs)


def shapes_of(streamed: StreamedModel, config: QuantizeConfig) -> list[BlockShapes]:
    """Shapes of a model's largest block, and of its head if that is quantized."""
    sizes = [
        sum(info.nbytes for info in streamed.block_tensors(index).values())
        for index in range(len(streamed.blocks))
    ]
    text = streamed.model.config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None)
    found = []
    for is_head in (False, True):
        indexes = [i for i, block in enumerate(streamed.blocks) if block.is_head is is_head]
        index = max(indexes, key=sizes.__getitem__, default=None)
        if index is None:
            continue
        linears, inputs = _linears(streamed.blocks[index], config, chosen)
        if linears:
            found.append(
                BlockShapes(
                    linears, inputs, sizes[index], int(text.hidden_size),
                    streamed.dtype.itemsize, len(indexes), streamed.device,
                )
            )  # fmt: skip
    return found


def _linears(
    block: Block, config: QuantizeConfig, chosen: int | None
) -> tuple[list[LinearShape], list[LinearShape]]:
    """All linears, and those whose inputs are summed up; an expert's with the tokens that count.

    Neighbours in one module with equal in_features most often share their input.
    """
    parts = {
        f"{path}.": min(1.0, (chosen or experts.count) / experts.count)
        for path, experts in block.experts.items()
    }
    linears = []
    found: dict[tuple[str, int], LinearShape] = {}
    for name, linear in block.linears.items():
        if config.for_module(name) is not None:
            rows, columns = (int(size) for size in weight_of(linear).shape)
            experts = next((path for path in parts if name.startswith(path)), None)
            parent = name.rpartition(".")[0]
            # What writes back to the stream reads an input of its own.
            own = name if rows < columns or name.endswith(("o_proj", "out_proj")) else parent
            if experts is not None:
                role = ROLES[name.rpartition(".")[2]]
                shared = experts if config.experts == "all" else parent
                own = name if role == "down" else shared
            part = parts[experts] if experts is not None else 1.0
            linears.append(LinearShape(rows, columns, part))
            found[own, columns] = LinearShape(
                rows, columns, 1.0 if config.experts == "all" else part
            )
    return linears, [*found.values()]


def memory(
    shapes: BlockShapes, config: QuantizeConfig, *, tokens: int, batch: int, mode: str, offloaded: bool,
    keeps_freed: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Bytes that a run holds at its peak beyond the libraries, by what they are for.

    Args:
        shapes: of the model.
        config: settings; a run with a reference plays the original model too.
        tokens: of calibration, all batches together; 0: none is needed.
        batch: tokens of the largest batch.
        mode: true_sequential or block.
        parked: batches that wait do so elsewhere, all of them while a layer is solved.
        keeps: freed memory is kept for what comes next.
    """
    coupled = config.needs_gradients

    def squares(linear: LinearShape) -> int:
        """Values of the matrices that solving a linear takes: H, B, the factors of both, errors."""
        rows, columns = linear.rows, linear.columns
        return 2 * columns**2 + (2 * rows**2 + linear.entries if coupled else 0)

    largest = max(shapes.linears, key=lambda linear: (squares(linear), linear.entries))
    size, hidden, wide, entries = shapes.itemsize, shapes.hidden, shapes.widest, largest.entries
    found = {"block": shapes.block_bytes}
    if not tokens:
        return found | {"rounding": 16 * entries}
    # In front of the last group, all others have their new weights beside the mapped old ones.
    others = sum(linear.entries for linear in shapes.linears) - entries
    found["quantized weights"] = size * others
    found["paused activations"] = (
        (batch if offloaded else tokens) * _held(shapes, config, mode) * size
    )
    # The forward of one batch: gate, up and their product, or the like.
    found["forward of a batch"] = 3 * batch * max(wide, 4 * hidden) * size
    # In true_sequential mode one input is summed up at a time, in block mode all of a block are.
    summed = [largest] if mode == "true_sequential" else shapes.inputs
    found["hessian"] = 4 * sum(linear.columns**2 for linear in summed)
    # Only on the CPU is a matrix factored where it stands.
    found["factor"] = 4 * largest.columns**2 * (1 if shapes.device.type == "cpu" else 2)
    if coupled:
        found["coupling"] = 4 * (2 * largest.rows**2 + entries)
    if config.needs_reference:
        found["drift"] = 4 * sum(min(x.rows, x.columns) * x.columns for x in summed)
    found["solver"] = 4 * workspace(shapes.device) * (REFINING if config.refine else SOLVING)
    found["codes and weights of a layer"] = (2 + size + 4) * entries
    if keeps_freed:
        holes = {"forward of a batch": 1.5, "paused activations": 0.1}  # as measured
        found["freed and kept"] = int(sum(found[name] * part for name, part in holes.items()))
    if offloaded:
        playing = ("paused activations", "forward of a batch")
        solving = ("factor", "coupling", "solver", "codes and weights of a layer")
        least = min(playing, solving, key=lambda names: sum(found.get(n, 0) for n in names))
        found = {name: part for name, part in found.items() if name not in least}
    return found


def gradients(
    shapes: BlockShapes, config: QuantizeConfig, *, tokens: int, vocabulary: int
) -> dict[str, int]:
    """Bytes held while the gradients are measured, beforehand, as `memory`; nothing if none are."""
    if not config.needs_gradients or not tokens:
        return {}
    size, hidden = shapes.itemsize, shapes.hidden
    part = min(tokens, config.output_tokens, tokens_at_a_time(vocabulary))
    outputs = sum(round(linear.rows * linear.part) for linear in shapes.linears)
    return {
        "block": shapes.block_bytes,
        "head": size * hidden * vocabulary,
        "logits and their gradient": 2 * size * part * vocabulary,
        "blocks' inputs": size * part * hidden * (shapes.blocks + 2),
        # Of one block, on the way back: what it has computed, and the gradients that are kept.
        "gradients": 3 * size * part * outputs,
    }


def disk(
    shapes: BlockShapes, config: QuantizeConfig, *, tokens: int, mode: str, offloaded: bool
) -> dict[str, int]:
    """Bytes that a run keeps in its output folder beside the result, at most, by what they are for."""
    size, streams = shapes.itemsize, 2 if config.needs_reference else 1
    # What a block has returned is kept until the next one has.
    found = {"activations": 2 * streams * tokens * shapes.hidden * size}
    if offloaded and shapes.device.type == "cpu":
        found["waiting batches"] = tokens * _held(shapes, config, mode) * size
    if config.needs_gradients:
        outputs = sum(round(linear.rows * linear.part) for linear in shapes.linears)
        kept = min(tokens, config.output_tokens) * outputs * size
        found["gradients"] = shapes.blocks * kept
    return found


def _held(shapes: BlockShapes, config: QuantizeConfig, mode: str) -> int:
    """Values that a batch, and its like in the original model, hold for each token while they wait."""
    if mode != "true_sequential":
        return shapes.hidden * (2 if config.needs_reference else 1)
    own = 2 * shapes.hidden + shapes.widest
    # The original is behind the block by then: what the block was given and returns, and what the
    # last linear was added to and returned.
    return own + (min(own, 4 * shapes.hidden) if config.needs_reference else 0)


def work(
    shapes: BlockShapes, config: QuantizeConfig, *, tokens: int, mode: str
) -> dict[str, float]:
    """Floating-point operations of each phase, all blocks together."""
    weights = sum(linear.entries * linear.part for linear in shapes.linears)
    streams = 2 if config.needs_reference else 1
    passes = 2 if mode == "block" else 1
    products = sum(linear.entries * linear.columns for linear in shapes.linears)
    squares = sum(linear.columns**2 * linear.part for linear in shapes.inputs)
    found = {
        "forward": 2.0 * weights * tokens * streams * passes,
        "hessian": tokens * squares,
        "factor": sum(linear.columns**3 for linear in shapes.inputs) / 3,
        "solve": float(products) * (5 if config.needs_reference else 2),
        "refine": float(products) * 6 * config.refine,
    }
    if config.needs_reference:
        moments = sum(min(x.rows, x.columns) * x.columns * x.part for x in shapes.inputs)
        found["drift"] = 2.0 * tokens * moments + 2.0 * products
    if config.needs_gradients:
        rows = sum(linear.rows**2 * linear.part for linear in shapes.linears)
        # Forth, and on the way back once more and back; then the gradients' products.
        found["gradients"] = min(config.output_tokens, tokens) * (6.0 * weights + rows)
        found["factor"] += sum(linear.rows**3 for linear in shapes.linears) / 3
        found["solve"] += sum(linear.rows**2 * linear.columns for linear in shapes.linears)
    return {phase: shapes.blocks * flop for phase, flop in found.items() if flop}


def survey(shapes: BlockShapes, config: QuantizeConfig, *, tokens: int) -> dict[str, float]:
    """Operations of choosing widths: one pass, then every option solved and played with a few tokens."""
    weights = sum(linear.entries * linear.part for linear in shapes.linears)
    products = sum(linear.entries * linear.columns for linear in shapes.linears)
    squares = sum(linear.columns**2 * linear.part for linear in shapes.inputs)
    factors = sum(linear.columns**3 for linear in shapes.inputs) / 3
    options = len(config.target_widths) * len({config.group_size, *OPTION_GROUPS})
    played = options * min(len(shapes.inputs), MOST_UNITS) * 2.0 * weights * OPTION_TOKENS
    each = options * (factors + 2.0 * products)
    return {"survey": shapes.blocks * (2.0 * weights * tokens + tokens * squares + played + each)}


def rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of products of this dtype on a device, in a trial of half a second."""
    side = TRIAL if device.type == "cpu" else ACCELERATED_TRIAL
    A, B = (torch.randn(side, side).to(device, dtype) for _ in range(2))
    with cpu_half_matmul():  # as the run will multiply
        matmul(A, B)
        synchronize(device)
        begun, count = time.perf_counter(), 0
        while (spent := time.perf_counter() - begun) < SECONDS:
            matmul(A, B)
            synchronize(device)
            count += 1
    return 2 * side**3 * count / spent


def seconds(flops: dict[str, float], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Time of each phase on a device of this machine."""
    rates = {"float32": rate(torch.float32, device)}
    rates["model"] = rates["float32"] if dtype == torch.float32 else rate(dtype, device)
    kind = dict.fromkeys(("forward", "hessian", "drift", "survey", "gradients"), "model")
    return {
        phase: flop / (EFFICIENCY[phase] * rates[kind.get(phase, "float32")])
        for phase, flop in flops.items()
    }
