"""prepare: opens the model, reads the text, checks what can be checked, and returns a `RunPlan`.

Nothing is written here, so that bad input leaves no trace.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from roundwise.calibration.dataset import Calibration, load_calibration
from roundwise.calibration.encoded_media import encode_chat
from roundwise.calibration.records import Chat
from roundwise.calibration.self_generated import generate_windows
from roundwise.calibration.windows import Window
from roundwise.checkpoint.manifest import Fingerprint, GivenNames, ModelIdentity
from roundwise.config import CalibrationConfig, Mode, QuantizeConfig, RunConfig
from roundwise.errors import CalibrationError, ConfigError, OutputError, quoted
from roundwise.forward.expert_tokens import check_experts
from roundwise.model.blocks import towers, weight_of
from roundwise.model.build import context_length, embedding_shape, forward_kwargs
from roundwise.model.fake_forward import CallTrace, drop_uncalled_linears
from roundwise.model.rotate import open_for_run
from roundwise.model.streamed import StreamedModel
from roundwise.model.tokenizer import load_processor, load_tokenizer
from roundwise.plan.layer_formats import fit_group_size, format_problems, layer_shapes
from roundwise.plan.memory import MemoryPlan, plan_memory
from roundwise.run.bit_allocation import allocate_bits
from roundwise.run.environment import numeric_environment
from roundwise.run.strict import check_run, memory_issues
from roundwise.system.activity import announce
from roundwise.system.device import parse_device
from roundwise.system.distributed import Ranks, current_ranks
from roundwise.system.hub import local_folder
from roundwise.system.memory import parse_size, release_large_blocks
from roundwise.system.timer import timer


@dataclass(frozen=True)
class RunPlan:
    """A run that can begin: what it needs to know, and what is to be said about it."""

    streamed: StreamedModel
    config: QuantizeConfig
    """Settings; with `target_bpw`, every layer's width is in `dynamic` by now."""
    calibration: Calibration | None
    """None: the method needs no text."""
    memory: MemoryPlan
    requested_mode: Mode | None
    """Mode that the user asked for."""
    budget: int | None
    """Bytes of memory that the user allows; None: as there are."""
    given: GivenNames
    ranks: Ranks
    threads: int
    warnings: tuple[str, ...]
    """Advice."""
    issues: tuple[str, ...]
    """Requests that cannot be honoured."""
    begun: float
    """time.monotonic() when preparing began."""

    @property
    def mode(self) -> Mode | None:
        """The mode of the run; None: it has no forward, and nobody asked for one."""
        return self.requested_mode if self.calibration is None else self.memory.mode

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Everything that decides the bytes of the result; a function of the plan alone.

        Reads all weight files once, for their hashes.
        """
        config = self.config.model_dump(mode="json")
        # The first pattern that matches wins: their order counts, which a JSON object's does not.
        config["dynamic"] = [list(item) for item in config["dynamic"].items()]
        found = numeric_environment(self.streamed.device)
        return Fingerprint(
            config=config,
            model=ModelIdentity(**self.streamed.checkpoint.identity()),
            calibration=self.calibration.record if self.calibration else None,
            mode=self.mode or "none",
            **{**found, "threads": self.threads},
        )

    def resuming(self, known: Fingerprint | None) -> RunPlan:
        """The plan with what an earlier run of it found on its machine: mode and number of threads.

        The mode is taken over unless the user asked for one; the number of threads decides the order
        of summation. `known` None: there was no earlier run.
        """
        if known is None:
            return self
        mode = self.requested_mode or (None if known.mode == "none" else known.mode)
        threads = known.threads if "threads" in known else self.threads
        return replace(self, memory=self.plan_memory(mode), threads=threads)

    def plan_memory(self, mode: Mode | None) -> MemoryPlan:
        """Plans the memory of the run in a mode; None: in the mode that memory allows."""
        return _plan_memory(
            self.streamed, self.config, self.calibration, self.ranks, mode=mode, budget=self.budget
        )


def prepare(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: QuantizeConfig,
    calibration: str | os.PathLike[str] | Sequence[Any] | None,
    windows: CalibrationConfig,
    options: RunConfig,
) -> RunPlan:
    """Checks everything that can be checked before a run; arguments as for `quantize`.

    Raises:
        UsageError: input or settings that cannot work.
    """
    begun = time.monotonic()
    timer.take()
    release_large_blocks()
    model = os.fspath(model)
    _check_name(Path(out))
    budget = parse_size(options.max_memory)
    ranks = current_ranks()
    device = ranks.local_device(parse_device(options.device))
    announce("opening the model")
    streamed, calls = _open(model, config, device)
    config, group_note = fit_group_size(layer_shapes(streamed.blocks), config)
    notes = [*streamed.warnings, *streamed.ignored_note(), *([group_note] if group_note else [])]
    skipped = _check(streamed, config)
    if isinstance(calibration, os.PathLike):
        calibration = os.fspath(calibration)
    announce("reading the calibration text")
    loaded = _calibration(streamed, config, calibration, windows, ranks)
    _check_ranks(ranks, streamed, loaded)
    if loaded is not None and config.target_bpw is not None:
        announce("choosing the bits of every layer")
        earlier = None if options.restart else Path(out)
        config = _allocate_bits(streamed, config, loaded, earlier, model, ranks)
    announce("planning memory")
    memory = _plan_memory(streamed, config, loaded, ranks, mode=options.mode, budget=budget)
    sequential = _plan_memory(
        streamed, config, loaded, ranks, mode="true_sequential", budget=budget
    )
    return RunPlan(
        streamed=streamed,
        config=config,
        calibration=loaded,
        memory=memory,
        requested_mode=options.mode,
        budget=budget,
        given=GivenNames(
            model=model, calibration=calibration if isinstance(calibration, str) else None
        ),
        ranks=ranks,
        threads=torch.get_num_threads(),
        warnings=(
            *(loaded.warnings if loaded else ()),
            *notes,
            *skipped,
            *streamed.checkpoint.left_out(),
        ),
        issues=(
            *check_run(streamed, config, calls),
            *(loaded.not_as_asked if loaded else ()),
            *memory_issues(memory, options.mode, sequential),
        ),
        begun=begun,
    )


def _check_name(out: Path) -> None:
    """Refuses an output folder whose name no file system takes."""
    try:
        out.exists()
    except OSError as error:
        raise OutputError(f"{quoted(str(out))} cannot be a folder: {error.strerror}") from None


def _open(
    model: str, config: QuantizeConfig, device: torch.device
) -> tuple[StreamedModel, CallTrace]:
    """The model to quantize, and which layers its forward calls; others are not quantized."""
    streamed = open_for_run(local_folder(model), config, device)
    return streamed, drop_uncalled_linears(streamed, config)


def _check(streamed: StreamedModel, config: QuantizeConfig) -> list[str]:
    """Refuses what cannot be stored; a line that says how many layers are skipped, if any."""
    names = [name for block in streamed.blocks for name in block.linears]
    skipped = [name for name in names if config.for_module(name) is None]
    if len(skipped) == len(names):
        raise ConfigError("every linear layer is skipped: nothing to quantize")
    for block in streamed.blocks:
        check_experts(block, config)
    problems = format_problems(layer_shapes(streamed.blocks), config)
    if problems:
        raise ConfigError("; ".join(problems))
    return [f"{len(skipped)} of {len(names)} linear layers are left as they are"] if skipped else []


def _check_ranks(ranks: Ranks, streamed: StreamedModel, calibration: Calibration | None) -> None:
    """Refuses ranks that cannot share a run: too many, or different ones."""
    if calibration is not None and ranks.count > len(calibration.batches):
        raise ConfigError(
            f"{ranks.count} ranks cannot share {len(calibration.batches)} batches of calibration "
            "windows: take fewer ranks, more --samples, or a smaller --batch-size"
        )
    if not ranks.is_single:
        ranks.check_identical(
            {
                **numeric_environment(streamed.device),
                "the calibration text": calibration.record.sha256 if calibration else None,
                "the model's files": sorted(streamed.checkpoint.tensors),
            }
        )


def _allocate_bits(
    streamed: StreamedModel,
    config: QuantizeConfig,
    calibration: Calibration,
    earlier: Path | None,
    model: str,
    ranks: Ranks,
) -> QuantizeConfig:
    """`config` with a width for every layer, which the first rank chooses for all."""

    def choose() -> Any:
        chosen = allocate_bits(
            streamed, config, calibration, earlier, lambda: _open(model, config, streamed.device)[0]
        )
        return chosen.model_dump(mode="json")

    chosen = QuantizeConfig(**ranks.broadcast_object(choose))
    _check(streamed, chosen)
    return chosen


def _plan_memory(
    streamed: StreamedModel,
    config: QuantizeConfig,
    calibration: Calibration | None,
    ranks: Ranks,
    *,
    mode: Mode | None,
    budget: int | None,
) -> MemoryPlan:
    batches = calibration.batches if calibration else []
    return plan_memory(
        streamed, config,
        tokens=-(-calibration.record.tokens // ranks.count) if calibration else 0,
        batch=max((b.input_ids.numel() for b in batches), default=0),
        mode=mode, budget=budget, sharing=ranks.processes_sharing(streamed.device),
    )  # fmt: skip


def _calibration(
    streamed: StreamedModel,
    config: QuantizeConfig,
    source: str | Sequence[Any] | None,
    windows: CalibrationConfig,
    ranks: Ranks,
) -> Calibration | None:
    """Tokenized calibration windows; None for rounding to nearest, which needs none."""
    if config.method == "rtn":
        return None
    if source is None:
        raise CalibrationError(
            f"{config.method} needs calibration text: --calibration FILE, a named set such as "
            "python-stdlib or wikitext2, or self: text that the model writes"
        )
    forward_kwargs(
        streamed.model, torch.zeros(1, 1, dtype=torch.int64)
    )  # refuses other input than text
    limit = context_length(streamed.model) or windows.seq_len
    widest = max(
        weight_of(linear).shape[1] for block in streamed.blocks for linear in block.linears.values()
    )
    tokenizer = None
    if isinstance(source, str) or any(isinstance(item, str) for item in source):
        tokenizer = load_tokenizer(streamed.checkpoint)
    fitting = windows.model_copy(update={"seq_len": min(windows.seq_len, limit)})

    def generate(count: int) -> list[list[int]]:
        wanted = fitting.model_copy(update={"samples": count})
        return ranks.broadcast_object(
            lambda: generate_windows(streamed.checkpoint, tokenizer, wanted, device=streamed.device)
        )

    parts = towers(streamed.model)
    loaded = load_calibration(
        source, tokenizer, fitting, widest=widest, generate=generate,
        encode=_media_encoder(streamed) if parts else None, hold_out=config.needs_reference,
    )  # fmt: skip
    if parts and not any(batch.inputs for batch in loaded.batches):
        line = (
            "the model takes pictures or sounds, but is calibrated with text alone: records with "
            "`images` beside their messages show the language model what it will see"
        )
        loaded = replace(loaded, warnings=(*loaded.warnings, line))
    _check_vocabulary(loaded, embedding_shape(streamed.model)[0])
    if windows.seq_len > limit:
        line = f"seq_len is {limit}, the longest text the model takes, not {windows.seq_len}"
        loaded = replace(loaded, not_as_asked=(*loaded.not_as_asked, line))
    return loaded


def _media_encoder(streamed: StreamedModel) -> Callable[[Chat], Window]:
    """Returns the function that encodes a chat with pictures or sounds."""
    accepted = inspect.signature(streamed.model.forward).parameters
    processor = cache(lambda: load_processor(streamed.checkpoint))  # loaded for the first chat
    return lambda chat: encode_chat(chat, processor(), accepted.__contains__)


def _check_vocabulary(calibration: Calibration, vocabulary: int) -> None:
    ends = [int(end) for batch in calibration.batches for end in torch.aminmax(batch.input_ids)]
    wrong = next((token for token in ends if not 0 <= token < (vocabulary or token + 1)), None)
    if wrong is not None:
        raise CalibrationError(
            f"calibration has token id {wrong}, but the model's vocabulary has {vocabulary} tokens: "
            "is it another model's tokenizer?"
        )
