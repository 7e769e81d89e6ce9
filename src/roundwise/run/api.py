"""quantize: checks everything that can be checked beforehand, runs, and reports."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from roundwise.checkpoint.manifest import ExpertCoverage, LayerRecord, Manifest
from roundwise.checkpoint.writer import storage_error
from roundwise.config import CalibrationConfig, Mode, QuantizeConfig, RunConfig
from roundwise.errors import Interrupted, RunError
from roundwise.run.journal import read_journal
from roundwise.run.loop import Progress, Run
from roundwise.run.prepare import RunPlan, prepare
from roundwise.run.reporter import reporting
from roundwise.run.resume import begin_run, broadcast_record, finished_manifest, lock_output_dir
from roundwise.run.strict import layer_issues, raise_if_layers_strict, raise_if_strict
from roundwise.system.activity import logger
from roundwise.system.device import HOST, peak_memory
from roundwise.system.memory import peak_rss
from roundwise.system.timer import timer

__all__ = ["Progress", "QuantizeResult", "execute", "quantize"]


@dataclass(frozen=True)
class QuantizeResult:
    """Result of a run; `as_dict` is what `roundwise quantize --json` prints."""

    output: Path
    seconds: float
    peak_rss_bytes: int
    device: str
    peak_device_bytes: int | None
    """Peak memory of tensors on the device; None: it is the CPU."""
    planned_peak_bytes: int
    """Peak memory that the plan expected of a run from the first block to the last, on its device."""
    phases: dict[str, float]
    """Seconds by kind of work: start (all before the first block), gradients, read, forward, hessian,
    drift, watch, factor, solve, refine, pack, write, exchange (between ranks, with waiting), finish; of
    this process, where it resumed another's run."""
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    mode: str
    layers: list[LayerRecord]
    experts: list[ExpertCoverage]
    """For each module of experts, its name and how many calibration tokens its router sent to each."""
    warnings: list[str]
    """Advice: worth knowing, though everything was done as asked."""
    not_as_asked: list[str]
    """Issues: what could not be done as asked; with `strict` an error instead."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **vars(self), "output": str(self.output),
            "layers": [layer.as_json() for layer in self.layers],
            "experts": [module.as_json() for module in self.experts],
        }  # fmt: skip


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
    special_tokens: bool = True,
    mode: Mode | None = None,
    max_memory: str | int | None = None,
    device: str = "auto",
    restart: bool = False,
    strict: bool = False,
    progress: Callable[[Progress], None] | bool | None = None,
) -> QuantizeResult:
    """Quantizes a Hugging Face checkpoint into a checkpoint in the standard GPTQ format.

    Args:
        model: folder, or id on the Hugging Face hub.
        out: folder for the result. If an earlier run of the same command was stopped there, its
            finished blocks are kept and the result has the same bytes.
        config: settings; the default is 4 bit, symmetric, groups of 128.
        calibration: text file, JSONL file, named set, Python list (see `load_calibration`), or "self":
            text that the model writes. Needed unless the method is rtn.
        samples, seq_len, batch_size, seed, only, special_tokens: see `CalibrationConfig`.
        mode, max_memory, device, restart, strict: see `RunConfig`.
        progress: called after each layer and each block; True: shows a bar on stderr, or in a notebook.

    Raises:
        UsageError: input or settings that cannot work; nothing has been written.
        RunError: the work failed or was interrupted; finished blocks are kept.
        StrictError, FallbackError: among these two, the issues that `strict` refuses.
    """
    windows = CalibrationConfig(
        samples=samples, seq_len=seq_len, batch_size=batch_size, seed=seed, only=only,
        special_tokens=special_tokens,
    )  # fmt: skip
    options = RunConfig(
        mode=mode, max_memory=max_memory, device=device, restart=restart, strict=strict
    )
    with reporting(progress) as report:
        plan = prepare(model, out, config or QuantizeConfig(), calibration, windows, options)
        return execute(plan, Path(out), options, report)


def execute(
    plan: RunPlan,
    out: Path,
    options: RunConfig,
    progress: Callable[[Progress], None] | None = None,
) -> QuantizeResult:
    """Carries out a plan; errors as for `quantize`.

    Args:
        plan: from `prepare`.
        out: output folder.
        options: `restart` and `strict` count here.
        progress: called after each layer and each block.
    """
    strict = options.strict
    for line in (*plan.warnings, *plan.issues):
        logger.warning("%s", line)
    if strict:
        raise_if_strict(plan.issues)
        progress = _strict_progress(progress)
    source = plan.streamed.checkpoint.folder
    first = plan.ranks.is_first
    journal = lock_output_dir(out, source, restart=options.restart) if first else None
    run = Run(plan, out, progress, strict=strict)
    try:
        if strict and journal is not None:
            raise_if_layers_strict(journal.layers())
        manifest = broadcast_record(plan.ranks, Manifest, lambda: finished_manifest(out, plan))
        if manifest is None:
            plan, done = begin_run(plan, out, journal)
            run = Run(plan, out, progress, strict=strict)
            manifest = run.execute(done, journal)
        if strict:  # a finished checkpoint that was found may be of a run that was not strict
            raise_if_layers_strict(manifest.layers)
        if journal is not None:
            journal.finish()
    except (KeyboardInterrupt, OSError, MemoryError, RuntimeError) as error:
        explained = _explained(error, plan, out)
        if explained is None:
            raise
        raise explained from error
    finally:
        timer.device = HOST
        if journal is not None:
            journal.close()
    return _result(run, manifest)


def _strict_progress(progress: Callable[[Progress], None] | None) -> Callable[[Progress], None]:
    """`progress` that also ends the run at the first layer with an issue."""

    def step(reached: Progress) -> None:
        raise_if_layers_strict([reached.layer] if reached.layer else [])
        if progress is not None:
            progress(reached)

    return step


def _explained(error: BaseException, plan: RunPlan, out: Path) -> RunError | None:
    """An error that says what ended a run and what is kept; None: `error` is a fault of ours."""
    if isinstance(error, KeyboardInterrupt):
        done, blocks = len(read_journal(out).blocks), len(plan.streamed.blocks)
        return Interrupted(
            f"stopped; {done} of {blocks} blocks are finished and kept in {out}: "
            "run the same command again to resume"
        )
    if isinstance(error, OSError):
        return storage_error(error, Path(error.filename or out))
    lacking = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if lacking or "allocate memory" in str(error):
        return RunError(
            "out of memory; finished blocks are kept: free some memory and run the same command again, "
            "or --restart with fewer --samples (`roundwise plan` says what is needed)"
        )
    return None


def _result(run: Run, manifest: Manifest) -> QuantizeResult:
    run.take_seconds()
    plan, phases = run.plan, run.seconds
    seconds = time.monotonic() - plan.begun
    start = seconds - sum(phases.values()) + phases.get("start", 0.0)
    device = plan.streamed.device
    return QuantizeResult(
        output=run.out,
        seconds=seconds,
        peak_rss_bytes=peak_rss(),
        device=str(device),
        peak_device_bytes=peak_memory(device),
        planned_peak_bytes=plan.memory.peak_bytes,
        phases={**phases, "start": start},
        bits_per_weight=manifest.bits_per_weight,
        bytes_before=manifest.bytes_before,
        bytes_after=manifest.bytes_after,
        mode=manifest.mode,
        layers=manifest.layers,
        experts=manifest.experts,
        warnings=[*plan.warnings],
        not_as_asked=[*run.issues, *layer_issues(manifest.layers)],
    )
