"""The run from checkpoint to checkpoint, one block at a time.

For each block: read its weights; let all calibration batches play it, solving each group of linears
where they stop; write the shard; record it in the journal; drop the weights. What is finished stays
finished: the same command goes on at the first block that is not.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from roundwise.config import QuantizeConfig
from roundwise.core.quantized import QuantizedWeight
from roundwise.core.solver import round_to_nearest, solve
from roundwise.errors import (
    CalibrationError,
    ConfigError,
    Interrupted,
    NumericalError,
    OutputError,
    RunError,
    SingularError,
)
from roundwise.models.checkpoint import Checkpoint, file_digest
from roundwise.models.formats import check_shape, encode
from roundwise.models.hub import local_folder
from roundwise.models.skeleton import Block, Skeleton, open_skeleton, set_weight, weight_of
from roundwise.models.writer import write_safetensors
from roundwise.pipeline.calibration import Calibration, load_calibration
from roundwise.pipeline.conduct import Conductor, Group
from roundwise.pipeline.finish import MANIFEST, Manifest, finish, shard_name
from roundwise.pipeline.journal import WORK, Journal
from roundwise.pipeline.memory import Mode, choose_mode, parse_size, peak_rss
from roundwise.version import __version__


@dataclass(frozen=True)
class Progress:
    """One step forward, for whoever shows it."""

    block: int
    blocks: int
    resumed: int
    """Blocks that an earlier run had finished."""
    layer: dict[str, Any] | None
    """The layer just solved, as in the result; None: the whole block is written."""


@dataclass(frozen=True)
class QuantizeResult:
    """What a run did; `as_dict` is what `roundwise quantize --json` prints."""

    output: Path
    seconds: float
    peak_rss_bytes: int
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    mode: str
    layers: list[dict[str, Any]]
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "output": str(self.output)}


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: QuantizeConfig | None = None,
    calibration: str | Sequence[Any] | None = None,
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
        strict: a layer that cannot be solved is an error instead of a recorded fallback.
        progress: called after each layer and each block.

    Raises:
        UsageError: input or settings that cannot work; nothing has been written.
        RunError: the work failed or was interrupted; finished blocks are kept.
    """
    begun = time.monotonic()
    config = config or QuantizeConfig()
    skeleton = open_skeleton(local_folder(model))
    skipped = _check(skeleton, config)
    texts = _calibration(
        skeleton, config, calibration,
        samples=samples, seq_len=seq_len, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    if config.method == "gptq" and mode is None:
        mode = choose_mode(skeleton, texts.tokens if texts else 0, parse_size(max_memory))
    run = _Run(skeleton, Path(out), config, texts, mode, strict, progress)
    journal = run.open(restart=restart)
    try:
        manifest = run.finished() or run.work(journal)
        journal.finish()
    except KeyboardInterrupt:
        done = len(journal.read()[1])
        raise Interrupted(
            f"stopped; {done} of {len(skeleton.blocks)} blocks are finished and kept in {out}: "
            "run the same command again to go on"
        ) from None
    finally:
        journal.close()
    return QuantizeResult(
        output=Path(out),
        seconds=time.monotonic() - begun,
        peak_rss_bytes=peak_rss(),
        bits_per_weight=manifest["bits_per_weight"],
        bytes_before=manifest["bytes_before"],
        bytes_after=manifest["bytes_after"],
        mode=manifest["mode"],
        layers=manifest["layers"],
        warnings=[*(texts.warnings if texts else []), *skipped],
    )


@dataclass
class _Run:
    """One run; the methods follow it in time."""

    skeleton: Skeleton
    out: Path
    config: QuantizeConfig
    texts: Calibration | None
    mode: Mode | None
    strict: bool
    progress: Callable[[Progress], None] | None

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the bytes of the result."""
        return {
            "config": self.config.model_dump(mode="json"),
            "model": self.skeleton.checkpoint.identity(),
            "calibration": self.texts.describe() if self.texts else None,
            "mode": self.mode or "none",
            "versions": {
                "roundwise": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    def open(self, *, restart: bool) -> Journal:
        """Locks the output folder; refuses one that holds something else."""
        ours = (self.out / WORK).is_dir() or (self.out / MANIFEST).is_file()
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out} is a file, not a folder")
        if not ours and self.out.is_dir() and any(self.out.iterdir()):
            raise OutputError(
                f"{self.out} already holds something else: give an empty or new folder"
            )
        if self.out.resolve() == self.skeleton.checkpoint.folder.resolve():
            raise OutputError(f"{self.out} is the model itself: give another folder")
        journal = Journal(self.out)
        if restart:
            for path in [*self.out.iterdir(), *journal.folder.iterdir()]:
                if path.name not in (WORK, "lock"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        return journal

    def finished(self) -> dict[str, Any] | None:
        """The manifest, if this very run was completed in the output folder before."""
        if not (self.out / "config.json").exists():
            return None
        manifest = Manifest.read(self.out)
        if manifest is None or manifest["run"] != Manifest.run(self.fingerprint()):
            raise OutputError(
                f"{self.out} holds a finished checkpoint made otherwise: give another folder, "
                "or --restart to replace it"
            )
        return manifest

    def work(self, journal: Journal) -> dict[str, Any]:
        """All blocks that are not finished, then the rest of the checkpoint."""
        fingerprint = self.fingerprint()
        known, done = journal.read()
        if known is None:
            journal.start(fingerprint)
        elif known != fingerprint:
            raise OutputError(
                f"{self.out} holds an unfinished run that differs in {_difference(known, fingerprint)}: "
                "use the same settings to go on, or --restart to begin anew"
            )
        journal.trim()
        for line in done:
            if file_digest(self.out / line["shard"]) != line["sha256"]:
                raise RunError(f"{line['shard']} was changed since it was written: use --restart")
        if len(done) < len(self.skeleton.blocks):
            self._blocks(journal, done)
        return finish(self.skeleton, self.out, self.config, fingerprint, done)

    def _blocks(self, journal: Journal, done: list[dict[str, Any]]) -> None:
        first = len(done)
        if self.texts is None:
            for index in range(first, len(self.skeleton.blocks)):
                self._block(index, journal, done, first, None)
            return
        self.skeleton.load_outside_blocks()
        outputs = journal.load_outputs(done[-1]["activations"]) if done else None
        with Conductor(
            self.skeleton.model,
            self.skeleton.blocks,
            self.texts.batches,
            skip=first,
            outputs=outputs,
        ) as conductor:
            for index in range(first, len(self.skeleton.blocks)):
                conductor.enter()
                self._block(index, journal, done, first, conductor)

    def _block(
        self,
        index: int,
        journal: Journal,
        done: list[dict[str, Any]],
        first: int,
        conductor: Conductor | None,
    ) -> None:
        """One block from weights on disk to shard on disk."""
        block = self.skeleton.blocks[index]
        solved: dict[str, QuantizedWeight] = {}
        layers: list[dict[str, Any]] = []

        def solve_group(group: Group) -> None:
            H = group.hessian.mean() if group.hessian else None
            tokens = group.hessian.tokens if group.hessian else 0
            for name in group.names:
                settings = self.config.for_module(name)
                if settings is None:
                    continue
                q = self._solve(name, weight_of(block.linears[name]), H, settings)
                set_weight(block.linears[name], q.dequantize())
                solved[name] = q
                layers.append(_layer(name, q, settings, tokens))
                self._tell(index, first, layers[-1])

        self.skeleton.load(block.module, block.name)
        activations = None
        if conductor is not None:
            groups = conductor.probe()
            conductor.play(groups, solve_group, sequential=self.mode == "true_sequential")
            activations = journal.save_outputs(index, conductor.outputs())
            # From here on the batches live in the file just written, not in memory.
            conductor.replace_outputs(journal.load_outputs(activations))
        # Linears that the model's forward never called, or all of them without calibration.
        solve_group(Group([name for name in block.linears if name not in solved]))
        shard = shard_name(index, len(self.skeleton.blocks))
        digest = write_safetensors(self.out / shard, self._shard(index, block, solved))
        self.skeleton.unload(block.module, block.name)
        line = {
            "block": index, "shard": shard, "sha256": digest,
            "activations": activations, "layers": layers,
        }  # fmt: skip
        journal.block_done(line)
        done.append(line)
        self._tell(index, first, None)

    def _solve(
        self, name: str, W: torch.Tensor, H: torch.Tensor | None, settings: QuantizeConfig
    ) -> QuantizedWeight:
        """One weight; a named error, or rounding to nearest with the reason recorded."""
        try:
            if settings.method == "rtn":
                return round_to_nearest(W, settings)
            try:
                if H is None:
                    raise SingularError("no calibration token reached this layer")
                return solve(W, H, settings)
            except SingularError as error:
                if self.strict:
                    raise
                return round_to_nearest(W, settings, fallback=str(error))
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from error

    def _shard(
        self, index: int, block: Block, solved: dict[str, QuantizedWeight]
    ) -> dict[str, Any]:
        """The block's tensors as they go to disk: quantized ones packed, all others as they were."""
        replaced = {self.skeleton.source_of[f"{name}.weight"]: name for name in solved}
        tensors: dict[str, Any] = {}
        for tensor, info in self.skeleton.block_tensors(index).items():
            if tensor in replaced:
                name = replaced[tensor]
                stem = tensor.removesuffix("weight")
                settings = self.config.for_module(name)
                assert settings is not None
                parts = encode(solved[name], settings)
                tensors.update({stem + suffix: part for suffix, part in parts.items()})
            else:
                tensors[tensor] = info
        return tensors

    def _tell(self, index: int, first: int, layer: dict[str, Any] | None) -> None:
        if self.progress is not None:
            self.progress(Progress(index, len(self.skeleton.blocks), first, layer))


def _layer(name: str, q: QuantizedWeight, settings: QuantizeConfig, tokens: int) -> dict[str, Any]:
    return {
        "name": name,
        "bits": q.bits,
        "group_size": settings.group_size,
        "relative_error": q.relative_error,
        "weight_error": q.weight_error,
        "damp_percent": q.damp_percent,
        "damp_tried": list(q.damp_tried),
        "tokens": tokens,
        "fallback": q.fallback,
    }


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
            "gptq needs calibration text: --calibration FILE, or a named set such as python-stdlib "
            "or wikitext2"
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
    highest = max(int(batch.input_ids.max()) for batch in loaded.batches)
    if highest >= vocabulary:
        raise CalibrationError(
            f"calibration has token id {highest}, but the model knows {vocabulary}: "
            "is it another model's tokenizer?"
        )
    if seq_len > limit:
        loaded.warnings.append(
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


def _difference(old: Any, new: Any, path: str = "") -> str:
    """Where two nested values differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [
            _difference(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]
        return ", ".join(parts)
    short = [str(value) if len(str(value)) < 24 else "…" for value in (old, new)]
    return f"{path} ({short[0]} -> {short[1]})" if short[0] != short[1] else path
