"""Which width each unit gets: the classic choice under a budget.

From the smallest option of each unit, whatever lowers the loss most per byte comes next, until the size
is used up.

What each way to quantize a unit costs, measured in one pass with the original weights.

The layers that must agree (those that read one input; all experts of a layer) are quantized in each way,
one after another, and their block is played with them. The loss is how far that moves the block's
output, relative to its size, token by token. Losses of different layers are taken to add up.

`--target-bpw`: a width for each layer, so that a model of a given size loses least.

`try_weights` measures, `choice` chooses; what was chosen stands in `dynamic`, where a run that goes on, and
one that is made again from its manifest, find it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from roundwise.calibration.dataset import Calibration
from roundwise.checkpoint.engines import with_packed_names
from roundwise.checkpoint.gptq_format import check_shape, packed_bytes
from roundwise.checkpoint.manifest import read_manifest
from roundwise.config import QuantizeConfig
from roundwise.core.solver import PreparedHessian, prepare_hessian, round_to_nearest, solve
from roundwise.errors import ConfigError, SingularError
from roundwise.forward.expert_tokens import ExpertCalibration
from roundwise.forward.input_groups import InputGroup
from roundwise.forward.scheduler import ForwardScheduler
from roundwise.model.blocks import Block, set_weight, weight_of
from roundwise.model.streamed import StreamedModel
from roundwise.plan.cost_model import OPTION_GROUPS, OPTION_TOKENS
from roundwise.run.journal import read_journal
from roundwise.system.timer import timer


@dataclass(frozen=True)
class Candidate:
    """One way to quantize a unit."""

    bits: int
    group_size: int
    nbytes: int
    loss: float


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one block that are quantized in the same way."""

    names: tuple[str, ...]
    weights: int
    options: tuple[Candidate, ...]


@dataclass(frozen=True)
class Choice:
    """What was chosen for a unit."""

    names: tuple[str, ...]
    bits: int
    group_size: int
    loss: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "names": list(self.names)}


def choose_candidates(units: Sequence[LayerGroup], target: float) -> list[Choice]:
    """The options that lose least among those whose bytes stay within `target` bits per weight.

    Raises:
        ConfigError: even the smallest options are larger; naming what they take.
    """
    budget = target * sum(unit.weights for unit in units) / 8
    chosen = [min(unit.options, key=lambda o: (o.nbytes, o.loss)) for unit in units]
    spent = sum(option.nbytes for option in chosen)
    if spent > budget:
        least = 8 * spent / sum(unit.weights for unit in units)
        raise ConfigError(
            f"target_bpw={target:g} cannot be reached: the smallest options take {least:.2f} bits"
        )
    while True:
        best: tuple[float, int, Candidate] | None = None
        for index, (unit, now) in enumerate(zip(units, chosen, strict=True)):
            for option in unit.options:
                more, gain = option.nbytes - now.nbytes, now.loss - option.loss
                if gain <= 0 or spent + more > budget:
                    continue
                rate = gain / more if more > 0 else float("inf")
                if best is None or rate > best[0]:
                    best = (rate, index, option)
        if best is None:
            break
        _, index, option = best
        spent += option.nbytes - chosen[index].nbytes
        chosen[index] = option
    return [
        Choice(unit.names, option.bits, option.group_size, option.loss)
        for unit, option in zip(units, chosen, strict=True)
    ]


def as_dynamic(choices: Sequence[Choice]) -> dict[str, dict[str, Any] | None]:
    """`QuantizeConfig.dynamic` for the choices: one pattern for all layers that are quantized alike.

    Layers that an engine joins are also called what it calls them.
    """
    alike: dict[tuple[int, int], list[str]] = {}
    for choice in choices:
        alike.setdefault((choice.bits, choice.group_size), []).extend(choice.names)
    return {
        f"^(?:{'|'.join(map(re.escape, with_packed_names(names)))})$": {
            "bits": bits,
            "group_size": size,
        }
        for (bits, size), names in sorted(alike.items())
    }


#: How a layer is quantized when options are compared: quickly.
QUICK = {
    "grid": "minmax", "grid_candidates": 1, "alpha": 0.0, "beta": 0.0, "refine": 0, "exchange": 1,
}  # fmt: skip

Played = list[torch.Tensor]


def measure_sensitivity(
    streamed: StreamedModel, config: QuantizeConfig, calibration: Calibration
) -> list[LayerGroup]:
    """One pass through the model that measures every option of every unit.

    Args:
        skeleton: used up by it.
        config: `dynamic` of it keeps what the user has settled; those layers are no unit.
        texts: calibration.
    """
    streamed.load_outside_blocks()
    units: list[LayerGroup] = []
    with ForwardScheduler(
        streamed.model, streamed.blocks, calibration.batches,
        policy=ExpertCalibration(config.experts, config.expert_tokens), device=streamed.device,
    ) as scheduler:  # fmt: skip
        for block in streamed.blocks:
            if block.is_head:  # it keeps the width asked for
                break
            scheduler.advance_to_block()
            streamed.load(block.module, block.prefix)
            groups = scheduler.discover_groups(block)

            def measure(
                attempt: Callable[[], Played],
                base: Played,
                block: Block = block,
                groups: list[InputGroup] = groups,
            ) -> None:
                with timer.phase("survey"):
                    units.extend(_units(block, groups, config, attempt, base))

            scheduler.try_weights(block, groups, measure, tokens=OPTION_TOKENS)
            streamed.unload(block.module, block.prefix)
    return units


def _units(
    block: Block,
    groups: Sequence[InputGroup],
    config: QuantizeConfig,
    attempt: Callable[[], Played],
    base: Played,
) -> Iterator[LayerGroup]:
    """The units of a block with all their options, measured."""
    for members in _together(block, groups, config):
        names = [
            name for group in members for name in group.names if not config.is_overridden(name)
        ]
        weights = {name: weight_of(block.linears[name]) for name in names}
        options = []
        hessians = [_take_hessian(group) for group in members]
        for settings in _candidates(names, weights, config):
            before = {name: block.linears[name].weight for name in names}
            nbytes = 0
            for group, H in zip(members, hessians, strict=True):
                ready = _prepared(H, settings)
                for name in (name for name in group.names if name in weights):
                    W = weights[name]
                    q = (
                        round_to_nearest(W, settings)
                        if ready is None
                        else solve(W, ready, settings)
                    )
                    set_weight(block.linears[name], q.dequantize(W.dtype))
                    nbytes += packed_bytes(len(W), W.shape[1], settings)
            loss = _distance(attempt(), base)
            for name, weight in before.items():
                block.linears[name].weight = weight
            options.append(Candidate(settings.bits, settings.group_size, nbytes, loss))
        if options:
            total = sum(W.numel() for W in weights.values())
            yield LayerGroup(tuple(names), total, tuple(options))


def _together(
    block: Block, groups: Sequence[InputGroup], config: QuantizeConfig
) -> list[list[InputGroup]]:
    """Groups whose layers must agree: engines take one width for all experts of a layer."""
    found: dict[str, list[InputGroup]] = {}
    for group in groups:
        if any(not config.is_overridden(name) for name in group.names):
            paths = [p for p in block.experts if any(n.startswith(f"{p}.") for n in group.names)]
            found.setdefault(paths[0] if paths else group.names[0], []).append(group)
    return list(found.values())


def _candidates(
    names: Sequence[str], weights: dict[str, torch.Tensor], config: QuantizeConfig
) -> Iterator[QuantizeConfig]:
    """Settings that all layers of a unit can be stored with."""
    for bits in config.target_widths:
        for size in dict.fromkeys((config.group_size, *OPTION_GROUPS)):
            settings = config.merged(
                {
                    **QUICK,
                    "bits": bits,
                    "group_size": size,
                    "damp_percent": 0.01,
                    "target_bpw": None,
                }
                if config.damp_percent == "auto"
                else {**QUICK, "bits": bits, "group_size": size, "target_bpw": None}
            )
            try:
                for name in names:
                    check_shape(name, len(weights[name]), weights[name].shape[1], settings)
            except ConfigError:
                continue
            yield settings


def _take_hessian(group: InputGroup) -> torch.Tensor | None:
    """The group's Hessian; all its sums are gone afterwards."""
    moments = group.take_moments()
    group.clear()
    return moments.H if moments is not None else None


def _prepared(H: torch.Tensor | None, settings: QuantizeConfig) -> PreparedHessian | None:
    """Order and factor of an input's Hessian; None where there is none: then weights are rounded."""
    try:
        return None if H is None else prepare_hessian(H, settings)
    except SingularError:
        return None


def _distance(found: Played, base: Played) -> float:
    """Mean over tokens of ||y' - y||² / ||y||²."""
    total, count = 0.0, 0
    for y, exact in zip(found, base, strict=True):
        moved = (y.to(torch.float32) - exact.to(torch.float32)).square().sum(-1)
        size = exact.to(torch.float32).square().sum(-1).clamp_min(1e-30)
        total += float((moved / size).sum())
        count += moved.numel()
    return total / max(count, 1)


def allocate_bits(
    streamed: StreamedModel,
    config: QuantizeConfig,
    calibration: Calibration,
    out: Path,
    again: Callable[[], StreamedModel],
) -> QuantizeConfig:
    """`config` with a width for every layer in `dynamic`: that of a run in `out`, or chosen now.

    Args:
        streamed: the model.
        config: with `target_bpw`; what its `dynamic` settles stays.
        calibration: calibration windows.
        out: folder of the result, where an earlier run of the same command may have chosen.
        again: opens the model once more, for the measurement, which consumes it.

    Raises:
        ConfigError: the size cannot be reached.
    """
    if config.target_bpw is None or not _undecided(streamed, config):
        return config
    found = _earlier(streamed, config, calibration, out)
    if found is None:
        units = measure_sensitivity(again(), config, calibration)
        found = {**config.dynamic, **as_dynamic(choose_candidates(units, config.target_bpw))}
    return config.model_copy(update={"dynamic": found})


def _earlier(
    streamed: StreamedModel, config: QuantizeConfig, calibration: Calibration, out: Path
) -> dict[str, dict[str, Any] | None] | None:
    """What an earlier run of the same command chose, finished or not."""
    manifest = read_manifest(out) if out.is_dir() else None
    known = manifest.run if manifest else read_journal(out)[0]
    if known is None or known.calibration != calibration.record:
        return None
    rules = [(pattern, changes) for pattern, changes in known.config["dynamic"]]
    given = [*config.dynamic.items()]
    wanted = config.model_dump(mode="json")
    alike = {**known.config, "dynamic": None} == {**wanted, "dynamic": None}
    if not alike or rules[: len(given)] != given:
        return None
    return dict(rules) if known.model.as_json() == streamed.checkpoint.identity() else None


def _undecided(streamed: StreamedModel, config: QuantizeConfig) -> bool:
    """Whether there is a layer that no pattern of `dynamic` settles."""
    return any(
        not config.is_overridden(name)
        for block in streamed.blocks
        if not block.is_head
        for name in block.linears
    )
