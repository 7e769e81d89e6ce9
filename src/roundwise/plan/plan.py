"""Plans a run from config.json and the headers of the weights alone; no weights are loaded.

`quantize` chooses its mode with the same estimate, so it does what was planned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from transformers.pytorch_utils import Conv1D

from roundwise.calibration.held_out import windows_per_batch
from roundwise.checkpoint import engines
from roundwise.checkpoint.engines import ServedLayer, conflicting_packed_modules
from roundwise.checkpoint.formats import shape_problem
from roundwise.config import Mode, QuantizeConfig
from roundwise.errors import ConfigError
from roundwise.forward.expert_tokens import check_experts
from roundwise.model.blocks import is_tied, weight_of
from roundwise.model.build import config_size, context_length, embedding_shape
from roundwise.model.expert_weights import ExpertSlice
from roundwise.model.fake_forward import drop_uncalled_linears
from roundwise.model.moe import parse_expert_name
from roundwise.model.streamed import StreamedModel
from roundwise.plan import cost_model
from roundwise.plan.layer_formats import (
    fit_group_size,
    format_problems,
    layer_shapes,
    source_lines,
    tensor_parallel_degrees,
)
from roundwise.plan.memory import (
    MemoryPlan,
    bytes_after,
    over_budget_message,
    plan_disk,
    plan_memory,
)
from roundwise.system.console import count_of

#: Fraction of all parameters below which a warning says that little is quantized.
ADVISED_PART = 0.8


@dataclass(frozen=True)
class PlannedLayer:
    """A linear layer and how it is quantized."""

    name: str
    shape: tuple[int, int]
    """(out_features, in_features)."""
    bits: int | None
    """None: it is not quantized."""
    group_size: int | None
    shares_input_with: str | None
    """First layer that reads the same input, and so shares its Hessian; None: not known."""
    reason: str | None
    """Reason why it is not quantized, or cannot be stored with these settings; None: there is none."""

    def as_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {
            "name": self.name, "shape": self.shape, "bits": self.bits, "group_size": self.group_size,
            "shares": self.shares_input_with, "why_not": self.reason,
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Everything that a run would do and need; `roundwise plan --json` prints `as_dict`."""

    modules: list[PlannedLayer]
    quantized_part: float
    """Fraction of all parameters of the model, 0 to 1."""
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    tied_embeddings: bool
    memory: MemoryPlan
    disk: dict[str, int]
    """Bytes that a run needs in its output folder, by purpose."""
    phases: dict[str, float]
    """Estimated seconds of each phase."""
    served_by: dict[str, str | None]
    """Engine -> reason why it does not serve the result; None: it serves it."""
    tensor_parallel: list[int]
    problems: list[str]
    """Reasons why a run would be refused."""
    sources: list[str] = field(default_factory=list)
    """From which format to which, if the source is quantized: "MXFP4 experts -> 4-bit GPTQ (192)"."""
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {
            **asdict(self),
            "modules": [module.as_dict() for module in self.modules],
            "memory": self.memory.as_dict(),
            "seconds": sum(self.phases.values()),
        }


def plan(
    streamed: StreamedModel,
    config: QuantizeConfig,
    *,
    samples: int = 128,
    seq_len: int = 2048,
    batch_size: int = 8,
    mode: Mode | None = None,
    budget: int | None = None,
) -> Plan:
    """Plans a run; takes seconds for a model of any size.

    Args:
        streamed: the model.
        config: settings.
        samples, seq_len, batch_size: calibration windows, as for `quantize`.
        mode, budget: as for `plan_memory`.
    """
    limit = context_length(streamed.model) or seq_len
    config, group_note = fit_group_size(layer_shapes(streamed.blocks), config)
    warnings = [*streamed.warnings, *streamed.ignored_note(), *([group_note] if group_note else [])]
    if seq_len > limit:
        seq_len = limit
        warnings.append(f"seq_len is {limit}, the longest text the model takes")
    tokens = 0 if config.method == "rtn" else samples * seq_len
    modules = _planned_layers(streamed, config)
    quantized = [module for module in modules if module.bits]
    weights = sum(module.shape[0] * module.shape[1] for module in quantized)
    part = weights / sum(weight.numel() for weight in streamed.model.parameters())
    undecided = {
        module.name
        for module in quantized
        if config.target_bpw and not config.is_overridden(module.name)
    }
    warnings += _warnings(streamed, config, modules, part, undecided)
    if config.needs_reference:
        batch_size = windows_per_batch(samples, batch_size)
    memory = plan_memory(
        streamed, config, tokens=tokens, batch=batch_size * seq_len, mode=mode, budget=budget
    )
    if not memory.fits:
        warnings.append(over_budget_message(memory))
    after, stored = bytes_after(streamed, config, undecided)
    problems = _problems(streamed, config)
    served = engines.served_by(served_layers(streamed, config))
    if problems:  # nothing serves the result of a run that is refused
        served = dict.fromkeys(served, "the run would be refused")
    heads = config_size(streamed.model, "num_attention_heads") or 1
    return Plan(
        modules=modules,
        quantized_part=part,
        bytes_before=streamed.checkpoint.nbytes(),
        bytes_after=after,
        bits_per_weight=8 * stored / max(1, weights),
        tied_embeddings=(
            is_tied(streamed.model.config) and streamed.model.get_output_embeddings() is not None
        ),
        memory=memory,
        disk=plan_disk(streamed, config, memory, tokens=tokens),
        phases=_phases(streamed, config, tokens, memory.mode, surveyed=bool(undecided)),
        served_by=served,
        tensor_parallel=tensor_parallel_degrees(
            [(*module.shape, module.group_size or -1) for module in quantized],
            hidden=embedding_shape(streamed.model)[1], heads=heads,
            kv_heads=config_size(streamed.model, "num_key_value_heads") or heads,
        ),
        problems=problems,
        sources=source_lines(streamed, config),
        warnings=warnings,
    )  # fmt: skip


def _warnings(
    streamed: StreamedModel,
    config: QuantizeConfig,
    modules: list[PlannedLayer],
    part: float,
    undecided: set[str],
) -> list[str]:
    """Returns the warnings about layers.

    Args:
        streamed: the model.
        config: settings.
        modules: all linear layers.
        part: quantized fraction of all parameters.
        undecided: layers whose width is chosen when the run begins.
    """
    warnings = []
    if not any(module.shares_input_with for module in modules):
        warnings.append("which layers share an input is found out when the run reaches them")
    if part < ADVISED_PART:
        warnings.append(
            f"only {part:.0%} of the parameters are quantized: {_largest_others(streamed)}"
        )
    if undecided:
        warnings.append(
            f"bits and groups of {count_of(len(undecided), 'layer')} are chosen when the run begins: "
            f"those shown are not final, and the size assumes {config.target_bpw:g} bits per weight"
        )
    return warnings


def _problems(streamed: StreamedModel, config: QuantizeConfig) -> list[str]:
    """Returns the reasons why a run would be refused."""
    problems = format_problems(layer_shapes(streamed.blocks), config)
    for block in streamed.blocks:
        try:
            check_experts(block, config)
        except ConfigError as error:
            problems.append(str(error))
    return problems


def _phases(
    streamed: StreamedModel, config: QuantizeConfig, tokens: int, mode: Mode, *, surveyed: bool
) -> dict[str, float]:
    """Estimates the seconds of each phase; empty if no calibration is needed.

    Args:
        streamed: the model.
        config: settings.
        tokens: calibration tokens of all batches together.
        mode: mode of the run.
        surveyed: widths are chosen before the run, which takes a phase of its own.
    """
    if not tokens:
        return {}
    total: dict[str, float] = {}
    for shapes in cost_model.block_shapes(streamed, config):
        flops = cost_model.phase_flops(shapes, config, tokens=tokens, mode=mode)
        if surveyed:
            flops |= cost_model.survey_flops(shapes, config, tokens=tokens)
        for phase, count in flops.items():
            total[phase] = total.get(phase, 0.0) + count
    return cost_model.phase_seconds(total, streamed.dtype, streamed.device) if total else {}


def served_layers(streamed: StreamedModel, config: QuantizeConfig) -> Iterator[ServedLayer]:
    """Yields the settings of each quantized layer as engines see them, conflicts between layers too."""
    for block in streamed.blocks:
        expert_settings: dict[str, set[ServedLayer]] = {}
        layers: list[ServedLayer] = []
        for name in block.linears:
            settings = config.for_module(name)
            if settings is None:
                continue
            layer = ServedLayer(
                bits=settings.bits, group_size=settings.group_size, sym=settings.sym,
                desc_act=settings.desc_act, format=settings.format, is_head=block.is_head,
                is_conv1d=isinstance(block.linears[name], Conv1D),
            )  # fmt: skip
            expert = parse_expert_name(name)
            if expert is not None:
                expert_settings.setdefault(expert[0], set()).add(layer)
                info = streamed.checkpoint.tensors[streamed.checkpoint_name_of[f"{name}.weight"]]
                naming = engines.expert_naming(
                    expert[1][1], fused=isinstance(info, ExpertSlice),
                    family=str(streamed.model.config.model_type),
                )  # fmt: skip
                layer = replace(layer, expert_naming=naming)
            layers.append(layer)
            if config.target_bpw and not block.is_head and not config.is_overridden(name):
                # Every width that may be chosen; all engines support all group sizes that may be.
                layers += [replace(layer, bits=bits) for bits in config.target_widths]
        yield from layers
        yield from (
            replace(layers[-1], conflicting_module=module)
            for module in conflicting_packed_modules(config.for_module, block.linears)
        )
        yield from (
            replace(layers[-1], expert_naming="mixed")
            for settings_of_experts in expert_settings.values()
            if len(settings_of_experts) > 1
        )


def _planned_layers(streamed: StreamedModel, config: QuantizeConfig) -> list[PlannedLayer]:
    """Returns all linears of the blocks; first those that can be quantized."""
    shared = drop_uncalled_linears(streamed, config).first_reader
    layers = []
    for block in streamed.blocks:
        for name, linear in block.linears.items():
            rows, columns = (int(size) for size in weight_of(linear).shape)
            settings = config.for_module(name)
            reason: str | None = "skipped with --skip"
            if settings is not None:
                reason = shape_problem(rows, columns, settings)
            layers.append(
                PlannedLayer(
                    name, (rows, columns),
                    settings.bits if settings else None, settings.group_size if settings else None,
                    shared.get(name), reason,
                )
            )  # fmt: skip
    for block in [*streamed.blocks, *streamed.skipped_blocks]:
        for name, reason in block.skipped_linears.items():
            rows, columns = weight_of(streamed.model.get_submodule(name)).shape
            layers.append(PlannedLayer(name, (rows, columns), None, None, None, reason))
    return layers


def _largest_others(streamed: StreamedModel) -> str:
    """Names the two largest tensors that are not linears of the blocks."""
    linears = {id(x.weight) for block in streamed.blocks for x in block.linears.values()}
    others = [
        (weight.numel(), name)
        for name, weight in streamed.model.named_parameters()
        if id(weight) not in linears
    ]
    largest = sorted(others, reverse=True)[:2]
    return "the largest others are " + ", ".join(f"{name} ({size:,})" for size, name in largest)
