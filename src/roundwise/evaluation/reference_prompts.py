"""Compares the greedy answers of a quantized model to reference prompts with those of its original.

The quantized model answers in this process, or through the server that serves it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from roundwise.calibration.records import Chat, Document, holds_records
from roundwise.calibration.sources import read_documents
from roundwise.errors import CalibrationError, CheckpointError
from roundwise.evaluation.endpoint.client import Endpoint, first_choice
from roundwise.inference.detokenizer import INCOMPLETE, Detokenizer
from roundwise.inference.generation import Generated, generate
from roundwise.inference.load import load, require_tokenizer
from roundwise.inference.prompts import encode_chat, encode_text
from roundwise.inference.sampling import Sampling
from roundwise.model.build import text_config

#: Characters of both answers that are shown from where they part.
SHOWN = 40


class Parting(NamedTuple):
    """The place where two answers differ for the first time."""

    original: str
    """The original's answer from there on, its first characters; empty: it ends there."""
    quantized: str
    probability: float
    """Probability that the original gives its own token there: near 1, it was sure."""


@dataclass(frozen=True)
class PromptResult:
    """The answers of both models to a prompt."""

    prompt: str
    tokens: int
    """Tokens of the original's answer."""
    agreeing: int
    """Tokens of it before the first difference."""
    parting: Parting | None
    """None: both answers are the same."""


@dataclass(frozen=True)
class PromptAgreement:
    """Agreement of a quantized model with its original on all prompts."""

    name: str
    """Name of the quantized model's folder, or the address of its server."""
    results: list[PromptResult]

    @property
    def agreement(self) -> float:
        """Share of the tokens of the original's answers, 0 … 1, before the first difference of each."""
        tokens = sum(result.tokens for result in self.results)
        return sum(result.agreeing for result in self.results) / tokens

    @property
    def same(self) -> int:
        """Number of answers that are the same from beginning to end."""
        return sum(result.parting is None for result in self.results)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        results = [
            asdict(result) | {"parting": result.parting and result.parting._asdict()}
            for result in self.results
        ]
        return {
            "name": self.name, "agreement": self.agreement, "same": self.same,
            "prompts": len(self.results), "results": results,
        }  # fmt: skip


class Prompt(NamedTuple):
    """A prompt as text, for people, and as token ids."""

    text: str
    ids: list[int]


class Answer(NamedTuple):
    """A greedy answer."""

    text: str
    ended: bool
    """It ended by itself, not by the limit of tokens."""


def read_prompts(source: str) -> list[Document]:
    """Reads reference prompts: each line of a text file, or each record of a JSONL or another file.

    The records are those of calibration texts: `text`, `messages`, a question and its answer. What the
    assistant says last is left out: it is for the models to say.

    Raises:
        CalibrationError: there is no such file, it is damaged, or it holds no prompt.
    """
    documents = read_documents(source).documents
    if not holds_records(Path(source)):
        lines = [line for text in documents for line in str(text).splitlines() if line.strip()]
        documents = [*lines]
    prompts = [_without_answer(each) if isinstance(each, Chat) else each for each in documents]
    if any(isinstance(prompt, Chat) and not prompt.messages for prompt in prompts):
        raise CalibrationError(f"{source}: a chat has no message to answer")
    return prompts


def _without_answer(chat: Chat) -> Chat:
    last = chat.messages[-1] if chat.messages else {}
    return Chat(chat.messages[:-1], chat.tools) if last.get("role") == "assistant" else chat


def encode_prompts(tokenizer: Any, prompts: Sequence[Document]) -> list[Prompt]:
    """Returns prompts as token ids; chats through the tokenizer's chat template.

    Raises:
        CheckpointError: there are chats, and the model has no chat template.
        ConfigError: the template refuses a chat.
    """
    return [
        Prompt(prompt, encode_text(tokenizer, prompt))
        if isinstance(prompt, str)
        else Prompt(
            str(prompt.messages[-1].get("content", "")),
            encode_chat(tokenizer, prompt.messages, prompt.tools or ()),
        )
        for prompt in prompts
    ]


def compare_answers(
    base: str | os.PathLike[str],
    quantized: Sequence[str | os.PathLike[str]],
    prompts: Sequence[Document],
    *,
    tokens: int = 64,
    endpoint: Endpoint | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    progress: Callable[[str, float], None] = lambda _what, _done: None,
) -> list[PromptAgreement]:
    """Compares the greedy answers of quantized models with those of the original.

    Args:
        base: folder or hub id of the original, whose tokenizer encodes the prompts.
        quantized: folders or hub ids of the quantized models.
        prompts: texts and chats (`read_prompts`).
        tokens: most tokens of an answer.
        endpoint: server of the only quantized model, which answers for it; None: all models answer in
            this process.
        dtype, device: as for `roundwise.load`, for models in this process.
        progress: called with the current step and the finished part of it, 0 … 1.

    Raises:
        CheckpointError: a model cannot be loaded or has no tokenizer. RunError: the server fails.
    """
    model, tokenizer = load(base, dtype=dtype, device=device)
    require_tokenizer(tokenizer, base)
    encoded = encode_prompts(tokenizer, prompts)
    own = []
    for number, prompt in enumerate(encoded, start=1):
        own.append(generate(model, tokenizer, prompt.ids, Sampling(tokens)))
        progress(f"answers of {base}", number / len(encoded))

    def agreement(name: str, answer: Callable[[list[int]], Answer]) -> PromptAgreement:
        results = []
        for number, (prompt, original) in enumerate(zip(encoded, own, strict=True), start=1):
            other = answer(prompt.ids)
            results.append(compare_answer(model, tokenizer, prompt, original, other))
            progress(f"answers of {name}", number / len(encoded))
        return PromptAgreement(name, results)

    if endpoint is not None:
        return [agreement(endpoint.url, partial(_ask, endpoint, tokens))]
    agreements = []
    for folder in quantized:
        other, _ = load(folder, dtype=dtype, device=device)
        if text_config(other.config).vocab_size != text_config(model.config).vocab_size:
            raise CheckpointError(f"{folder} has another vocabulary than {base}")
        agreements.append(
            agreement(Path(folder).name, partial(_generate, other, tokenizer, tokens))
        )
    return agreements


def compare_answer(
    model: Any, tokenizer: Any, prompt: Prompt, original: Generated, other: Answer
) -> PromptResult:
    """Compares an answer with the original's, as texts: servers return no token ids.

    Args:
        model, tokenizer: the original.
        prompt: the prompt.
        original: its answer.
        other: the answer of the quantized model.
    """
    count = len(original.ids)
    texts = original.text.rstrip(INCOMPLETE), other.text.rstrip(INCOMPLETE)
    if texts[0] == texts[1] and (original.finish == "stop") == other.ended:
        return PromptResult(prompt.text, count, count, None)
    common = common_length(*texts)
    lengths = _text_lengths(tokenizer, prompt.ids, original.ids)
    # A token without a text of its own, as the one that ends the answer, may be where they part.
    agreeing = min(sum(length <= common for length in lengths), count - 1)
    before = lengths[agreeing - 1] if agreeing else 0
    parting = Parting(
        texts[0][before : before + SHOWN], texts[1][before : before + SHOWN],
        _probability(model, [*prompt.ids, *original.ids[:agreeing]], original.ids[agreeing]),
    )  # fmt: skip
    return PromptResult(prompt.text, count, agreeing, parting)


def common_length(left: str, right: str) -> int:
    """Returns the number of characters before the first difference of two texts."""
    pairs = zip(left, right, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    return min(len(left), len(right)) if first is None else first


def _text_lengths(tokenizer: Any, prompt: list[int], ids: Sequence[int]) -> list[int]:
    """Returns the length of an answer's text after each of its tokens."""
    detokenizer, lengths, length = Detokenizer(tokenizer, prompt), list[int](), 0
    for token in ids:
        length += len(detokenizer.add(token))
        lengths.append(length)
    return lengths


@torch.no_grad()
def _probability(model: Any, ids: list[int], token: int) -> float:
    """Returns the probability that a model gives to a token after others."""
    logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    return float(logits[0, -1].float().softmax(dim=-1)[token])


def _generate(model: Any, tokenizer: Any, tokens: int, ids: list[int]) -> Answer:
    answer = generate(model, tokenizer, ids, Sampling(tokens))
    return Answer(answer.text, answer.finish == "stop")


def _ask(endpoint: Endpoint, tokens: int, ids: list[int]) -> Answer:
    body = {"prompt": ids, "max_tokens": tokens, "temperature": 0}
    choice = first_choice(endpoint.post("/v1/completions", body))
    return Answer(str(choice.get("text") or ""), choice.get("finish_reason") == "stop")
