"""Documents as one stream of tokens, windows cut from it, and windows in batches.

Chats as tokens, and which of them the assistant wrote.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from roundwise.calibration.sources import Document
from roundwise.errors import CalibrationError
from roundwise.system.device import to_device

#: Tokens by which a chat and its beginning may differ where one ends in the other: a tokenizer merges
#: letters across that place.
MERGED = 4


def assistant_tokens(chat: list[dict[str, Any]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """A chat's tokens, and True for those of the assistant's turns.

    A template that marks them (`{% generation %}`) is believed. Otherwise the chat up to a turn is
    rendered with and without it: what is added is the turn, its closing marks included.

    Raises:
        CalibrationError: the template renders a turn otherwise once others follow, so that its place
            cannot be told.
    """
    if "generation %}" in str(tokenizer.chat_template).replace("-%}", "%}"):
        encoded = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
    tokens = _rendered(chat, tokenizer)
    counted = [False] * len(tokens)
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        prompt = chat[:turn]
        before = _rendered(prompt, tokenizer, add_generation_prompt=True) if prompt else []
        after = _rendered(chat[: turn + 1], tokenizer)
        start, end = _common(before, tokens), _common(after, tokens)
        if max(len(before) - start, len(after) - end) > MERGED:
            raise CalibrationError(
                f"where turn {turn + 1} of a chat begins and ends cannot be told: the model's template "
                "renders it otherwise once others follow; split such chats after each answer, or do "
                "without --only"
            )
        counted[start:end] = [True] * (end - start)
    return tokens, counted


def _rendered(chat: list[dict[str, Any]], tokenizer: Any, **options: Any) -> list[int]:
    encoded = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **options)
    return list(encoded["input_ids"])


def _common(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


@dataclass
class Batch:
    """Token windows that go through the model together, padded on the right."""

    input_ids: torch.Tensor
    """int64 [windows, length]."""
    mask: torch.Tensor | None
    """bool [windows, length], False on padding; None when there is none."""
    counted: torch.Tensor | None = None
    """bool [windows, length], True for the tokens that count as input of layers; None: as `mask`."""

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*to_device([self.input_ids, self.mask, self.counted], device))

    @property
    def counting(self) -> torch.Tensor | None:
        """Bool [windows, length]: the tokens that count; None: all."""
        return self.mask if self.counted is None else self.counted


@dataclass(frozen=True)
class Window:
    """Tokens that are read together."""

    tokens: list[int]
    counted: list[bool] | None = None
    """Which of them count; None: all."""

    def count(self) -> int:
        """How many of them count."""
        return len(self.tokens) if self.counted is None else sum(self.counted)

    def part(self, start: int, end: int) -> Window:
        """Some of it."""
        counted = self.counted
        return Window(self.tokens[start:end], None if counted is None else counted[start:end])


def tokenize(documents: list[Document], tokenizer: Any, only: str | None) -> Window:
    """One stream of tokens, documents separated by the end-of-text token where there is one."""
    stream: list[int] = []
    counted: list[bool] = []
    for document in documents:
        if stream and tokenizer.eos_token_id is not None:
            stream.append(int(tokenizer.eos_token_id))
            counted.append(False)
        tokens, marks = _document_tokens(document, tokenizer, only)
        stream += tokens
        counted += marks
    return Window(stream, counted if only else None)


def _document_tokens(
    document: Document, tokenizer: Any, only: str | None = None
) -> tuple[list[int], list[bool]]:
    """A document's tokens; with `only`, which of them count."""
    is_text = isinstance(document, str)
    if only and isinstance(document, str):
        raise CalibrationError(
            f"only={only} is for chats, and the calibration holds a plain text: {document[:60]!r}"
        )
    if not is_text and not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            "the calibration file holds chats, but this model's tokenizer has no chat template: "
            "give plain `text` instead"
        )
    try:
        if is_text:
            found = tokenizer(document, add_special_tokens=False, verbose=False)
            return list(found["input_ids"]), []
        if only and not isinstance(document, str):
            return assistant_tokens(document, tokenizer)
        encoded = tokenizer.apply_chat_template(document, tokenize=True, return_dict=True)
        return list(encoded["input_ids"]), []
    except CalibrationError:
        raise
    except Exception as error:  # of templates in their own words, of tokenizers in any
        kind = "text" if is_text else "chat"
        raise CalibrationError(
            f"a {kind} of the calibration cannot be turned into tokens ({error}): it begins with "
            f"{str(document)[:60]!r}"
        ) from error


def item_tokens(item: Any, tokenizer: Any) -> list[int]:
    """Tokens of one item of a Python list, padding removed."""
    mask = None
    if isinstance(item, str):
        return _document_tokens(item, tokenizer)[0]
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


def cut_windows(
    stream: Window, samples: int, seq_len: int, generator: random.Random
) -> list[Window]:
    """`samples` windows that do not overlap, in random order; fewer when the text is too short."""
    length = len(stream.tokens)
    if length <= seq_len:
        return [stream] if stream.count() else []
    places = length // seq_len
    offset = generator.randrange(length - places * seq_len + 1)
    parts = [stream.part(offset + i * seq_len, offset + (i + 1) * seq_len) for i in range(places)]
    parts = [part for part in parts if part.count()]
    return generator.sample(parts, min(samples, len(parts)))


def batches_of(windows: list[Window], batch_size: int) -> list[Batch]:
    """Windows of like length together, so that there is little or no padding."""
    # Stable: equal lengths keep their order.
    ordered = sorted(
        windows, key=lambda window: len(window.tokens)
    )  # stable: equal lengths keep their order
    batches = []
    for start in range(0, len(ordered), batch_size):
        part = ordered[start : start + batch_size]
        length = len(part[-1].tokens)
        ids = torch.zeros(len(part), length, dtype=torch.int64)
        mask = torch.zeros(len(part), length, dtype=torch.bool)
        counted = torch.zeros_like(mask)
        for row, window in enumerate(part):
            filled = slice(len(window.tokens))
            ids[row, filled] = torch.tensor(window.tokens)
            mask[row, filled] = True
            counted[row, filled] = torch.tensor(window.counted or [True])
        padded = None if bool(mask.all()) else mask
        batches.append(Batch(ids, padded, None if torch.equal(counted, mask) else counted))
    return batches
