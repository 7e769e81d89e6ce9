"""What each way to quantize a unit costs, measured in one pass with the original weights.

The layers that must agree (those that read one input; all experts of a layer) are quantized in each way,
one after another, and their block is played with them. The loss is how far that moves the block's
output, relative to its size, token by token. Losses of different layers are taken to add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.clock import clock
from roundwise.core.solver import Prepared, prepare, round_to_nearest, solve
from roundwise.errors import ConfigError, SingularError
from roundwise.models.blocks import Block, set_weight, weight_of
from roundwise.models.formats import check_shape, packed_bytes
from roundwise.models.skeleton import Skeleton
from roundwise.pipeline.calibration import Calibration
from roundwise.pipeline.choice import Option, Unit, is_open
from roundwise.pipeline.conduct import Conductor
from roundwise.pipeline.forecast import OPTION_GROUPS, OPTION_TOKENS
from roundwise.pipeline.probe import Group
from roundwise.pipeline.routing import Policy

#: How a layer is quantized when options are compared: quickly.
QUICK = {
    "grid": "minmax", "grid_candidates": 1, "alpha": 0.0, "beta": 0.0, "refine": 0, "exchange": 1,
}  # fmt: skip

Played = list[torch.Tensor]


def survey(skeleton: Skeleton, config: QuantizeConfig, texts: Calibration) -> list[Unit]:
    """One pass through the model that measures every option of every unit.

    Args:
        skeleton: used up by it.
        config: `dynamic` of it keeps what the user has settled; those layers are no unit.
        texts: calibration.
    """
    skeleton.load_outside_blocks()
    units: list[Unit] = []
    with Conductor(
        skeleton.model, skeleton.blocks, texts.batches,
        policy=Policy(config.experts, config.expert_tokens), device=skeleton.device,
    ) as conductor:  # fmt: skip
        for block in skeleton.blocks:
            if block.is_head:  # it keeps the width asked for
                break
            conductor.enter()
            skeleton.load(block.module, block.prefix)
            groups = conductor.probe(block)

            def measure(
                attempt: Callable[[], Played],
                base: Played,
                block: Block = block,
                groups: list[Group] = groups,
            ) -> None:
                with clock.phase("survey"):
                    units.extend(_units(block, groups, config, attempt, base))

            conductor.survey(block, groups, measure, tokens=OPTION_TOKENS)
            skeleton.unload(block.module, block.prefix)
    return units


def _units(
    block: Block,
    groups: Sequence[Group],
    config: QuantizeConfig,
    attempt: Callable[[], Played],
    base: Played,
) -> Iterator[Unit]:
    """The units of a block with all their options, measured."""
    for members in _together(block, groups, config):
        names = [name for group in members for name in group.names if is_open(name, config)]
        weights = {name: weight_of(block.linears[name]) for name in names}
        options = []
        moments = [_moment(group) for group in members]
        for settings in _candidates(names, weights, config):
            before = {name: block.linears[name].weight for name in names}
            nbytes = 0
            for group, H in zip(members, moments, strict=True):
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
            options.append(Option(settings.bits, settings.group_size, nbytes, loss))
        if options:
            total = sum(W.numel() for W in weights.values())
            yield Unit(tuple(names), total, tuple(options))


def _together(block: Block, groups: Sequence[Group], config: QuantizeConfig) -> list[list[Group]]:
    """Groups whose layers must agree: engines take one width for all experts of a layer."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        if any(is_open(name, config) for name in group.names):
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


def _moment(group: Group) -> torch.Tensor | None:
    H = group.hessian.mean() if group.hessian is not None else None
    group.forget()
    return H


def _prepared(H: torch.Tensor | None, settings: QuantizeConfig) -> Prepared | None:
    """Order and factor of an input's Hessian; None where there is none: then weights are rounded."""
    try:
        return None if H is None else prepare(H, settings)
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
