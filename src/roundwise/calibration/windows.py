"""Tokenizes documents and chats, samples windows from the tokens, and pads windows into batches.

For chats it can tell which tokens the assistant wrote.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from roundwise.calibration.records import Chat, Document
from roundwise.calibration.special_tokens import NO_SPECIAL_TOKENS, SpecialTokens
from roundwise.errors import CalibrationError, first_line
from roundwise.system.device import to_device

#: Maximum tokens by which the rendered beginning of a chat may differ from the whole chat at its end: a
#: tokenizer merges characters across that position.
MERGED = 4


@dataclass
class Batch:
    """Token windows that run through the model together, padded on the right."""

    input_ids: torch.Tensor
    """int64 [windows, length]."""
    mask: torch.Tensor | None
    """bool [windows, length], False for padding; None: there is no padding."""
    counted: torch.Tensor | None = None
    """bool [windows, length], True for the tokens that count as input of layers; None: as `mask`."""
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further inputs of the model by name, such as pixel values; a batch with some has one window."""

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on a device."""
        parts = [self.input_ids, self.mask, self.counted, dict(self.inputs)]
        return Batch(*to_device(parts, device))

    def probe(self, count: int) -> Batch:
        """Returns a batch of a few tokens of text."""
        if self.inputs:  # its tokens may stand for parts of a picture; the last one ends the text
            return Batch(self.input_ids[:1, -1:].expand(1, count).contiguous(), None)
        return Batch(self.input_ids[:1, :count], None)

    @property
    def counting(self) -> torch.Tensor | None:
        """Bool [windows, length], True for the tokens that count; None: all."""
        return self.mask if self.counted is None else self.counted


@dataclass(frozen=True)
class Window:
    """Consecutive tokens that the model reads as one text."""

    tokens: list[int]
    counted: list[bool] | None = None
    """True for the tokens that count; None: all."""
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False)
    """Further inputs of the model by name, such as pixel values."""

    def count(self) -> int:
        """Returns the number of tokens that count."""
        return len(self.tokens) if self.counted is None else sum(self.counted)

    def part(self, start: int, end: int) -> Window:
        """Returns the tokens from `start` up to `end`."""
        counted = self.counted
        return Window(self.tokens[start:end], None if counted is None else counted[start:end])

    def with_special_tokens(self, special: SpecialTokens) -> Window:
        """Returns the window between special tokens, which do not count if only some tokens do."""
        tokens = special.add_to(self.tokens)
        if self.counted is None or tokens == self.tokens:
            return Window(tokens, self.counted)
        begin = 0 if tokens[: len(self.tokens)] == self.tokens else len(special.prefix)
        end = len(tokens) - begin - len(self.tokens)
        return Window(tokens, [*[False] * begin, *self.counted, *[False] * end])


def tokenize_documents(documents: list[Document], tokenizer: Any, only: str | None) -> Window:
    """Tokenizes documents into one stream, separated by the end-of-text token if there is one.

    Args:
        documents: texts and chats.
        tokenizer: transformers tokenizer.
        only: "assistant": of chats, only the assistant's tokens count; None: all tokens count.

    Raises:
        CalibrationError: a document cannot be tokenized, or `only` is set and a document is not a chat.
    """
    stream: list[int] = []
    counted: list[bool] = []
    for document in documents:
        if stream and tokenizer.eos_token_id is not None:
            stream.append(int(tokenizer.eos_token_id))
            counted.append(False)
        tokens, marks = _tokenize_document(document, tokenizer, only)
        stream += tokens
        counted += marks
    return Window(stream, counted if only else None)


def _tokenize_document(
    document: Document, tokenizer: Any, only: str | None = None
) -> tuple[list[int], list[bool]]:
    """Returns a document's tokens and, with `only`, True for those that count."""
    if isinstance(document, Chat) and not getattr(tokenizer, "chat_template", None):
        if document.plain is None:
            raise CalibrationError(
                "the calibration file holds chats, but this model's tokenizer has no chat template: "
                "give plain `text` instead"
            )
        document = document.plain
    if only and isinstance(document, str):
        raise CalibrationError(
            f"only={only} is for chats, but the calibration contains plain text: {document[:60]!r}"
        )
    kind, begin = ("text", document) if isinstance(document, str) else ("chat", document.messages)
    place = "" if isinstance(document, str) or not document.place else f" ({document.place})"
    try:
        if isinstance(document, str):
            encoded = tokenizer(document, add_special_tokens=False, verbose=False)
            return list(encoded["input_ids"]), []
        if only:
            return assistant_tokens(document, tokenizer)
        return _render_chat(document, tokenizer), []
    except CalibrationError:
        raise
    except Exception as error:  # templates and tokenizers raise errors of any type
        raise CalibrationError(
            f"a {kind} of the calibration{place} cannot be tokenized ({first_line(error)}): it begins "
            f"with {str(begin)[:60]!r}"
        ) from error


def assistant_tokens(chat: Chat, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Returns a chat's tokens, and True for those of the assistant's turns.

    If the template marks them (`{% generation %}`), its marks are used. Otherwise the chat up to a turn
    is rendered with and without that turn: the added tokens are the turn, its closing marks included.

    Args:
        chat: the conversation.
        tokenizer: transformers tokenizer with a chat template.

    Raises:
        CalibrationError: the template renders a turn differently once other turns follow, so the turn
            cannot be located.
    """
    if "generation %}" in str(tokenizer.chat_template).replace("-%}", "%}"):
        encoded = tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
    tokens = _render_chat(chat, tokenizer)
    counted = [False] * len(tokens)
    for turn, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        prompt = replace(chat, messages=chat.messages[:turn])
        before = _render_chat(prompt, tokenizer, add_generation_prompt=True) if turn else []
        after = _render_chat(replace(chat, messages=chat.messages[: turn + 1]), tokenizer)
        start, end = _common_prefix(before, tokens), _common_prefix(after, tokens)
        if max(len(before) - start, len(after) - end) > MERGED:
            raise CalibrationError(
                f"turn {turn + 1} of a chat cannot be located: the model's chat template renders it "
                "differently once other turns follow; split such chats after each answer, or do not "
                "use --only"
            )
        counted[start:end] = [True] * (end - start)
    return tokens, counted


def _render_chat(chat: Chat, tokenizer: Any, **options: Any) -> list[int]:
    encoded = tokenizer.apply_chat_template(
        chat.messages, tools=chat.tools, tokenize=True, return_dict=True, **options
    )
    return list(encoded["input_ids"])


def _common_prefix(one: list[int], other: list[int]) -> int:
    """Returns the number of tokens that both begin with."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def tokenize_item(item: Any, tokenizer: Any) -> list[int]:
    """Returns the tokens of one item of a Python list, without padding.

    Args:
        item: a string, token ids, or a dict with `input_ids` and maybe `attention_mask`.
        tokenizer: transformers tokenizer; used for strings only.

    Raises:
        CalibrationError: a string cannot be tokenized, or token ids are not integers.
    """
    mask = None
    if isinstance(item, str):
        return _tokenize_document(item, tokenizer)[0]
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


def sample_windows(
    stream: Window,
    samples: int,
    seq_len: int,
    generator: random.Random,
    special: SpecialTokens = NO_SPECIAL_TOKENS,
) -> list[Window]:
    """Samples windows that do not overlap from a stream of tokens, in random order.

    Args:
        stream: tokens of all documents.
        samples: number of windows; fewer are returned if the text is too short.
        seq_len: tokens per window; a text that is not longer becomes one window.
        generator: source of random numbers.
        special: special tokens of every window; they are a part of its `seq_len` tokens.
    """
    size = seq_len - special.count
    length = len(stream.tokens)
    if length <= size:
        return [stream.with_special_tokens(special)] if stream.count() else []
    places = length // size
    offset = generator.randrange(length - places * size + 1)
    parts = [stream.part(offset + i * size, offset + (i + 1) * size) for i in range(places)]
    parts = [part for part in parts if part.count()]
    chosen = generator.sample(parts, min(samples, len(parts)))
    return [part.with_special_tokens(special) for part in chosen]


def make_batches(windows: list[Window], batch_size: int) -> list[Batch]:
    """Batches windows of similar length, so that there is little or no padding.

    Windows with pictures or sounds are batches of their own.

    Args:
        windows: all windows; those of equal length keep their order.
        batch_size: maximum windows per batch.
    """
    ordered = sorted((w for w in windows if not w.inputs), key=lambda window: len(window.tokens))
    batches = [
        Batch(torch.tensor([window.tokens]), None, inputs=window.inputs)
        for window in windows
        if window.inputs
    ]
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
