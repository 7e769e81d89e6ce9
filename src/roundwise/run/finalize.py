"""The end of a run: what is not in a block, side files, manifest, audit; config.json last.

Until config.json is there, no library takes the folder for a model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from roundwise.checkpoint.gptq_format import SUFFIXES, quantization_config
from roundwise.checkpoint.reader import INDEX_FILE, read_header
from roundwise.checkpoint.untrusted import file_digest
from roundwise.checkpoint.writer import copy_file, sync_folder, write_json, write_safetensors
from roundwise.config import QuantizeConfig
from roundwise.model.expert_weights import unquantized_tensors
from roundwise.model.streamed import StreamedModel
from roundwise.run.environment import platform_info
from roundwise.system.memory import peak_rss
from roundwise.system.timer import timer
from roundwise.verify import MANIFEST, RUN, audit

__all__ = ["MANIFEST", "finalize", "shard_name", "timings"]


def shard_name(index: int, blocks: int) -> str:
    """File of block `index`; the tensors outside the blocks come last, as number `blocks`."""
    return f"model-{index + 1:05d}-of-{blocks + 1:05d}.safetensors"


def finalize(
    streamed: StreamedModel,
    out: Path,
    config: QuantizeConfig,
    fingerprint: dict[str, Any],
    given: dict[str, str | None],
    done: list[dict[str, Any]],
    ran: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Completes the checkpoint around its finished blocks, audits it, and returns the manifest.

    Args:
        skeleton: of the model.
        out: output folder.
        config: settings.
        fingerprint: of the run.
        given: where model and text are, as they were given. All else in the manifest is free of times
            and places: equal runs write equal manifests.
        done: journal lines of all blocks.
        ran: what is to be noted about the run, asked at its end.

    Raises:
        CheckpointError: the model was changed meanwhile.
        VerificationError: what is on the disk is not what was computed.
        StorageError: the disk is full or failed.
    """
    source, blocks = streamed.checkpoint, len(streamed.blocks)
    last = shard_name(blocks, blocks)
    files = {line["shard"]: line["sha256"] for line in done}
    files[last] = write_safetensors(
        out / last, unquantized_tensors(streamed.other_tensors(), set())
    )
    _write_index(out, sorted(files))
    for path in source.side_files():
        copy_file(path, out / path.name)
    settings = quantization_config(
        config, true_sequential=fingerprint["mode"] == "true_sequential",
        left=[name for block in [*streamed.blocks, *streamed.skipped_blocks] for name in block.skipped_linears],
        names=[name for block in streamed.blocks for name in block.linears],
    )  # fmt: skip
    write_json(out / "quantize_config.json", settings)
    # The hash of config.json is taken from the same bytes under a name that no library looks for.
    draft = out / "config.json.draft"
    write_json(draft, {**source.config, "quantization_config": settings})
    names = [INDEX_FILE, "quantize_config.json", *(path.name for path in source.side_files())]
    files |= {name: file_digest(out / name) for name in names}
    files["config.json"] = file_digest(draft)
    layers = [layer for line in done for layer in line["layers"]]
    manifest = {
        "run": fingerprint,
        "given": given,
        "platform": platform_info(),
        "mode": fingerprint["mode"],
        "bits_per_weight": _bits_per_weight(out, sorted(files), layers, streamed),
        "bytes_before": source.nbytes(),
        "bytes_after": sum(
            info.nbytes
            for name in files
            if name.endswith(".safetensors")
            for info in read_header(out / name).values()
        ),
        "layers": layers,
        "blocks": [
            {key: line[key] for key in ("name", "depth_error", "saturation")} for line in done
        ],
        "experts": [
            {"name": name, "tokens": tokens}
            for line in done
            for name, tokens in line["experts"].items()
        ],
        "files": files,
    }
    source.check_unchanged()
    write_json(out / MANIFEST, manifest)
    audit(out, against=source, config_file=draft.name).raise_on_failure()
    with timer.phase("write"):  # ends that around it: what `ran` adds up is complete
        write_json(out / RUN, ran())
    os.replace(draft, out / "config.json")
    sync_folder(out)
    return manifest


def timings(done: list[dict[str, Any]], last: dict[str, float]) -> dict[str, Any]:
    """Seconds by kind of work, whichever process did it; what was lost with one is not in it.

    Args:
        done: lines of the journal.
        last: what came after the last block.
    """
    phases: dict[str, float] = {}
    for part in [*(line["seconds"] for line in done), last]:
        for phase, seconds in part.items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    return {
        "seconds": sum(phases.values()),
        "phases": phases,
        "blocks": [sum(line["seconds"].values()) for line in done],
        "peak_rss_bytes": peak_rss(),
    }


def _write_index(out: Path, shards: list[str]) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for shard in shards:
        header = read_header(out / shard)
        weight_map |= dict.fromkeys(header, shard)
        total += sum(info.nbytes for info in header.values())
    write_json(out / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _bits_per_weight(
    out: Path, files: list[str], layers: list[dict[str, Any]], streamed: StreamedModel
) -> float:
    """Stored bits of the quantized layers, everything counted, per weight they stand for."""
    stems = {
        streamed.checkpoint_name_of[f"{layer['name']}.weight"].removesuffix("weight")
        for layer in layers
    }
    stored = sum(
        info.nbytes
        for name in files
        if name.endswith(".safetensors")
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
