"""Calibration: batches of token windows from text or token ids, with warnings about too little text."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from roundwise.calibration.held_out import windows_per_batch
from roundwise.calibration.media import has_media
from roundwise.calibration.overlap import minhash
from roundwise.calibration.records import Chat, Document
from roundwise.calibration.self_generated import SELF
from roundwise.calibration.sources import parse_mixture, read_documents
from roundwise.calibration.special_tokens import NO_SPECIAL_TOKENS, SpecialTokens, special_tokens
from roundwise.calibration.windows import (
    Batch,
    Window,
    make_batches,
    sample_windows,
    tokenize_documents,
    tokenize_item,
)
from roundwise.checkpoint.manifest import CalibrationRecord
from roundwise.config import CalibrationConfig
from roundwise.errors import CalibrationError

#: Tokenizing is slow: at most this many characters per requested token are tokenized, a few times more
#: than needed. A longer text is sampled in random pieces of PIECE characters.
CHARACTERS_PER_TOKEN, PIECE = 16, 16 << 10
#: Fewest characters of a source that are tokenized.
MIN_CHARACTERS = 1 << 20
#: Length in tokens of the pieces that `unique_share` compares.
PIECE_TOKENS = 8
#: Largest settings: more would only take time and memory, and no method needs as many.
LIMITS = {"samples": 1_000_000, "seq_len": 10_000_000, "batch_size": 1_000_000}
#: With fewer samples, or fewer tokens than channels, a Hessian is noisy.
ADVISED_SAMPLES = 128


@dataclass(frozen=True)
class Calibration:
    """Batches of calibration windows, their record, and messages about them."""

    batches: list[Batch]
    record: CalibrationRecord
    """Origin and hash of the windows: equal records mean equal windows."""
    warnings: tuple[str, ...] = ()
    """Advice."""
    not_as_asked: tuple[str, ...] = ()
    """Issues: the text has less than was requested, or some of it is not used."""


@dataclass(frozen=True)
class _Windows:
    """Windows and where they came from."""

    windows: list[Window] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """Name of each source; of several, with its number of windows."""
    texts: list[list[str]] = field(default_factory=list)
    """Name and SHA-256 of each source's text."""
    left_out: list[str] = field(default_factory=list)
    """Sentences about parts of the texts that are not used."""


def load_calibration(
    source: str | Sequence[Any],
    tokenizer: Any,
    config: CalibrationConfig,
    *,
    widest: int = 0,
    generate: Callable[[int], list[list[int]]] | None = None,
    encode: Callable[[Chat], Window] | None = None,
    hold_out: bool = False,
) -> Calibration:
    """Makes batches of token windows from a text, several texts, or a Python list.

    Args:
        source: a source of `read_documents`, or several with weights (see `parse_mixture`); or a list
            whose items are one window each, used in the given order: strings, token ids, or dicts with
            `input_ids` and maybe `attention_mask`.
        tokenizer: transformers tokenizer.
        config: number of windows, their length, batch size and seed.
        widest: largest in_features of the model, for the warning about too few tokens.
        generate: returns this many windows of token ids that the model wrote, for the source `self`.
        encode: returns the window of a chat with pictures or sounds; None: the model takes none.
        hold_out: makes at least eight batches, so that one can be held out.

    Raises:
        CalibrationError: no text, no tokens, or an invalid setting.
    """
    special = special_tokens(tokenizer) if config.special_tokens else NO_SPECIAL_TOKENS
    _check_config(config, special)
    issues: list[str] = []
    if isinstance(source, str):
        drawn = _windows_of_sources(source, tokenizer, config, special, generate, encode)
        issues += drawn.left_out
    elif config.only is not None:
        raise CalibrationError(
            f"only={config.only} is for chats, and a list of windows holds no chats"
        )
    else:
        drawn, issues = _windows_of_list(source, tokenizer, config, special)
    if not drawn.windows:
        by = f" by the {config.only}" if config.only else ""
        raise CalibrationError(f"the calibration text holds no tokens{by}")
    if len(drawn.windows) < config.samples:
        issues.append(
            f"the calibration text gives only {len(drawn.windows)} of {config.samples} windows"
        )
    record = _record(drawn, config)
    size = config.batch_size
    if hold_out:
        size = windows_per_batch(len(drawn.windows), size)
    return Calibration(
        batches=make_batches(drawn.windows, size),
        record=record,
        warnings=(*_warnings(record, widest),),
        not_as_asked=(*issues,),
    )


def _check_config(config: CalibrationConfig, special: SpecialTokens) -> None:
    for name, most in LIMITS.items():
        if not 1 <= getattr(config, name) <= most:
            raise CalibrationError(
                f"{name}={getattr(config, name)}: must be at least 1 and at most {most}"
            )
    if config.only not in (None, "assistant"):
        raise CalibrationError(f"only={config.only!r} is not supported: use assistant")
    if config.seq_len <= special.count:
        raise CalibrationError(
            f"seq_len={config.seq_len}: every window has {special.count} special tokens of the "
            "tokenizer and needs one of the text at least"
        )


def _record(drawn: _Windows, config: CalibrationConfig) -> CalibrationRecord:
    """Returns the record of the drawn windows."""
    digest = hashlib.sha256()
    for window in drawn.windows:
        digest.update(torch.tensor([len(window.tokens), *window.tokens]).numpy().tobytes())
        if window.counted is not None:
            digest.update(bytes(window.counted))
        for name, value in sorted(window.inputs.items()):
            digest.update(name.encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    ids = [window.tokens for window in drawn.windows]
    only: dict[str, Any] = {"only": config.only} if config.only else {}
    return CalibrationRecord(
        samples=len(drawn.windows),
        tokens=sum(window.count() for window in drawn.windows),
        sha256=digest.hexdigest(),
        source=", ".join(drawn.names),
        texts=drawn.texts,
        wanted=config.samples,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        **only,
        special_tokens=config.special_tokens,
        distinct=len({token for window in ids for token in window}),
        unique_share=unique_share(ids),
        sketch=minhash(ids),
    )


def _windows_of_sources(
    source: str,
    tokenizer: Any,
    config: CalibrationConfig,
    special: SpecialTokens,
    generate: Callable[[int], list[list[int]]] | None,
    encode: Callable[[Chat], Window] | None,
) -> _Windows:
    """Draws windows from all sources of a mixture, in numbers that follow their weights."""
    generator, seq_len, drawn = random.Random(config.seed), config.seq_len, _Windows()
    parts = parse_mixture(source)
    counts = split_by_weight(config.samples, [weight for _, weight in parts])
    for (name, _), count in zip(parts, counts, strict=True):
        if name == SELF and generate is not None:
            windows = [Window(tokens) for tokens in generate(count)]
            drawn.texts.append([SELF, _digest([window.tokens for window in windows])])
        else:
            characters = max(CHARACTERS_PER_TOKEN * count * seq_len, MIN_CHARACTERS)
            text, left_out = read_documents(name)
            drawn.left_out.extend(left_out)
            drawn.texts.append([Path(name).name, _digest(text)])
            pictured = [d for d in text if isinstance(d, Chat) and has_media(d.messages)]
            windows, notes = _windows_of_media(
                pictured, len(text), count, config, generator, encode
            )
            drawn.left_out.extend(notes)
            rest = count - len(windows)
            if rest and len(pictured) < len(text):
                plain = [d for d in text if isinstance(d, str) or not has_media(d.messages)]
                documents = _sample_documents(plain, characters, generator)
                stream = tokenize_documents(documents, tokenizer, config.only)
                windows += sample_windows(stream, rest, seq_len, generator, special)
        drawn.windows.extend(windows)
        number = "" if len(parts) == 1 else f": {len(windows)}"
        drawn.names.append(f"{Path(name).name}{number}")
    if len(parts) > 1:
        generator.shuffle(drawn.windows)  # every batch sees some of each
    return drawn


def _windows_of_media(
    chats: list[Chat],
    documents: int,
    count: int,
    config: CalibrationConfig,
    generator: random.Random,
    encode: Callable[[Chat], Window] | None,
) -> tuple[list[Window], list[str]]:
    """Makes a window of each of some chats with pictures or sounds, which cannot be cut.

    Args:
        chats: the chats.
        documents: number of documents of their source, with those of text alone.
        count: number of windows of the source.
        config: settings.
        generator: source of random numbers.
        encode: see `load_calibration`.

    Returns:
        The windows, and sentences about chats that are left out.
    """
    if not chats:
        return [], []
    if encode is None or config.only:
        why = "only=assistant is for chats of text" if config.only else "the model takes text alone"
        raise CalibrationError(f"{chats[0].place or 'a chat'} has a picture or a sound, but {why}")
    wanted = max(1, round(count * len(chats) / documents))
    chosen = generator.sample(chats, min(len(chats), wanted))
    windows = [encode(chat) for chat in chosen]
    fitting = [window for window in windows if len(window.tokens) <= config.seq_len]
    longest = max(len(window.tokens) for window in windows)
    if not fitting:
        raise CalibrationError(
            f"all chats with pictures or sounds are longer than seq_len={config.seq_len} tokens and "
            f"cannot be cut: the longest has {longest}"
        )
    left_out = len(windows) - len(fitting)
    note = (
        f"{left_out} of {len(windows)} chats with pictures or sounds are left out: they are longer than "
        f"seq_len={config.seq_len} tokens (up to {longest}) and cannot be cut"
    )
    return fitting, [note] * bool(left_out)


def _digest(documents: Sequence[Any]) -> str:
    """Returns the SHA-256 of documents in their order."""
    digest = hashlib.sha256()
    for document in documents:
        value = document.as_json() if isinstance(document, Chat) else document
        # The bytes of pictures and sounds are in the hash of the windows.
        digest.update(json.dumps(value, default=lambda part: type(part).__name__).encode() + b"\n")
    return digest.hexdigest()


def split_by_weight(total: int, weights: Sequence[float]) -> list[int]:
    """Splits `total` into whole parts, none below 1, by the method of largest remainders.

    Args:
        total: number to split.
        weights: weight of each part; they add up to 1.
    """
    exact = [total * weight for weight in weights]
    parts = [int(part) for part in exact]
    order = sorted(range(len(exact)), key=lambda i: parts[i] - exact[i])
    for index in order[: total - sum(parts)]:
        parts[index] += 1
    return [max(1, part) for part in parts]


def _sample_documents(
    documents: list[Document], characters: int, generator: random.Random
) -> list[Document]:
    """Returns all documents, or random pieces of them if they are longer than `characters`."""
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


def _windows_of_list(
    source: Sequence[Any], tokenizer: Any, config: CalibrationConfig, special: SpecialTokens
) -> tuple[_Windows, list[str]]:
    """Makes a window of each item, and tells in words which items are dropped or cut.

    Strings get the tokenizer's special tokens; token ids are taken as they are.
    """
    windows, longer = [], 0
    used = list(islice(source, config.samples))
    for item in used:
        around = special if isinstance(item, str) else NO_SPECIAL_TOKENS
        tokens, room = tokenize_item(item, tokenizer), config.seq_len - around.count
        longer += len(tokens) > room
        if tokens:
            windows.append(Window(around.add_to(tokens[:room])))
    issues = []
    if len(source) > len(used):
        issues.append(
            f"only the first {len(used)} of {len(source)} calibration items are used: samples"
        )
    if longer:
        issues.append(
            f"{longer} of {len(used)} calibration items are cut to seq_len={config.seq_len} tokens"
        )
    return _Windows(windows, ["list"]), issues


def _warnings(record: CalibrationRecord, widest: int) -> list[str]:
    lines = []
    if record.samples < ADVISED_SAMPLES:
        lines.append(f"{record.samples} calibration samples: {ADVISED_SAMPLES} or more are advised")
    if record.tokens < widest:
        lines.append(
            f"{record.tokens} calibration tokens are fewer than the {widest} input channels of the "
            "widest layer: its Hessian does not have full rank and depends on damping"
        )
    if record.unique_share < 0.5:
        lines.append(
            f"the calibration text is mostly repetition: only {record.unique_share:.0%} of its pieces "
            f"of {PIECE_TOKENS} tokens are different"
        )
    return lines


def unique_share(windows: list[list[int]]) -> float:
    """Returns the fraction of distinct pieces of `PIECE_TOKENS` tokens; 1.0 if there are no pieces."""
    size = PIECE_TOKENS
    pieces = [tuple(w[i : i + size]) for w in windows for i in range(0, len(w) - size + 1, size)]
    return len({*pieces}) / len(pieces) if pieces else 1.0
