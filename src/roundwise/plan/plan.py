"""What a run would do, from config.json and the headers of the weights alone: nothing is loaded.

`quantize` asks the same forecast which mode the memory allows, so what is planned is what is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from roundwise.checkpoint import engines
from roundwise.checkpoint.engines import ServedLayer, conflicting_packed_modules
from roundwise.checkpoint.gptq_format import check_shape
from roundwise.config import Mode, QuantizeConfig
from roundwise.errors import ConfigError
from roundwise.forward.expert_tokens import check_experts
from roundwise.model.blocks import is_tied, weight_of
from roundwise.model.build import context_length
from roundwise.model.expert_weights import ExpertSlice
from roundwise.model.fake_forward import drop_uncalled_linears
from roundwise.model.streamed import StreamedModel
from roundwise.plan import cost_model
from roundwise.plan.memory import (
    MemoryPlan,
    bytes_after,
    over_budget_message,
    plan_disk,
    plan_memory,
)

#: Part of all parameters below which a quantized model is hardly smaller: said as a warning.
ADVISED_PART = 0.8


@dataclass(frozen=True)
class PlannedLayer:
    """A linear layer and what becomes of it."""

    name: str
    shape: tuple[int, int]
    """(out_features, in_features)."""
    bits: int | None
    """None: it stays as it is."""
    group_size: int | None
    shares: str | None
    """The first layer that reads the same input, whose Hessian serves both; None: not known."""
    why_not: str | None
    """Why it stays as it is, or cannot be stored with these settings."""


@dataclass(frozen=True)
class Plan:
    """What a run would do; `as_dict` is what `roundwise plan --json` prints."""

    modules: list[PlannedLayer]
    quantized_part: float
    """Of all parameters of the model, 0 … 1."""
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    tied_embeddings: bool
    memory: MemoryPlan
    disk: dict[str, int]
    """Bytes that a run needs in its output folder, by what they are for."""
    phases: dict[str, float]
    """Estimated seconds."""
    served_by: dict[str, str | None]
    """Engine -> why not; None: it serves the result."""
    tensor_parallel: list[int]
    problems: list[str]
    """What a run would refuse."""
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        memory = asdict(self.memory) | {"fits": self.memory.fits}
        seconds = sum(self.phases.values())
        return {**asdict(self), "memory": memory, "seconds": seconds}


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
    """Plans a run; takes seconds whatever the size of the model.

    Args:
        skeleton: of the model.
        config: settings.
        samples, seq_len, batch_size: calibration windows, as for `quantize`.
        mode, budget: as for `plan_memory`.
    """
    text = streamed.model.config.get_text_config()
    limit = context_length(streamed.model.config) or seq_len
    warnings = [*streamed.notes]
    if seq_len > limit:
        seq_len = limit
        warnings.append(f"seq_len is {limit}, the longest text the model takes")
    tokens = 0 if config.method == "rtn" else samples * seq_len
    modules, sharing = _modules(streamed, config)
    if not sharing:
        warnings.append("which layers share an input is found out when the run reaches them")
    total = sum(weight.numel() for weight in streamed.model.parameters())
    part = sum(m.shape[0] * m.shape[1] for m in modules if m.bits) / total
    if part < ADVISED_PART:
        warnings.append(f"only {part:.0%} of the parameters are quantized: {_rest(streamed)}")
    problems = [m.why_not for m in modules if m.bits and m.why_not]
    for block in streamed.blocks:
        try:
            check_experts(block, config)
        except ConfigError as error:
            problems.append(str(error))
    open_ = [
        m for m in modules if m.bits and config.target_bpw and not config.is_overridden(m.name)
    ]
    if open_:
        warnings.append(
            f"bits and groups of {len(open_)} layers are chosen when the run begins: those shown are "
            f"not final, the size is that of {config.target_bpw:g} bits per weight"
        )
    memory = plan_memory(
        streamed, config, tokens=tokens, batch=batch_size * seq_len, mode=mode, budget=budget
    )
    if not memory.fits:
        warnings.append(over_budget_message(memory))
    shapes = cost_model.shapes_of(streamed, config)
    flops: dict[str, float] = {}
    for each in shapes if tokens else []:
        work = cost_model.work(each, config, tokens=tokens, mode=memory.mode)
        work |= cost_model.survey(each, config, tokens=tokens) if open_ else {}
        flops = {phase: flops.get(phase, 0.0) + flop for phase, flop in work.items()}
    after, stored = bytes_after(streamed, config, {m.name for m in open_})
    heads = int(getattr(text, "num_attention_heads", 1) or 1)
    return Plan(
        modules=modules,
        quantized_part=part,
        bytes_before=streamed.checkpoint.nbytes(),
        bytes_after=after,
        bits_per_weight=8 * stored / max(1, sum(m.shape[0] * m.shape[1] for m in modules if m.bits)),
        tied_embeddings=(
            is_tied(streamed.model.config) and streamed.model.get_output_embeddings() is not None
        ),
        memory=memory,
        disk=plan_disk(streamed, config, memory, tokens=tokens),
        phases=cost_model.seconds(flops, streamed.dtype, streamed.device) if flops else {},
        served_by=engines.served_by(_served(streamed, config)),
        tensor_parallel=engines.tensor_parallel_degrees(
            [(*m.shape, m.group_size or -1) for m in modules if m.bits],
            hidden=int(text.hidden_size), heads=heads,
            kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        ),
        problems=problems,
        warnings=warnings,
    )  # fmt: skip


def _served(streamed: StreamedModel, config: QuantizeConfig) -> Iterator[ServedLayer]:
    """Yields the settings of each quantized layer as engines see them, conflicts between layers too."""
    for block in streamed.blocks:
        expert_settings = {path: set[ServedLayer]() for path in block.experts}
        layers: list[ServedLayer] = []
        for name in block.linears:
            settings = config.for_module(name)
            if settings is None:
                continue
            layer = ServedLayer(
                bits=settings.bits, group_size=settings.group_size, sym=settings.sym,
                desc_act=settings.desc_act, format=settings.format,
            )  # fmt: skip
            path = next((path for path in expert_settings if name.startswith(f"{path}.")), None)
            if path is not None:
                expert_settings[path].add(layer)
                info = streamed.checkpoint.tensors[streamed.checkpoint_name_of[f"{name}.weight"]]
                naming = engines.expert_naming(
                    name.rpartition(".")[2], fused=isinstance(info, ExpertSlice)
                )
                layer = replace(layer, expert_naming=naming)
            layers.append(layer)
            if config.target_bpw and not block.is_head and not config.is_overridden(name):
                # Every width that may be chosen; every engine supports the group sizes that may be.
                layers += [replace(layer, bits=bits) for bits in config.target_widths]
        yield from layers
        yield from (
            replace(layers[-1], conflicting_module=module)
            for module in conflicting_packed_modules(config, block.linears)
        )
        yield from (
            replace(layers[-1], expert_naming="mixed")
            for settings_of_experts in expert_settings.values()
            if len(settings_of_experts) > 1
        )


def _modules(streamed: StreamedModel, config: QuantizeConfig) -> tuple[list[PlannedLayer], bool]:
    """All linears of the blocks, and whether it is known which share an input."""
    leaders = drop_uncalled_linears(streamed, config).first
    found = []
    for block in streamed.blocks:
        for name, linear in block.linears.items():
            rows, columns = (int(size) for size in weight_of(linear).shape)
            settings, why_not = config.for_module(name), None
            if settings is None:
                why_not = "left out with --skip"
            else:
                try:
                    check_shape(name, rows, columns, settings)
                except ConfigError as error:
                    why_not = str(error)
            found.append(
                PlannedLayer(
                    name, (rows, columns),
                    settings.bits if settings else None, settings.group_size if settings else None,
                    leaders.get(name), why_not,
                )
            )  # fmt: skip
    for block in [*streamed.blocks, *streamed.skipped_blocks]:
        for name, reason in block.skipped_linears.items():
            rows, columns = weight_of(streamed.model.get_submodule(name)).shape
            found.append(PlannedLayer(name, (rows, columns), None, None, None, reason))
    return found, bool(leaders)


def _rest(streamed: StreamedModel) -> str:
    """The largest tensors outside the blocks' linears, by name."""
    linears = {id(x.weight) for block in streamed.blocks for x in block.linears.values()}
    others = [
        (weight.numel(), name)
        for name, weight in streamed.model.named_parameters()
        if id(weight) not in linears
    ]
    largest = sorted(others, reverse=True)[:2]
    return "the largest others are " + ", ".join(
        f"{n} ({size:,})" for size, n in largest
    )
