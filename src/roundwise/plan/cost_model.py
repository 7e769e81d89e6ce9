"""Cost model of a run, from shapes alone: memory and disk by purpose, operations and seconds by phase.

Every term stands for something that the code really holds, and nothing is fitted to a total. Seconds are
operations divided by the speed that this machine reaches in a short trial, times the measured share of
that speed that each phase reaches.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from roundwise.config import Mode, QuantizeConfig
from roundwise.core.linalg import matmul
from roundwise.core.solver import workspace
from roundwise.forward.output_gradients import tokens_at_a_time
from roundwise.model.blocks import Block, weight_of
from roundwise.model.build import config_size, embedding_shape
from roundwise.model.moe import PROJECTION_ROLES
from roundwise.model.streamed import StreamedModel
from roundwise.system.device import HOST, synchronize
from roundwise.system.half_matmul import cpu_half_matmul

#: float32 matrices of the solver's workspace size that are held while rows are solved: without and with
#: refinement.
SOLVING, REFINING = 8, 14
#: Share of the machine's matmul speed that each phase reaches (docs/performance.md).
EFFICIENCY = {
    "forward": 0.72, "hessian": 0.77, "drift": 0.7, "factor": 0.4, "solve": 0.45, "refine": 0.3,
    "survey": 0.5, "gradients": 0.5,
}  # fmt: skip
#: Phases that multiply in the model's dtype; all others multiply in float32.
MODEL_DTYPE_PHASES = ("forward", "hessian", "drift", "survey", "gradients")
#: Bit allocation: group sizes that are tried besides the configured one; approximate number of tokens
#: that run through a block for each candidate.
CANDIDATE_GROUP_SIZES, CANDIDATE_TOKENS = (32, 128), 2048
#: Most layer groups of a block that get different widths (all experts count as one).
MAX_LAYER_GROUPS = 8
#: Freed memory that the allocator cannot reuse, as a fraction of the activations; measured.
HOLES = {"forward of a batch": 1.5, "paused activations": 0.1}
#: Rows of the trial's square matrices, on the CPU and on an accelerator, and its duration in seconds.
TRIAL_SIZE, ACCELERATOR_TRIAL_SIZE, TRIAL_SECONDS = 1024, 8192, 0.5


@dataclass(frozen=True)
class LinearShape:
    """Shape of a quantized linear layer."""

    rows: int
    columns: int
    token_share: float = 1.0
    """Fraction of all tokens that reach it in the model: small for an expert."""

    @property
    def entries(self) -> int:
        """Number of entries of its weight."""
        return self.rows * self.columns


@dataclass(frozen=True)
class BlockShapes:
    """Shapes of one block and of the model around it: the input of the cost model."""

    linears: list[LinearShape]
    inputs: list[LinearShape]
    """One linear for each Hessian: the shared input of q, k and v counts once."""
    block_bytes: int
    hidden: int
    itemsize: int
    """Bytes of a value in the model's dtype."""
    blocks: int
    """Number of such blocks."""
    device: torch.device
    """Device that computes."""
    experts: int = 0
    """Most experts that one module of a block has."""

    @property
    def widest(self) -> int:
        """Largest in_features."""
        return max(linear.columns for linear in self.inputs)


def block_shapes(streamed: StreamedModel, config: QuantizeConfig) -> list[BlockShapes]:
    """Returns the shapes of a model's largest block and, if it is quantized, of its output head."""
    sizes = [
        sum(info.nbytes for info in streamed.block_tensors(index).values())
        for index in range(len(streamed.blocks))
    ]
    hidden = embedding_shape(streamed.model)[1]
    experts_per_token = config_size(streamed.model, "num_experts_per_tok")
    shapes = []
    for is_head in (False, True):
        indexes = [i for i, block in enumerate(streamed.blocks) if block.is_head is is_head]
        largest = max(indexes, key=sizes.__getitem__, default=None)
        if largest is None:
            continue
        linears, inputs = _linear_shapes(streamed.blocks[largest], config, experts_per_token)
        if linears:
            shapes.append(
                BlockShapes(
                    linears, inputs, sizes[largest], hidden,
                    streamed.dtype.itemsize, len(indexes), streamed.device,
                    max((x.count for x in streamed.blocks[largest].experts.values()), default=0),
                )
            )  # fmt: skip
    return shapes


def _linear_shapes(
    block: Block, config: QuantizeConfig, experts_per_token: int | None
) -> tuple[list[LinearShape], list[LinearShape]]:
    """Returns the shapes of all quantized linears, and one for each input that gets a Hessian.

    Adjacent linears of one module with equal in_features usually share their input.
    """
    token_shares = {
        f"{path}.": min(1.0, (experts_per_token or experts.count) / experts.count)
        for path, experts in block.experts.items()
    }
    linears = []
    inputs: dict[tuple[str, int], LinearShape] = {}
    for name, linear in block.linears.items():
        if config.for_module(name) is not None:
            rows, columns = (int(size) for size in weight_of(linear).shape)
            experts = next((path for path in token_shares if name.startswith(path)), None)
            module = name.rpartition(".")[0]
            # A linear that writes to the residual stream, most often a narrowing one, reads alone.
            reads_alone = rows < columns or name.endswith(("o_proj", "out_proj"))
            input_name = name if reads_alone else module
            if experts is not None:
                is_down = PROJECTION_ROLES[name.rpartition(".")[2]] == "down"
                shared = experts if config.experts == "all" else module
                input_name = name if is_down else shared
            share = token_shares[experts] if experts is not None else 1.0
            linears.append(LinearShape(rows, columns, share))
            counted = 1.0 if config.experts == "all" else share
            inputs[input_name, columns] = LinearShape(rows, columns, counted)
    return linears, [*inputs.values()]


def memory_bytes(
    shapes: BlockShapes, config: QuantizeConfig, *, tokens: int, batch: int, mode: Mode,
    offloaded: bool, keeps_freed: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Returns the bytes that a run holds at its peak besides the libraries, by purpose.

    Args:
        shapes: shapes of the model.
        config: settings; with a reference, the original model runs too.
        tokens: calibration tokens of all batches together; 0: none are needed.
        batch: tokens of the largest batch.
        mode: true_sequential or block.
        offloaded: paused batches are offloaded, all of them while a layer is solved.
        keeps_freed: freed memory is kept for the next tensors.
    """
    largest = max(
        shapes.linears, key=lambda linear: (_solve_values(linear, config), linear.entries)
    )
    size, widest, entries = shapes.itemsize, shapes.widest, largest.entries
    parts = {"block": shapes.block_bytes}
    if not tokens:
        return parts | {"rounding": 16 * entries}
    # Before the last group is solved, all others have new weights besides the mapped old ones.
    others = sum(linear.entries for linear in shapes.linears) - entries
    parts["quantized weights"] = size * others
    in_memory = batch if offloaded else tokens
    parts["paused activations"] = in_memory * _paused_values(shapes, config, mode) * size
    # One batch: gate, up and their product, or similar.
    parts["forward of a batch"] = 3 * batch * max(widest, 4 * shapes.hidden) * size
    # Block mode sums all Hessians at the same time, true_sequential mode one, or those of all experts.
    expert = max((x.columns for x in shapes.linears if x.token_share < 1), default=0)
    if mode != "true_sequential":
        summed = shapes.inputs
    elif expert**2 * shapes.experts > largest.columns**2:
        summed = [LinearShape(expert, expert)] * shapes.experts
    else:
        summed = [largest]
    parts["hessian"] = 4 * sum(linear.columns**2 for linear in summed)
    # Only the CPU factors a matrix in place.
    parts["factor"] = 4 * largest.columns**2 * (1 if shapes.device == HOST else 2)
    if config.needs_gradients:
        parts["output weighting"] = 4 * (2 * largest.rows**2 + entries)
    if config.needs_reference:
        parts["drift"] = 4 * sum(min(x.rows, x.columns) * x.columns for x in summed)
    parts["solver"] = 4 * workspace(shapes.device) * (REFINING if config.refine else SOLVING)
    parts["codes and weights of a layer"] = (2 + size + 4) * entries
    solving = ("factor", "output weighting", "solver", "codes and weights of a layer")
    if config.needs_reference:
        # Sums over the batches that are held out, until their group is solved.
        held, is_freed = parts["hessian"] + parts["drift"], len(summed) == 1 and not offloaded
        during = sum(parts.get(name, 0) for name in solving[1:]) if is_freed else 0
        parts["held-out sums"] = max(0, held - during)
    if keeps_freed:
        parts["allocator cache"] = int(sum(parts[name] * part for name, part in HOLES.items()))
    if offloaded:
        # A batch that runs and a layer that is solved are never in memory at the same time.
        running = ("paused activations", "forward of a batch", "held-out sums")
        smaller = min(running, solving, key=lambda names: sum(parts.get(n, 0) for n in names))
        parts = {name: part for name, part in parts.items() if name not in smaller}
    return parts


def _solve_values(linear: LinearShape, config: QuantizeConfig) -> int:
    """Returns the number of values in H, its factor and, with gradients, B, its factor and errors."""
    rows, columns = linear.rows, linear.columns
    return 2 * columns**2 + (2 * rows**2 + linear.entries if config.needs_gradients else 0)


def _paused_values(shapes: BlockShapes, config: QuantizeConfig, mode: Mode) -> int:
    """Returns the values per token that a paused batch holds, with those of its reference."""
    if mode != "true_sequential":
        return shapes.hidden * (2 if config.needs_reference else 1)
    quantized = 2 * shapes.hidden + shapes.widest
    # The reference has left the block by then. It holds the input and the output of the block, and what
    # the last linear was added to and returned.
    reference = min(quantized, 4 * shapes.hidden)
    return quantized + (reference if config.needs_reference else 0)


def gradient_bytes(
    shapes: BlockShapes, config: QuantizeConfig, *, tokens: int, vocabulary: int
) -> dict[str, int]:
    """Returns the bytes held while gradients are measured, by purpose; empty if none are needed.

    Args:
        shapes: shapes of the model.
        config: settings.
        tokens: calibration tokens of all batches together.
        vocabulary: size of the vocabulary.
    """
    if not config.needs_gradients or not tokens:
        return {}
    size, hidden = shapes.itemsize, shapes.hidden
    part = min(tokens, config.output_tokens, tokens_at_a_time(vocabulary))
    return {
        "block": shapes.block_bytes,
        "head": size * hidden * vocabulary,
        "logits and their gradient": 2 * size * part * vocabulary,
        "block inputs": size * part * hidden * (shapes.blocks + 2),
        # One block in the backward pass: its activations, and the gradients that are kept.
        "gradients": 3 * size * part * _outputs_per_token(shapes),
    }


def _outputs_per_token(shapes: BlockShapes) -> int:
    return sum(round(linear.rows * linear.token_share) for linear in shapes.linears)


def disk_bytes(
    shapes: BlockShapes, config: QuantizeConfig, *, tokens: int, mode: Mode, offloaded: bool
) -> dict[str, int]:
    """Returns the bytes that a run keeps at most in its output folder besides the result, by purpose.

    Args:
        shapes, config, mode, offloaded: as for `memory_bytes`.
        tokens: calibration tokens of all batches together.
    """
    size, models = shapes.itemsize, 2 if config.needs_reference else 1
    # The outputs of a block are kept until those of the next one are written.
    parts = {"activations": 2 * models * tokens * shapes.hidden * size}
    if offloaded and shapes.device == HOST:
        parts["offloaded activations"] = tokens * _paused_values(shapes, config, mode) * size
    if config.needs_gradients:
        gradients = min(tokens, config.output_tokens) * _outputs_per_token(shapes) * size
        parts["gradients"] = shapes.blocks * gradients
    return parts


def phase_flops(
    shapes: BlockShapes, config: QuantizeConfig, *, tokens: int, mode: Mode
) -> dict[str, float]:
    """Returns the floating-point operations of each phase, all blocks together.

    Args:
        shapes, config, mode: as for `memory_bytes`.
        tokens: calibration tokens of all batches together.
    """
    weights = sum(linear.entries * linear.token_share for linear in shapes.linears)
    models = 2 if config.needs_reference else 1
    passes = 2 if mode == "block" else 1
    products = sum(linear.entries * linear.columns for linear in shapes.linears)
    squares = sum(linear.columns**2 * linear.token_share for linear in shapes.inputs)
    flops = {
        "forward": 2.0 * weights * tokens * models * passes,
        "hessian": tokens * squares,
        "factor": sum(linear.columns**3 for linear in shapes.inputs) / 3,
        "solve": float(products) * (5 if config.needs_reference else 2),
        "refine": float(products) * 6 * config.refine,
    }
    if config.needs_reference:
        moments = sum(min(x.rows, x.columns) * x.columns * x.token_share for x in shapes.inputs)
        flops["drift"] = 2.0 * tokens * moments + 2.0 * products
    if config.needs_gradients:
        rows = sum(linear.rows**2 * linear.token_share for linear in shapes.linears)
        # Forward; in the backward pass once more forward, then backward; then the gradients' products.
        flops["gradients"] = min(config.output_tokens, tokens) * (6.0 * weights + rows)
        flops["factor"] += sum(linear.rows**3 for linear in shapes.linears) / 3
        flops["solve"] += sum(linear.rows**2 * linear.columns for linear in shapes.linears)
    return {phase: shapes.blocks * count for phase, count in flops.items() if count}


def survey_flops(shapes: BlockShapes, config: QuantizeConfig, *, tokens: int) -> dict[str, float]:
    """Returns the operations of bit allocation: its phase is called `survey`.

    One pass over all tokens; then every candidate is solved, and its block runs with a few tokens.

    Args:
        shapes, config: as for `memory_bytes`.
        tokens: calibration tokens of all batches together.
    """
    weights = sum(linear.entries * linear.token_share for linear in shapes.linears)
    products = sum(linear.entries * linear.columns for linear in shapes.linears)
    squares = sum(linear.columns**2 * linear.token_share for linear in shapes.inputs)
    factors = sum(linear.columns**3 for linear in shapes.inputs) / 3
    candidates = len(config.target_widths) * len({config.group_size, *CANDIDATE_GROUP_SIZES})
    runs = candidates * min(len(shapes.inputs), MAX_LAYER_GROUPS)
    forward = 2.0 * weights * tokens + runs * 2.0 * weights * CANDIDATE_TOKENS
    solve = candidates * (factors + 2.0 * products)
    return {"survey": shapes.blocks * (forward + tokens * squares + solve)}


def measure_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Measures the matmul speed of a device in operations per second, in a trial of half a second.

    Args:
        dtype: dtype of the operands.
        device: device to measure.
    """
    size = TRIAL_SIZE if device.type == "cpu" else ACCELERATOR_TRIAL_SIZE
    A, B = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    with cpu_half_matmul():  # as the run will multiply
        matmul(A, B)
        synchronize(device)
        begun, count = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - begun) < TRIAL_SECONDS:
            matmul(A, B)
            synchronize(device)
            count += 1
    return 2 * size**3 * count / elapsed


def phase_seconds(
    flops: dict[str, float], dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Estimates the seconds of each phase on a device of this machine.

    Args:
        flops: operations of each phase.
        dtype: dtype of the model.
        device: device that computes.
    """
    float32 = measure_flops(torch.float32, device)
    model = float32 if dtype == torch.float32 else measure_flops(dtype, device)
    return {
        phase: count / (EFFICIENCY[phase] * (model if phase in MODEL_DTYPE_PHASES else float32))
        for phase, count in flops.items()
    }
