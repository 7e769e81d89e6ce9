"""finalize: joins the blocks into shards, writes side files and the manifest, audits, config.json last.

Until config.json is there, no library takes the folder for a model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from roundwise.checkpoint.engines import served_by
from roundwise.checkpoint.formats import COMPRESSED_TENSORS, SUFFIXES, quantization_config
from roundwise.checkpoint.manifest import (
    MANIFEST,
    RUN,
    BlockRecord,
    ExpertCoverage,
    LayerRecord,
    Manifest,
    RunRecord,
    Shard,
    ShardRecord,
)
from roundwise.checkpoint.quantization_config import OLD_FILE
from roundwise.checkpoint.reader import INDEX_FILE, TensorInfo, read_header
from roundwise.checkpoint.sharding import divide_into_shards, write_index
from roundwise.checkpoint.side_files import WORK
from roundwise.checkpoint.untrusted import file_digest
from roundwise.checkpoint.writer import copy_side_files, sync_folder, write_json, write_safetensors
from roundwise.model.conversions import dense_layers
from roundwise.model.expert_weights import unquantized_tensors
from roundwise.model.streamed import StreamedModel
from roundwise.plan.plan import served_layers
from roundwise.publish.card import CARD, HUB_ID, write_card
from roundwise.run.environment import platform_info
from roundwise.run.journal import Journal, block_file, check_file
from roundwise.run.prepare import RunPlan
from roundwise.system.memory import peak_rss
from roundwise.system.timer import timer
from roundwise.verify import audit


def packed_block(
    streamed: StreamedModel,
    index: int,
    packed: dict[str, dict[str, torch.Tensor]],
) -> dict[str, Any]:
    """The tensors of a finished block: quantized ones packed, all others as they were.

    Args:
        streamed: the model.
        index: number of the block.
        packed: linear -> suffix -> packed tensor.
    """
    stems = {
        streamed.checkpoint_name_of[f"{name}.weight"].removesuffix(".weight"): name
        for name in packed
    }
    block = streamed.block_tensors(index)
    others = unquantized_tensors(block, {*stems})
    tensors: dict[str, Any] = {}
    for tensor in block:
        stem, _, kind = tensor.rpartition(".")
        if stem in stems and kind == "weight":
            parts = packed[stems[stem]].items()
            tensors |= {f"{stem}.{suffix}": part for suffix, part in parts}
        elif tensor in others:
            tensors[tensor] = others[tensor]
    return tensors | others


def plan_shards(streamed: StreamedModel, done: list[BlockRecord]) -> list[Shard]:
    """Divides the checkpoint into files: its blocks in order, then each tensor outside them.

    Args:
        streamed: the model.
        done: records of all blocks.
    """
    others, count = _other_tensors(streamed), len(done)
    sizes = [record.nbytes for record in done] + [info.nbytes for info in others.values()]
    names = [*others]
    return [
        Shard(
            name=file,
            blocks=[part for part in parts if part < count],
            others=[names[part - count] for part in parts if part >= count],
        )
        for file, parts in divide_into_shards(sizes).items()
    ]


def join_blocks(
    streamed: StreamedModel, out: Path, done: list[BlockRecord], journal: Journal
) -> dict[str, str]:
    """Copies the blocks' files and the tensors outside the blocks into the shards of the checkpoint.

    Each shard is recorded in the journal before its blocks' files are removed. So the disk holds one
    shard twice at most, and a stopped run resumes at the first shard that is not recorded.

    Returns:
        Shard -> SHA-256.

    Raises:
        CheckpointError: the model was changed meanwhile.
        RunError: a block's file was.
        StorageError: the disk is full or failed.
    """
    recorded, others = journal.read().shards, _other_tensors(streamed)
    for record in recorded:
        journal.remove_joined(record)
    written = {record.shard.name: record.sha256 for record in recorded}
    for shard in plan_shards(streamed, done)[len(recorded) :]:
        tensors: dict[str, TensorInfo] = {}
        for index in shard.blocks:
            file = out / WORK / block_file(index)
            check_file(file, done[index].sha256)
            tensors |= read_header(file)
        tensors |= {name: others[name] for name in shard.others}
        written[shard.name] = write_safetensors(out / shard.name, tensors)
        streamed.checkpoint.check_unchanged()
        journal.shard_done(ShardRecord(shard=shard, sha256=written[shard.name]))
    return written


def _other_tensors(streamed: StreamedModel) -> dict[str, TensorInfo]:
    return unquantized_tensors(streamed.other_tensors(), set())


def finalize(
    plan: RunPlan,
    out: Path,
    done: list[BlockRecord],
    journal: Journal,
    *,
    issues: list[str],
    lap: Callable[[], dict[str, float]],
) -> Manifest:
    """Completes the checkpoint around its finished blocks, and audits it.

    Args:
        plan: of the run.
        out: output folder.
        done: records of all blocks.
        journal: of the run.
        issues: what could not be done as asked.
        lap: returns the seconds of each phase since the last block.

    Returns:
        The manifest. But for where model and text were, it is free of times and places: equal runs
        write equal manifests.

    Raises:
        CheckpointError, RunError: the model, or a block's file, was changed meanwhile.
        VerificationError: what is on the disk is not what was computed.
        StorageError: the disk is full or failed.
    """
    streamed, source = plan.streamed, plan.streamed.checkpoint
    files = join_blocks(streamed, out, done, journal)
    shards = [*files]
    files |= _write_side_files(plan, out, shards)
    layers = [layer for record in done for layer in record.layers]
    manifest = Manifest(
        run=plan.fingerprint,
        given=plan.given,
        platform=platform_info(),
        mode=plan.fingerprint.mode,
        bits_per_weight=_bits_per_weight(out, shards, layers, streamed),
        bytes_before=source.nbytes(),
        bytes_after=sum(i.nbytes for name in shards for i in read_header(out / name).values()),
        layers=layers,
        blocks=[record.summary() for record in done],
        experts=[
            ExpertCoverage(name=name, tokens=tokens)
            for record in done
            for name, tokens in record.experts.items()
        ],
        served_by=served_by(served_layers(streamed, plan.config)),
        files=files,
    )
    source.check_unchanged()
    write_json(out / MANIFEST, manifest.as_json())
    given = plan.given.model
    is_id = not Path(given).exists() and HUB_ID.fullmatch(given) is not None
    write_card(
        out, manifest, source.config, source=source.folder, base_model=given if is_id else None
    )
    draft = _draft(out)
    audit(out, against=source, config_file=draft.name).raise_on_failure()
    with timer.phase("write"):  # ends the phase around it, so that `lap` is complete
        record = run_record(done, lap(), warnings=[*plan.warnings], issues=issues)
        write_json(out / RUN, record.as_json())
    os.replace(draft, out / "config.json")
    sync_folder(out)
    return manifest


def run_record(
    done: list[BlockRecord], last: dict[str, float], *, warnings: list[str], issues: list[str]
) -> RunRecord:
    """Seconds by phase, whichever process worked; those lost with a killed process are not in it.

    Args:
        done: records of all blocks.
        last: seconds by phase after the last block.
        warnings, issues: of the run.
    """
    phases: dict[str, float] = {}
    for part in [*(record.seconds for record in done), last]:
        for phase, seconds in part.items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    return RunRecord(
        seconds=sum(phases.values()),
        phases=phases,
        blocks=[float(sum(record.seconds.values())) for record in done],
        peak_rss_bytes=peak_rss(),
        warnings=warnings,
        not_as_asked=issues,
    )


def _draft(out: Path) -> Path:
    """config.json under a name that no library looks for, until everything else is there."""
    return out / "config.json.draft"


def _write_side_files(plan: RunPlan, out: Path, shards: list[str]) -> dict[str, str]:
    """Writes index, configs and the source's side files; file -> SHA-256."""
    source = plan.streamed.checkpoint
    write_index(out, shards)
    copied = [name for name in copy_side_files(source, out) if name != CARD]
    settings = _quantization_config(plan)
    names = copied
    if plan.config.format != COMPRESSED_TENSORS:  # its readers look into config.json only
        write_json(out / OLD_FILE, settings)
        names.insert(0, OLD_FILE)
    write_json(_draft(out), {**source.config, "quantization_config": settings})
    if len(shards) > 1:
        names.insert(0, INDEX_FILE)
    return {name: file_digest(out / name) for name in names} | {
        "config.json": file_digest(_draft(out))
    }


def _quantization_config(plan: RunPlan) -> dict[str, Any]:
    """Returns the config that engines read."""
    streamed = plan.streamed
    linears = [name for block in streamed.blocks for name in block.linears]
    file_names = {
        name: streamed.checkpoint_name_of[f"{name}.weight"].removesuffix(".weight")
        for name in linears
    }
    every_block = [*streamed.blocks, *streamed.skipped_blocks]
    quantized = {*linears, *file_names.values()}
    return quantization_config(
        plan.config, true_sequential=plan.fingerprint.mode == "true_sequential",
        linears=file_names,
        skipped=[name for block in every_block for name in block.skipped_linears],
        outside=dense_layers(streamed.model, streamed.checkpoint.tensors, quantized),
        ignored=streamed.ignored_modules(),
        head=next((block.name for block in streamed.blocks if block.is_head), None),
    )  # fmt: skip


def _bits_per_weight(
    out: Path, shards: list[str], layers: list[LayerRecord], streamed: StreamedModel
) -> float:
    """Stored bits of the quantized layers, with scales and zeros, per weight that they stand for."""
    stems = {
        streamed.checkpoint_name_of[f"{layer.name}.weight"].removesuffix("weight")
        for layer in layers
    }
    stored = sum(
        info.nbytes
        for name in shards
        for tensor, info in read_header(out / name).items()
        for suffix in SUFFIXES
        if tensor.endswith(suffix) and tensor.removesuffix(suffix) in stems
    )
    tensors = streamed.checkpoint.tensors
    weights = 0
    for stem in stems:
        rows, columns = tensors[f"{stem}weight"].shape
        weights += rows * columns
    return 8 * stored / weights
