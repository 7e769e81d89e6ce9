"""All that comes before a run: the model opened, its text read, and what cannot work refused.

Nothing is written here, so that bad input leaves no trace.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from roundwise.calibration.dataset import Calibration, load_calibration
from roundwise.calibration.self_generated import generate_windows
from roundwise.checkpoint.gptq_format import check_shape
from roundwise.checkpoint.hub import local_folder
from roundwise.checkpoint.reader import Checkpoint
from roundwise.config import Mode, QuantizeConfig
from roundwise.errors import CalibrationError, ConfigError
from roundwise.forward.expert_tokens import check_experts
from roundwise.model.blocks import weight_of
from roundwise.model.build import arguments
from roundwise.model.fake_forward import CallTrace, drop_uncalled_linears
from roundwise.model.rotate import rotated_checkpoint
from roundwise.model.streamed import StreamedModel, open_streamed_model
from roundwise.run import environment, strict
from roundwise.run.bit_allocation import allocate_bits
from roundwise.run.held_out_damping import held_out_batches
from roundwise.run.loop import Run
from roundwise.run.prescale import Prescaler
from roundwise.system.device import parse_device
from roundwise.system.distributed import Ranks, current_ranks
from roundwise.system.memory import parse_size, release_large_blocks
from roundwise.system.timer import timer


@dataclass(frozen=True)
class Prepared:
    """A run that can begin, and what is to be said about it."""

    begun: float
    """time.monotonic() when preparing began."""
    run: Run
    warnings: list[str]
    """Advice."""
    not_as_asked: list[str]


def prepare(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: QuantizeConfig,
    calibration: str | os.PathLike[str] | Sequence[Any] | None,
    *,
    samples: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    only: str | None,
    mode: Mode | None,
    max_memory: str | int | None,
    device: str,
) -> Prepared:
    """Checks everything that can be checked beforehand; arguments as for `quantize`.

    Raises:
        UsageError: input or settings that cannot work.
    """
    begun = time.monotonic()
    timer.take()
    release_large_blocks()
    model = os.fspath(model)
    ranks = current_ranks()
    place = ranks.local_device(parse_device(device))
    streamed, calls, notes = _open(model, config, place)
    skipped = _check(streamed, config)
    if isinstance(calibration, os.PathLike):
        calibration = os.fspath(calibration)
    texts = _calibration(
        streamed, config, calibration, ranks,
        samples=samples, seq_len=seq_len, batch_size=batch_size, seed=seed, only=only,
    )  # fmt: skip
    _check_ranks(ranks, streamed, texts)
    held_out_batches(config, len(texts.batches) if texts else 0)  # refuses one batch
    if texts is not None and config.target_bpw is not None:
        found, asked_for, windows = streamed, config, texts
        chosen = ranks.broadcast_object(
            lambda: allocate_bits(
                found, asked_for, windows, Path(out), lambda: _open(model, asked_for, place)[0]
            ).model_dump(mode="json")
        )
        config = QuantizeConfig(**chosen)
        _check(streamed, config)
    given = {"model": model, "calibration": calibration if isinstance(calibration, str) else None}
    run = Run(
        streamed, Path(out), config, texts, mode, parse_size(max_memory), None, given, ranks, begun
    )
    not_as_asked = [
        *strict.check_run(streamed, config, calls),
        *(texts.not_as_asked if texts else []),
    ]
    if config.prescales:
        run.prescaler = Prescaler(streamed, config)
        not_as_asked += run.prescaler.left_out()
    not_as_asked += strict.memory_issues(run.forecast(mode), mode, run.forecast("true_sequential"))
    return Prepared(
        begun, run, [*(texts.warnings if texts else []), *notes, *skipped], not_as_asked
    )


def _open(
    model: str, config: QuantizeConfig, device: torch.device
) -> tuple[StreamedModel, CallTrace, list[str]]:
    """The model as it is quantized, what its forward calls, and what is to be said about its files."""
    streamed = open_streamed_model(local_folder(model), lm_head=config.lm_head, device=device)
    notes = streamed.notes
    if config.rotate:
        rotated = rotated_checkpoint(streamed.checkpoint, config.rotation_seed)
        streamed = open_streamed_model(rotated, lm_head=config.lm_head, device=device)
    return streamed, drop_uncalled_linears(streamed, config), notes


def _check(streamed: StreamedModel, config: QuantizeConfig) -> list[str]:
    """Refuses what cannot be stored, before any work; what is left as it is, by name."""
    names = [name for block in streamed.blocks for name in block.linears]
    left = [name for name in names if config.for_module(name) is None]
    if len(left) == len(names):
        raise ConfigError("every linear layer is skipped: nothing to quantize")
    for block in streamed.blocks:
        check_experts(block, config)
        for name, linear in block.linears.items():
            settings = config.for_module(name)
            if settings is not None:
                out_features, in_features = weight_of(linear).shape
                check_shape(name, out_features, in_features, settings)
    return [f"{len(left)} of {len(names)} linear layers are left as they are"] if left else []


def _check_ranks(ranks: Ranks, streamed: StreamedModel, texts: Calibration | None) -> None:
    """Refuses ranks that cannot share a run: too many of them, or unlike ones."""
    if texts is not None and ranks.count > len(texts.batches):
        raise ConfigError(
            f"{ranks.count} ranks cannot share {len(texts.batches)} batches of calibration windows: "
            "take fewer ranks, more --samples, or a smaller --batch-size"
        )
    if not ranks.is_single:
        ranks.check_identical(
            {
                **environment.numeric_environment(streamed.device),
                "the calibration text": texts.digest if texts else None,
                "the model's files": sorted(streamed.checkpoint.tensors),
            }
        )


def _calibration(
    streamed: StreamedModel,
    config: QuantizeConfig,
    source: str | Sequence[Any] | None,
    ranks: Ranks,
    *,
    samples: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    only: str | None,
) -> Calibration | None:
    """Tokenized calibration windows; None for rounding to nearest, which needs none."""
    if config.method == "rtn":
        return None
    if source is None:
        raise CalibrationError(
            f"{config.method} needs calibration text: --calibration FILE, a named set such as "
            "python-stdlib or wikitext2, or self: what the model writes"
        )
    arguments(streamed.model, torch.zeros(1, 1, dtype=torch.int64))  # refuses what is not fed text
    text_config = streamed.model.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or seq_len
    widest = max(
        weight_of(linear).shape[1] for block in streamed.blocks for linear in block.linears.values()
    )
    tokenizer = None
    if isinstance(source, str) or any(isinstance(item, str) for item in source):
        tokenizer = load_tokenizer(streamed.checkpoint)
    length = min(seq_len, limit)
    loaded = load_calibration(
        source, tokenizer,
        samples=samples, seq_len=length, batch_size=batch_size, seed=seed, widest=widest, only=only,
        generate=lambda count: ranks.broadcast_object(
            lambda: generate_windows(
                streamed.checkpoint, tokenizer,
                samples=count, seq_len=length, batch_size=batch_size, seed=seed,
                device=streamed.device,
            )
        ),
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
