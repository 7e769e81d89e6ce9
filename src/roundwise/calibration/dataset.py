"""Calibration: from text to batches of token windows, and warnings about what is thin."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from roundwise.calibration.overlap import minhash
from roundwise.calibration.self_generated import SELF
from roundwise.calibration.sources import Document, mixture, read_documents
from roundwise.calibration.windows import (
    Batch,
    Window,
    batches_of,
    cut_windows,
    item_tokens,
    tokenize,
)
from roundwise.checkpoint.manifest import CalibrationRecord
from roundwise.config import CalibrationConfig
from roundwise.errors import CalibrationError

#: Tokenizing is slow: of a long text, this many characters per wanted token are tokenized, which is
#: a few times more than needed, in random pieces of this size.
CHARACTERS_PER_TOKEN, PIECE = 16, 16 << 10
#: Tokens of a piece, for telling repetition.
PIECE_TOKENS = 8
#: Fewer samples than this, or fewer tokens than channels, give a noisy Hessian.
ADVISED_SAMPLES = 128


@dataclass(frozen=True)
class Calibration:
    """Batches of calibration windows, and what is to be said about them."""

    batches: list[Batch]
    record: CalibrationRecord
    """Where the windows came from and their hash: equal records mean equal windows."""
    warnings: tuple[str, ...] = ()
    """Advice."""
    not_as_asked: tuple[str, ...] = ()
    """Issues: where the text gives less than was asked for."""


def load_calibration(
    source: str | Sequence[Any],
    tokenizer: Any,
    config: CalibrationConfig,
    *,
    widest: int = 0,
    generate: Callable[[int], list[list[int]]] | None = None,
) -> Calibration:
    """Cuts token windows from a named source, a file, or a Python list, and makes batches of them.

    Args:
        source: what `read_documents` takes, several with weights (see `mixture`); or a list of
            strings, of token id lists, or of dicts with `input_ids` (and `attention_mask`), each
            item one window, used in the given order.
        tokenizer: transformers tokenizer.
        config: number of windows, their length, batch size and seed.
        widest: largest in_features of the model, for the warning about too few tokens.
        generate: draws so many windows from the model itself, for the source `self`.

    Raises:
        CalibrationError: no text, no tokens, or settings below 1.
    """
    _check(config)
    names, texts, not_as_asked = ["list"], list[list[str]](), list[str]()
    if isinstance(source, str):
        windows, names, texts = _from_sources(source, tokenizer, config, generate)
    elif config.only is not None:
        raise CalibrationError("only: a list holds no chats whose turns could be told apart")
    else:
        items = [item_tokens(item, tokenizer) for item in islice(source, config.samples)]
        not_as_asked = _cut_off(items, len(source), config.seq_len)
        windows = [Window(item[: config.seq_len]) for item in items if item]
    if not windows:
        by = f" by the {config.only}" if config.only else ""
        raise CalibrationError(f"the calibration text holds no tokens{by}")
    if len(windows) < config.samples:
        not_as_asked.append(
            f"the calibration text gives only {len(windows)} of {config.samples} windows"
        )
    record = _record(windows, names, texts, config)
    return Calibration(
        batches=batches_of(windows, config.batch_size),
        record=record,
        warnings=(*_warnings(record, widest),),
        not_as_asked=(*not_as_asked,),
    )


def _check(config: CalibrationConfig) -> None:
    for name in ("samples", "seq_len", "batch_size"):
        if getattr(config, name) < 1:
            raise CalibrationError(f"{name}={getattr(config, name)}: must be at least 1")
    if config.only not in (None, "assistant"):
        raise CalibrationError(f"only={config.only!r} is not supported: use assistant")


def _record(
    windows: list[Window], names: list[str], texts: list[list[str]], config: CalibrationConfig
) -> CalibrationRecord:
    """The record of some windows."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(torch.tensor([len(window.tokens), *window.tokens]).numpy().tobytes())
        if window.counted is not None:
            digest.update(bytes(window.counted))
    ids = [window.tokens for window in windows]
    return CalibrationRecord(
        samples=len(windows),
        tokens=sum(window.count() for window in windows),
        sha256=digest.hexdigest(),
        source=", ".join(names),
        texts=texts,
        wanted=config.samples,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        **({"only": config.only} if config.only else {}),
        distinct=len({token for window in ids for token in window}),
        unique_share=unique_share(ids),
        sketch=minhash(ids),
    )


def _from_sources(
    source: str,
    tokenizer: Any,
    config: CalibrationConfig,
    generate: Callable[[int], list[list[int]]] | None,
) -> tuple[list[Window], list[str], list[list[str]]]:
    """Windows of all sources; the name of each, with its number of windows; names and hashes."""
    generator, seq_len = random.Random(config.seed), config.seq_len
    parts = mixture(source)
    counts = shares(config.samples, [weight for _, weight in parts])
    windows, names, texts = list[Window](), [], []
    for (name, _), count in zip(parts, counts, strict=True):
        if name == SELF and generate is not None:
            drawn = [Window(tokens) for tokens in generate(count)]
            texts.append([SELF, _digest([window.tokens for window in drawn])])
        else:
            wanted = max(CHARACTERS_PER_TOKEN * count * seq_len, 1 << 20)
            whole = read_documents(name)
            texts.append([Path(name).name, _digest(whole)])
            documents = _sample_documents(whole, wanted, generator)
            stream = tokenize(documents, tokenizer, config.only)
            drawn = cut_windows(stream, count, seq_len, generator)
        windows += drawn
        names.append(Path(name).name if len(parts) == 1 else f"{Path(name).name}: {len(drawn)}")
    if len(parts) > 1:
        generator.shuffle(windows)  # every batch sees some of each
    return windows, names, texts


def _digest(documents: Sequence[Any]) -> str:
    """SHA-256 of a text: of all its documents, in their order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document).encode() + b"\n")
    return digest.hexdigest()


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole parts that are as the weights, by largest remainders; none is below 1."""
    exact = [total * weight for weight in weights]
    found = [int(part) for part in exact]
    order = sorted(range(len(exact)), key=lambda i: found[i] - exact[i])
    for index in order[: total - sum(found)]:
        found[index] += 1
    return [max(1, part) for part in found]


def _sample_documents(
    documents: list[Document], characters: int, generator: random.Random
) -> list[Document]:
    """All documents, or random pieces of them when they are far longer than what is needed."""
    sizes = [len(document) if isinstance(document, str) else PIECE for document in documents]
    if sum(sizes) <= characters:
        return documents
    pieces: list[Document] = []
    for document in documents:
        if isinstance(document, str):
            pieces += [document[i : i + PIECE] for i in range(0, len(document), PIECE)]
        else:
            pieces.append(document)
    chosen = sorted(
        generator.sample(range(len(pieces)), max(1, characters * len(pieces) // sum(sizes)))
    )
    return [pieces[i] for i in chosen]


def _cut_off(items: list[list[int]], given: int, seq_len: int) -> list[str]:
    """What is not used of a Python list of windows."""
    found = []
    if given > len(items):
        found.append(f"only the first {len(items)} of {given} calibration items are used: samples")
    longer = sum(len(item) > seq_len for item in items)
    if longer:
        found.append(
            f"{longer} of {len(items)} calibration items are cut to seq_len={seq_len} tokens"
        )
    return found


def _warnings(record: CalibrationRecord, widest: int) -> list[str]:
    lines = []
    if record.samples < ADVISED_SAMPLES:
        lines.append(f"{record.samples} calibration samples: {ADVISED_SAMPLES} or more are advised")
    if record.tokens < widest:
        lines.append(
            f"{record.tokens} calibration tokens are fewer than the {widest} input channels of the "
            "widest layer: its Hessian has not full rank and rests on damping"
        )
    if record.unique_share < 0.5:
        lines.append(
            f"the calibration text is mostly repetition: only {record.unique_share:.0%} of its pieces "
            f"of {PIECE_TOKENS} tokens are different"
        )
    return lines


def unique_share(windows: list[list[int]]) -> float:
    """Part of the pieces of a few tokens that are different from one another; 1 where there are none."""
    size = PIECE_TOKENS
    pieces = [tuple(w[i : i + size]) for w in windows for i in range(0, len(w) - size + 1, size)]
    return len({*pieces}) / len(pieces) if pieces else 1.0
