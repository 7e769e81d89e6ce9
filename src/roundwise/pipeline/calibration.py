"""Calibration: from text to batches of token windows, and warnings about what is thin."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from roundwise.errors import CalibrationError
from roundwise.pipeline.sketch import sketch
from roundwise.pipeline.texts import Document, mixture, read_documents

#: Tokenizing is slow: of a long text, this many characters per wanted token are tokenized, which is
#: a few times more than needed, in random pieces of this size.
CHARACTERS_PER_TOKEN, PIECE = 16, 16 << 10
#: Fewer samples than this, or fewer tokens than channels, give a noisy Hessian.
ADVISED_SAMPLES = 128


@dataclass
class Batch:
    """Token windows that go through the model together, padded on the right."""

    input_ids: torch.Tensor
    """int64 [windows, length]."""
    mask: torch.Tensor | None
    """bool [windows, length], False on padding; None when there is none."""


@dataclass
class Calibration:
    """Batches, and what is to be said about them."""

    batches: list[Batch]
    samples: int
    tokens: int
    digest: str
    """SHA-256 of the windows: equal digests mean equal calibration."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Where the windows came from and how they were picked."""
    warnings: list[str] = field(default_factory=list)
    """Advice."""
    not_as_asked: list[str] = field(default_factory=list)
    """Where the text gives less than was asked for."""

    def describe(self) -> dict[str, Any]:
        """For the record: two calibrations that describe themselves alike are alike."""
        return {
            "samples": self.samples, "tokens": self.tokens, "sha256": self.digest, **self.settings
        }  # fmt: skip


def load_calibration(
    source: str | Sequence[Any],
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    widest: int = 0,
) -> Calibration:
    """Token windows from a named source, a file, or a Python list.

    Args:
        source: what `read_documents` takes, several with weights (see `mixture`); or a list of
            strings, of token id lists, or of dicts with `input_ids` (and `attention_mask`), each
            item one window, used in the given order.
        tokenizer: transformers tokenizer.
        samples: windows wanted.
        seq_len: tokens of a window, at most.
        batch_size: windows that go through the model together.
        seed: of the private generator that picks windows.
        widest: largest in_features, for the warning about too few tokens.

    Raises:
        CalibrationError: no text, no tokens, or settings below 1.
    """
    for name, value in (("samples", samples), ("seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise CalibrationError(f"{name}={value}: must be at least 1")
    generator = random.Random(seed)
    not_as_asked, texts = [], []
    if isinstance(source, str):
        parts = mixture(source)
        windows, names = [], []
        for (name, _), count in zip(parts, shares(samples, [w for _, w in parts]), strict=True):
            wanted = max(CHARACTERS_PER_TOKEN * count * seq_len, 1 << 20)
            whole = read_documents(name)
            texts.append([Path(name).name, _digest(whole)])
            documents = _sample_documents(whole, wanted, generator)
            drawn = _cut(_tokenize(documents, tokenizer), count, seq_len, generator)
            windows += drawn
            names.append(Path(name).name if len(parts) == 1 else f"{Path(name).name}: {len(drawn)}")
        if len(parts) > 1:
            generator.shuffle(windows)  # every batch sees some of each
    else:
        items = [_item_tokens(item, tokenizer) for item in islice(source, samples)]
        not_as_asked = _cut_off(items, len(source), seq_len)
        windows = [item[:seq_len] for item in items if item]
    if not windows:
        raise CalibrationError("the calibration text holds no tokens")
    if len(windows) < samples:
        not_as_asked.append(f"the calibration text gives only {len(windows)} of {samples} windows")
    digest = hashlib.sha256()
    for window in windows:
        digest.update(torch.tensor([len(window), *window]).numpy().tobytes())
    tokens = sum(map(len, windows))
    return Calibration(
        batches=_batches(windows, batch_size),
        samples=len(windows),
        tokens=tokens,
        digest=digest.hexdigest(),
        settings={
            "source": ", ".join(names) if isinstance(source, str) else "list",
            "texts": texts,
            "wanted": samples,
            "seq_len": seq_len,
            "batch_size": batch_size,
            "seed": seed,
            "sketch": sketch(windows),
        },
        warnings=_warnings(windows, tokens, widest),
        not_as_asked=not_as_asked,
    )


def _digest(documents: list[Document]) -> str:
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


def _tokenize(documents: list[Document], tokenizer: Any) -> list[int]:
    """One stream of tokens, documents separated by the end-of-text token where there is one."""
    stream: list[int] = []
    for document in documents:
        if stream and tokenizer.eos_token_id is not None:
            stream.append(int(tokenizer.eos_token_id))
        stream += _document_tokens(document, tokenizer)
    return stream


def _document_tokens(document: Document, tokenizer: Any) -> list[int]:
    is_text = isinstance(document, str)
    if not is_text and not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            "the calibration file holds chats, but this model's tokenizer has no chat template: "
            "give plain `text` instead"
        )
    try:
        if is_text:
            return list(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        encoded = tokenizer.apply_chat_template(document, tokenize=True, return_dict=True)
        return list(encoded["input_ids"])
    except Exception as error:  # of templates in their own words, of tokenizers in any
        kind = "text" if is_text else "chat"
        raise CalibrationError(
            f"a {kind} of the calibration cannot be turned into tokens ({error}): it begins with "
            f"{str(document)[:60]!r}"
        ) from error


def _item_tokens(item: Any, tokenizer: Any) -> list[int]:
    """Tokens of one item of a Python list, padding removed."""
    mask = None
    if isinstance(item, str):
        return _document_tokens(item, tokenizer)
    if hasattr(item, "keys"):
        item, mask = item["input_ids"], item.get("attention_mask")
    tokens = torch.as_tensor(item).reshape(-1)
    if not tokens.numel():
        return []
    if tokens.is_floating_point():
        raise CalibrationError("calibration items must be strings or token ids, not fractions")
    if mask is not None:
        tokens = tokens[torch.as_tensor(mask).reshape(-1).bool()]
    return [int(token) for token in tokens]


def _cut(
    stream: list[int], samples: int, seq_len: int, generator: random.Random
) -> list[list[int]]:
    """`samples` windows that do not overlap, in random order; fewer when the text is too short."""
    if len(stream) <= seq_len:
        return [stream] if stream else []
    places = len(stream) // seq_len
    offset = generator.randrange(len(stream) - places * seq_len + 1)
    chosen = generator.sample(range(places), min(samples, places))
    return [stream[offset + i * seq_len : offset + (i + 1) * seq_len] for i in chosen]


def _batches(windows: list[list[int]], batch_size: int) -> list[Batch]:
    """Windows of like length together, so that there is little or no padding."""
    ordered = sorted(windows, key=len)  # stable: equal lengths keep their order
    batches = []
    for start in range(0, len(ordered), batch_size):
        part = ordered[start : start + batch_size]
        length = len(part[-1])
        ids = torch.zeros(len(part), length, dtype=torch.int64)
        mask = torch.zeros(len(part), length, dtype=torch.bool)
        for row, window in enumerate(part):
            ids[row, : len(window)] = torch.tensor(window)
            mask[row, : len(window)] = True
        batches.append(Batch(ids, None if bool(mask.all()) else mask))
    return batches


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


def _warnings(windows: list[list[int]], tokens: int, widest: int) -> list[str]:
    found = []
    if len(windows) < ADVISED_SAMPLES:
        found.append(f"{len(windows)} calibration samples: {ADVISED_SAMPLES} or more are advised")
    if tokens < widest:
        found.append(
            f"{tokens} calibration tokens are fewer than the {widest} input channels of the widest "
            "layer: its Hessian has not full rank and rests on damping"
        )
    grams = {tuple(w[i : i + 8]) for w in windows for i in range(0, len(w) - 7, 8)}
    counted = sum(len(range(0, len(w) - 7, 8)) for w in windows)
    if counted and len(grams) < 0.5 * counted:
        found.append(
            f"the calibration text is mostly repetition: {len(grams)} of {counted} pieces of "
            "8 tokens are different"
        )
    return found
