"""`roundwise.quantize`: checks everything that can be checked beforehand, runs, and reports."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from roundwise.checkpoint.writer import storage_error
from roundwise.config import Mode, QuantizeConfig
from roundwise.errors import Interrupted, RunError
from roundwise.run.journal import read_journal
from roundwise.run.loop import Progress
from roundwise.run.prepare import Prepared, prepare
from roundwise.run.resume import finished, lock_output_dir
from roundwise.run.strict import (
    layer_issues,
    raise_if_layers_strict,
    raise_if_strict,
    strict_progress,
)
from roundwise.system.device import HOST, peak_memory
from roundwise.system.memory import peak_rss
from roundwise.system.timer import timer

__all__ = ["Progress", "QuantizeResult", "quantize"]


@dataclass(frozen=True)
class QuantizeResult:
    """What a run did; `as_dict` is what `roundwise quantize --json` prints."""

    output: Path
    seconds: float
    peak_rss_bytes: int
    device: str
    peak_device_bytes: int | None
    """Most that tensors held on it; None: it is the CPU."""
    planned_peak_bytes: int
    """What the plan expected of a run from the first block to the last, where it computes."""
    phases: dict[str, float]
    """Seconds by kind of work: start (all before the first block), gradients, read, forward, hessian,
    drift, watch, factor, solve, refine, pack, write, exchange (between ranks, with waiting), finish; of
    this process, where it went on with another's run."""
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    mode: str
    layers: list[dict[str, Any]]
    experts: list[dict[str, Any]]
    """For each module of experts, its name and how many calibration tokens its router sent to each."""
    warnings: list[str]
    """Advice: worth knowing, though everything went as asked."""
    not_as_asked: list[str]
    """What did not go as asked; with `strict` an error instead."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "output": str(self.output)}


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: QuantizeConfig | None = None,
    calibration: str | os.PathLike[str] | Sequence[Any] | None = None,
    *,
    samples: int = 128,
    seq_len: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
    only: str | None = None,
    mode: Mode | None = None,
    max_memory: str | int | None = None,
    device: str = "auto",
    restart: bool = False,
    strict: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> QuantizeResult:
    """Quantizes a Hugging Face checkpoint into a checkpoint in the standard GPTQ format.

    Args:
        model: folder, or id on the Hugging Face hub.
        out: folder for the result. If an earlier run of the same command was stopped there, its
            finished blocks are kept and the result has the same bytes.
        config: settings; the default is 4 bit, symmetric, groups of 128.
        calibration: text file, JSONL file, named set, Python list (see `load_calibration`), or "self":
            text that the model writes. Needed unless the method is rtn.
        samples, seq_len, batch_size, seed: windows of calibration tokens and how they are picked.
        only: "assistant": of chats, only the assistant's turns count.
        mode: true_sequential or block (see `ForwardScheduler.run_block`); None: as memory allows.
        max_memory: budget for that choice, such as "8GB", of the memory of the device.
        device: that computes, "cpu", "cuda" or "cuda:1"; "auto": the first GPU, or the CPU. Blocks are
            read onto it one after another.
        restart: begin anew even if finished blocks are there.
        strict: what does not go as asked is an error, before work begins where it can be told, instead
            of a line in the result.
        progress: called after each layer and each block.

    Raises:
        UsageError: input or settings that cannot work; nothing has been written.
        RunError: the work failed or was interrupted; finished blocks are kept.
        StrictError, FallbackError: among these two, what `strict` does not let pass.
    """
    prepared = prepare(
        model, out, config or QuantizeConfig(), calibration,
        samples=samples, seq_len=seq_len, batch_size=batch_size, seed=seed, only=only,
        mode=mode, max_memory=max_memory, device=device,
    )  # fmt: skip
    return execute(prepared, restart=restart, strict=strict, progress=progress)


def execute(
    prepared: Prepared,
    *,
    restart: bool,
    strict: bool,
    progress: Callable[[Progress], None] | None,
) -> QuantizeResult:
    """Does what was prepared; arguments and errors as for `quantize`."""
    run, not_as_asked = prepared.run, prepared.not_as_asked
    first = run.ranks.first
    run.notes = {"warnings": prepared.warnings, "not_as_asked": not_as_asked}
    run.progress, run.strict = strict_progress(progress) if strict else progress, strict
    raise_if_strict(not_as_asked if strict else [])
    source = run.streamed.checkpoint.folder
    journal = lock_output_dir(run.out, source, restart=restart) if first else None
    try:
        raise_if_layers_strict(journal.layers() if journal and strict else [])
        manifest = run.ranks.broadcast_object(lambda: finished(run.out, run.fingerprint))
        manifest = manifest or run.work(journal)
        # A finished checkpoint that was found may be of a run that was not strict.
        raise_if_layers_strict(manifest["layers"] if strict else [])
        if journal is not None:
            journal.finish()
    except KeyboardInterrupt:
        done, blocks = len(read_journal(run.out)[1]), len(run.streamed.blocks)
        raise Interrupted(
            f"stopped; {done} of {blocks} blocks are finished and kept in {run.out}: "
            "run the same command again to go on"
        ) from None
    except OSError as error:
        raise storage_error(error, Path(error.filename or run.out)) from error
    except (MemoryError, RuntimeError) as error:
        lacking = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if lacking or "allocate memory" in str(error):
            raise RunError(
                "out of memory; finished blocks are kept: make room and run the same command again, or "
                "--restart with fewer --samples (`roundwise plan` says what is needed)"
            ) from error
        raise
    finally:
        timer.device = HOST
        if journal is not None:
            journal.close()
    run.lap()
    seconds = time.monotonic() - prepared.begun
    memory = run.memory or run.forecast(run.mode)
    return QuantizeResult(
        output=run.out,
        seconds=seconds,
        phases={
            **run.spent,
            "start": seconds - sum(run.spent.values()) + run.spent.get("start", 0.0),
        },
        peak_rss_bytes=peak_rss(),
        device=str(run.streamed.device),
        peak_device_bytes=peak_memory(run.streamed.device),
        planned_peak_bytes=memory.peak_bytes,
        bits_per_weight=manifest["bits_per_weight"],
        bytes_before=manifest["bytes_before"],
        bytes_after=manifest["bytes_after"],
        mode=manifest["mode"],
        layers=manifest["layers"],
        experts=manifest["experts"],
        warnings=prepared.warnings,
        not_as_asked=[
            *not_as_asked,
            *layer_issues(manifest["layers"]),
        ],
    )
