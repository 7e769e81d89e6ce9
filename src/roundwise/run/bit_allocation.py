"""Mixed-precision bit allocation (`--target-bpw`): a width for each layer within a total size.

`measure_sensitivity` runs the calibration batches through the original model once. In each block, the
layers that must agree (those that read one input; all experts of a layer) are quantized in each possible
way, one group after another, and the block runs with them. The loss of a way is how far it moves the
block's output, relative to the output's size, averaged over tokens. Losses of different layers are
assumed to add up.

`choose_candidates` starts with the smallest candidate of each group. Then it takes, again and again, the
one that lowers the loss most per byte, until the size is used up. The result becomes rules of
`QuantizeConfig.dynamic`: a resumed run, and one that repeats a manifest, find it there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from roundwise.calibration.dataset import Calibration
from roundwise.checkpoint.engines import with_packed_names
from roundwise.checkpoint.formats import packed_bytes, shape_problem
from roundwise.checkpoint.manifest import read_manifest
from roundwise.config import QuantizeConfig
from roundwise.core.solver import PreparedHessian, prepare_hessian, round_to_nearest, solve
from roundwise.errors import ConfigError, SingularError
from roundwise.forward.expert_tokens import ExpertCalibration
from roundwise.forward.input_groups import InputGroup
from roundwise.forward.scheduler import ForwardScheduler
from roundwise.model.blocks import Block, set_weight, weight_of
from roundwise.model.streamed import StreamedModel
from roundwise.plan.cost_model import CANDIDATE_GROUP_SIZES, CANDIDATE_TOKENS
from roundwise.run.journal import read_journal
from roundwise.system.timer import timer

#: Settings of a candidate's layers: those that make solving fast.
QUICK = {
    "grid": "minmax", "grid_candidates": 1, "alpha": 0.0, "beta": 0.0, "refine": 0, "exchange": 1,
}  # fmt: skip

#: Returns the block's outputs, one tensor for each batch, with the weights that are in place.
RunBlock = Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class Candidate:
    """One way to quantize a group of layers."""

    bits: int
    group_size: int
    nbytes: int
    loss: float


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one block that must be quantized in the same way."""

    names: tuple[str, ...]
    weights: int
    """Number of weights in all its layers."""
    candidates: tuple[Candidate, ...]


def allocate_bits(
    streamed: StreamedModel,
    config: QuantizeConfig,
    calibration: Calibration,
    earlier: Path | None,
    reopen: Callable[[], StreamedModel],
) -> QuantizeConfig:
    """Returns `config` with a width for every layer in `dynamic`; unchanged without `target_bpw`.

    Args:
        streamed: the model.
        config: settings; layers that its `dynamic` matches keep their settings.
        calibration: calibration windows.
        earlier: output folder; widths are taken from an earlier run of the same command there. None:
            nothing there counts, as with --restart.
        reopen: opens the model once more, for the measurement, which uses it up.

    Raises:
        ConfigError: the size is too small even for the smallest candidates.
    """
    if config.target_bpw is None or not _has_open_layers(streamed, config):
        return config
    dynamic = _earlier_choice(streamed, config, calibration, earlier) if earlier else None
    if dynamic is None:
        groups = measure_sensitivity(reopen(), config, calibration)
        chosen = choose_candidates(groups, config.target_bpw)
        dynamic = {**config.dynamic, **as_dynamic(groups, chosen)}
    return config.model_copy(update={"dynamic": dynamic})


def measure_sensitivity(
    streamed: StreamedModel, config: QuantizeConfig, calibration: Calibration
) -> list[LayerGroup]:
    """Measures the loss of every candidate of every layer group, in one pass through the model.

    Args:
        streamed: the model; it cannot be used afterwards.
        config: settings; layers that its `dynamic` matches are in no group.
        calibration: calibration windows.
    """
    streamed.load_outside_blocks()
    measured: list[LayerGroup] = []
    with ForwardScheduler(
        streamed.model, streamed.blocks, calibration.batches,
        policy=ExpertCalibration(config.experts, config.expert_tokens), device=streamed.device,
    ) as scheduler:  # fmt: skip
        for block in streamed.blocks:
            if block.is_head:  # it keeps its configured width
                break
            scheduler.advance_to_block()
            streamed.load(block.module, block.prefix)
            groups = scheduler.discover_groups(block)

            def measure(
                run_block: RunBlock,
                original: list[torch.Tensor],
                block: Block = block,
                groups: list[InputGroup] = groups,
            ) -> None:
                with timer.phase("survey"):
                    measured.extend(_measure_block(block, groups, config, run_block, original))

            scheduler.try_weights(block, groups, measure, tokens=CANDIDATE_TOKENS)
            streamed.unload(block.module, block.prefix)
    return measured


def choose_candidates(groups: Sequence[LayerGroup], target: float) -> list[Candidate]:
    """Chooses one candidate for each group, with a small total loss, within a size.

    Args:
        groups: layer groups with measured candidates.
        target: maximum size of all groups together, in bits per weight.

    Raises:
        ConfigError: even the smallest candidates are larger; the message names their size.
    """
    weights = sum(group.weights for group in groups)
    budget = target * weights / 8
    chosen = [min(group.candidates, key=lambda c: (c.nbytes, c.loss)) for group in groups]
    spent = sum(candidate.nbytes for candidate in chosen)
    if spent > budget:
        raise ConfigError(
            f"target_bpw={target:g} is too small: the smallest widths need {8 * spent / weights:.2f} "
            "bits per weight"
        )
    while True:
        best: tuple[float, int, Candidate] | None = None
        for index, (group, now) in enumerate(zip(groups, chosen, strict=True)):
            for candidate in group.candidates:
                more, gain = candidate.nbytes - now.nbytes, now.loss - candidate.loss
                if gain <= 0 or spent + more > budget:
                    continue
                gain_per_byte = gain / more if more > 0 else float("inf")
                if best is None or gain_per_byte > best[0]:
                    best = (gain_per_byte, index, candidate)
        if best is None:
            return chosen
        _, index, candidate = best
        spent += candidate.nbytes - chosen[index].nbytes
        chosen[index] = candidate


def as_dynamic(
    groups: Sequence[LayerGroup], chosen: Sequence[Candidate]
) -> dict[str, dict[str, Any] | None]:
    """Returns rules for `QuantizeConfig.dynamic`: one for all layers with the same bits and group size.

    Names of layers that an engine fuses are added.

    Args:
        groups: layer groups.
        chosen: the candidate of each group.
    """
    alike: dict[tuple[int, int], list[str]] = {}
    for group, candidate in zip(groups, chosen, strict=True):
        alike.setdefault((candidate.bits, candidate.group_size), []).extend(group.names)
    return {
        f"^(?:{'|'.join(map(re.escape, with_packed_names(names)))})$": {
            "bits": bits,
            "group_size": size,
        }
        for (bits, size), names in sorted(alike.items())
    }


def _measure_block(
    block: Block,
    groups: Sequence[InputGroup],
    config: QuantizeConfig,
    run_block: RunBlock,
    original: list[torch.Tensor],
) -> Iterator[LayerGroup]:
    """Yields the layer groups of a block with their measured candidates.

    Args:
        block: the block, with its original weights.
        groups: its input groups, with complete Hessians.
        config: settings.
        run_block: runs the block with the weights that are in place.
        original: outputs of the block with its original weights.
    """
    for members in _groups_that_must_agree(block, groups, config):
        names = [
            name for group in members for name in group.names if not config.is_overridden(name)
        ]
        weights = {name: weight_of(block.linears[name]) for name in names}
        before = {name: block.linears[name].weight for name in names}
        hessians = [_take_hessian(group) for group in members]
        candidates = []
        for settings in _candidate_settings(weights, config):
            nbytes = 0
            for group, H in zip(members, hessians, strict=True):
                prepared = _prepare(H, settings)
                for name in (name for name in group.names if name in weights):
                    W = weights[name]
                    _quantize(block, name, W, prepared, settings)
                    nbytes += packed_bytes(len(W), W.shape[1], settings)
            loss = _relative_distance(run_block(), original)
            for name, weight in before.items():
                block.linears[name].weight = weight
            candidates.append(Candidate(settings.bits, settings.group_size, nbytes, loss))
        if candidates:
            total = sum(W.numel() for W in weights.values())
            yield LayerGroup(tuple(names), total, tuple(candidates))


def _groups_that_must_agree(
    block: Block, groups: Sequence[InputGroup], config: QuantizeConfig
) -> list[list[InputGroup]]:
    """Joins the groups of all experts of a layer: engines take one width for all of them."""
    joined: dict[str, list[InputGroup]] = {}
    for group in groups:
        if any(not config.is_overridden(name) for name in group.names):
            paths = [p for p in block.experts if any(n.startswith(f"{p}.") for n in group.names)]
            joined.setdefault(paths[0] if paths else group.names[0], []).append(group)
    return list(joined.values())


def _candidate_settings(
    weights: dict[str, torch.Tensor], config: QuantizeConfig
) -> Iterator[QuantizeConfig]:
    """Yields the settings that all layers of a group can be stored with."""
    quick = {**QUICK, "target_bpw": None}
    for bits in config.target_widths:
        for size in dict.fromkeys((config.group_size, *CANDIDATE_GROUP_SIZES)):
            settings = config.merged({**quick, "bits": bits, "group_size": size})
            if not any(shape_problem(len(W), W.shape[1], settings) for W in weights.values()):
                yield settings


def _take_hessian(group: InputGroup) -> torch.Tensor | None:
    """Returns the group's Hessian [in, in] and drops all its sums; None: it saw no token."""
    moments = group.take_moments()
    group.clear()
    return moments.H if moments is not None else None


def _prepare(H: torch.Tensor | None, settings: QuantizeConfig) -> PreparedHessian | None:
    """Orders and factors a Hessian; None if there is none or it is singular."""
    try:
        return None if H is None else prepare_hessian(H, settings)
    except SingularError:
        return None


def _quantize(
    block: Block, name: str, W: torch.Tensor, H: PreparedHessian | None, settings: QuantizeConfig
) -> None:
    """Replaces a linear's weight by its quantized values; rounds to nearest without a Hessian."""
    q = round_to_nearest(W, settings) if H is None else solve(W, H, settings)
    set_weight(block.linears[name], q.dequantize(W.dtype))


def _relative_distance(outputs: list[torch.Tensor], original: list[torch.Tensor]) -> float:
    """Returns the mean over tokens of ||y' - y||² / ||y||²."""
    total, count = 0.0, 0
    for y, exact in zip(outputs, original, strict=True):
        moved = (y.to(torch.float32) - exact.to(torch.float32)).square().sum(-1)
        size = exact.to(torch.float32).square().sum(-1).clamp_min(1e-30)
        total += float((moved / size).sum())
        count += moved.numel()
    return total / max(count, 1)


def _earlier_choice(
    streamed: StreamedModel, config: QuantizeConfig, calibration: Calibration, out: Path
) -> dict[str, dict[str, Any] | None] | None:
    """Returns `dynamic` of an earlier run of the same command in `out`, finished or not; else None."""
    manifest = read_manifest(out) if out.is_dir() else None
    known = manifest.run if manifest else read_journal(out).fingerprint
    if known is None or known.calibration != calibration.record:
        return None
    rules = [(pattern, changes) for pattern, changes in known.config["dynamic"]]
    given = [*config.dynamic.items()]
    wanted = config.model_dump(mode="json")
    same_settings = {**known.config, "dynamic": None} == {**wanted, "dynamic": None}
    if not same_settings or rules[: len(given)] != given:
        return None
    return dict(rules) if known.model.as_json() == streamed.checkpoint.identity() else None


def _has_open_layers(streamed: StreamedModel, config: QuantizeConfig) -> bool:
    """Returns True if there is a layer whose settings no pattern of `dynamic` decides."""
    return any(
        not config.is_overridden(name)
        for block in streamed.blocks
        if not block.is_head
        for name in block.linears
    )
