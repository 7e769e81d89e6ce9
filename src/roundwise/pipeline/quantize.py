"""`roundwise.quantize`: checks everything that can be checked beforehand, runs, and reports."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from roundwise.config import QuantizeConfig
from roundwise.core.clock import clock
from roundwise.errors import CalibrationError, ConfigError, Interrupted, RunError
from roundwise.models.checkpoint import Checkpoint
from roundwise.models.fold import rotated
from roundwise.models.formats import check_shape
from roundwise.models.hub import local_folder
from roundwise.models.skeleton import Skeleton, open_skeleton, weight_of
from roundwise.models.writer import storage_error
from roundwise.pipeline import asked
from roundwise.pipeline.calibration import Calibration, load_calibration
from roundwise.pipeline.damping import held_out
from roundwise.pipeline.memory import Mode, parse_size, peak_rss, return_early
from roundwise.pipeline.prescale import Prescaler
from roundwise.pipeline.run import Progress, Run

__all__ = ["Progress", "QuantizeResult", "quantize"]


@dataclass(frozen=True)
class QuantizeResult:
    """What a run did; `as_dict` is what `roundwise quantize --json` prints."""

    output: Path
    seconds: float
    peak_rss_bytes: int
    planned_peak_bytes: int
    """What the plan expected of a run from the first block to the last."""
    phases: dict[str, float]
    """Seconds by kind of work: start (all before the first block), read, forward, hessian, drift,
    factor, solve, refine, pack, write, finish."""
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    mode: str
    layers: list[dict[str, Any]]
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
    mode: Mode | None = None,
    max_memory: str | int | None = None,
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
        calibration: text file, JSONL file, named set or Python list (see `load_calibration`).
            Needed unless the method is rtn.
        samples, seq_len, batch_size, seed: windows of calibration tokens and how they are picked.
        mode: true_sequential or block (see `Conductor.play`); None: as memory allows.
        max_memory: budget for that choice, such as "8GB".
        restart: begin anew even if finished blocks are there.
        strict: what does not go as asked is an error, before work begins where it can be told, instead
            of a line in the result.
        progress: called after each layer and each block.

    Raises:
        UsageError: input or settings that cannot work; nothing has been written.
        RunError: the work failed or was interrupted; finished blocks are kept.
        StrictError, FallbackError: among these two, what `strict` does not let pass.
    """
    begun = time.monotonic()
    clock.take()
    return_early()
    config = config or QuantizeConfig()
    skeleton = open_skeleton(local_folder(model))
    skipped = _check(skeleton, config)
    if config.rotate:
        skeleton = open_skeleton(rotated(skeleton.checkpoint, config.rotation_seed))
    if isinstance(calibration, os.PathLike):
        calibration = os.fspath(calibration)
    texts = _calibration(
        skeleton, config, calibration,
        samples=samples, seq_len=seq_len, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    held_out(config, len(texts.batches) if texts else 0)  # refuses before anything is written
    run = Run(skeleton, Path(out), config, texts, mode, parse_size(max_memory), progress)
    not_as_asked = [*asked.before(skeleton, config), *(texts.not_as_asked if texts else [])]
    if config.prescales:
        run.prescaler = Prescaler(skeleton, config)
        not_as_asked += run.prescaler.left_out()
    not_as_asked += asked.of_memory(run.forecast(mode), mode, run.forecast("true_sequential"))
    if strict:
        asked.refuse(not_as_asked)
        run.progress = asked.strictly(progress)
    journal = run.open(restart=restart)
    try:
        if strict:
            asked.refuse_layers(journal.layers())
        manifest = run.finished() or run.work(journal)
        if strict:  # a finished checkpoint that was found may be of a run that was not
            asked.refuse_layers(manifest["layers"])
        journal.finish()
    except KeyboardInterrupt:
        done = len(journal.read()[1])
        raise Interrupted(
            f"stopped; {done} of {len(skeleton.blocks)} blocks are finished and kept in {out}: "
            "run the same command again to go on"
        ) from None
    except OSError as error:
        raise storage_error(error, Path(error.filename or out)) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise RunError(
                "out of memory; finished blocks are kept: make room and run the same command again, or "
                "--restart with fewer --samples (`roundwise plan` says what is needed)"
            ) from error
        raise
    finally:
        journal.close()
    seconds, phases = time.monotonic() - begun, clock.take()
    assert run.memory is not None
    return QuantizeResult(
        output=Path(out),
        seconds=seconds,
        phases={"start": max(seconds - sum(phases.values()), 0.0), **phases},
        peak_rss_bytes=peak_rss(),
        planned_peak_bytes=run.memory.peak_rss_bytes,
        bits_per_weight=manifest["bits_per_weight"],
        bytes_before=manifest["bytes_before"],
        bytes_after=manifest["bytes_after"],
        mode=manifest["mode"],
        layers=manifest["layers"],
        warnings=[*(texts.warnings if texts else []), *skipped],
        not_as_asked=[*not_as_asked, *asked.of_layers(manifest["layers"])],
    )


def _check(skeleton: Skeleton, config: QuantizeConfig) -> list[str]:
    """Refuses what cannot be stored, before any work; what is left as it is, by name."""
    names = [name for block in skeleton.blocks for name in block.linears]
    left = [name for name in names if config.for_module(name) is None]
    if len(left) == len(names):
        raise ConfigError("every linear layer is skipped: nothing to quantize")
    for block in skeleton.blocks:
        for name, linear in block.linears.items():
            settings = config.for_module(name)
            if settings is not None:
                out_features, in_features = weight_of(linear).shape
                check_shape(name, out_features, in_features, settings)
    return [f"{len(left)} of {len(names)} linear layers are left as they are"] if left else []


def _calibration(
    skeleton: Skeleton,
    config: QuantizeConfig,
    source: str | Sequence[Any] | None,
    *,
    samples: int,
    seq_len: int,
    batch_size: int,
    seed: int,
) -> Calibration | None:
    """Tokenized calibration windows; None for rounding to nearest, which needs none."""
    if config.method == "rtn":
        return None
    if source is None:
        raise CalibrationError(
            f"{config.method} needs calibration text: --calibration FILE, or a named set such as "
            "python-stdlib or wikitext2"
        )
    text_config = skeleton.model.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or seq_len
    widest = max(
        weight_of(linear).shape[1] for block in skeleton.blocks for linear in block.linears.values()
    )
    tokenizer = None
    if isinstance(source, str) or any(isinstance(item, str) for item in source):
        tokenizer = load_tokenizer(skeleton.checkpoint)
    loaded = load_calibration(
        source, tokenizer,
        samples=samples, seq_len=min(seq_len, limit), batch_size=batch_size, seed=seed, widest=widest,
    )  # fmt: skip
    vocabulary = int(text_config.vocab_size)
    ends = [int(end) for batch in loaded.batches for end in torch.aminmax(batch.input_ids)]
    wrong = next((token for token in ends if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise CalibrationError(
            f"calibration has token id {wrong}, but the model knows {vocabulary}: "
            "is it another model's tokenizer?"
        )
    if seq_len > limit:
        loaded.not_as_asked.append(
            f"seq_len is {limit}, the longest text the model takes, not {seq_len}"
        )
    return loaded


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer; no code that comes with it is run."""
    try:
        return transformers.AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds here; all mean the same to a user
        reason = str(error).strip().split("\n", 1)[0]
        raise CalibrationError(f"{checkpoint.folder} has no usable tokenizer: {reason}") from error
