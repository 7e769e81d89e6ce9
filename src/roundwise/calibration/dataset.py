"""Calibration: from text to batches of token windows, and warnings about what is thin."""

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
from roundwise.errors import CalibrationError

#: Tokenizing is slow: of a long text, this many characters per wanted token are tokenized, which is
#: a few times more than needed, in random pieces of this size.
CHARACTERS_PER_TOKEN, PIECE = 16, 16 << 10
#: Tokens of a piece, for telling repetition.
PIECE_TOKENS = 8
#: Fewer samples than this, or fewer tokens than channels, give a noisy Hessian.
ADVISED_SAMPLES = 128


@dataclass
class Calibration:
    """Batches, and what is to be said about them."""

    batches: list[Batch]
    samples: int
    tokens: int
    """Those that count."""
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
    only: str | None = None,
    generate: Callable[[int], list[list[int]]] | None = None,
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
        only: "assistant": of chats, only what the assistant wrote counts; the rest is what it is an
            answer to.
        own: draws windows from the model itself, for the source `self`.

    Raises:
        CalibrationError: no text, no tokens, or settings below 1.
    """
    for name, value in (("samples", samples), ("seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise CalibrationError(f"{name}={value}: must be at least 1")
    if only not in (None, "assistant"):
        raise CalibrationError(f"only={only!r} is not supported: use assistant")
    names, texts, not_as_asked = ["list"], list[list[str]](), list[str]()
    if isinstance(source, str):
        windows, names, texts = _from_sources(
            source, tokenizer, samples=samples, seq_len=seq_len, only=only, generate=generate,
            generator=random.Random(seed),
        )  # fmt: skip
    elif only is not None:
        raise CalibrationError("only: a list holds no chats whose turns could be told apart")
    else:
        items = [item_tokens(item, tokenizer) for item in islice(source, samples)]
        not_as_asked = _cut_off(items, len(source), seq_len)
        windows = [Window(item[:seq_len]) for item in items if item]
    if not windows:
        by = f" by the {only}" if only else ""
        raise CalibrationError(f"the calibration text holds no tokens{by}")
    if len(windows) < samples:
        not_as_asked.append(f"the calibration text gives only {len(windows)} of {samples} windows")
    digest = hashlib.sha256()
    for window in windows:
        digest.update(torch.tensor([len(window.tokens), *window.tokens]).numpy().tobytes())
        if window.counted is not None:
            digest.update(bytes(window.counted))
    tokens = sum(window.count() for window in windows)
    ids = [window.tokens for window in windows]
    different = unique_share(ids)
    return Calibration(
        batches=batches_of(windows, batch_size),
        samples=len(windows),
        tokens=tokens,
        digest=digest.hexdigest(),
        settings={
            "source": ", ".join(names),
            "texts": texts,
            "wanted": samples,
            "seq_len": seq_len,
            "batch_size": batch_size,
            "seed": seed,
            **({"only": only} if only else {}),
            "distinct": len({token for window in ids for token in window}),
            "unique_share": different,
            "sketch": minhash(ids),
        },
        warnings=_warnings(len(windows), tokens, widest, different),
        not_as_asked=not_as_asked,
    )


def _from_sources(
    source: str,
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    only: str | None,
    generate: Callable[[int], list[list[int]]] | None,
    generator: random.Random,
) -> tuple[list[Window], list[str], list[list[str]]]:
    """Windows of all sources; their names, with what each gives; their names and hashes."""
    parts = mixture(source)
    windows, names, texts = list[Window](), [], []
    for (name, _), count in zip(parts, shares(samples, [w for _, w in parts]), strict=True):
        if name == SELF and generate is not None:
            drawn = [Window(tokens) for tokens in generate(count)]
            texts.append([SELF, _digest([window.tokens for window in drawn])])
        else:
            wanted = max(CHARACTERS_PER_TOKEN * count * seq_len, 1 << 20)
            whole = read_documents(name)
            texts.append([Path(name).name, _digest(whole)])
            documents = _sample_documents(whole, wanted, generator)
            drawn = cut_windows(tokenize(documents, tokenizer, only), count, seq_len, generator)
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


def _warnings(windows: int, tokens: int, widest: int, different: float) -> list[str]:
    found = []
    if windows < ADVISED_SAMPLES:
        found.append(f"{windows} calibration samples: {ADVISED_SAMPLES} or more are advised")
    if tokens < widest:
        found.append(
            f"{tokens} calibration tokens are fewer than the {widest} input channels of the widest "
            "layer: its Hessian has not full rank and rests on damping"
        )
    if different < 0.5:
        found.append(
            f"the calibration text is mostly repetition: only {different:.0%} of its pieces of "
            f"{PIECE_TOKENS} tokens are different"
        )
    return found


def unique_share(windows: list[list[int]]) -> float:
    """Part of the pieces of a few tokens that are different from one another; 1 where there are none."""
    size = PIECE_TOKENS
    pieces = [tuple(w[i : i + size]) for w in windows for i in range(0, len(w) - size + 1, size)]
    return len({*pieces}) / len(pieces) if pieces else 1.0
