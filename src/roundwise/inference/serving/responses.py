"""Builds the JSON of OpenAI's responses, whole or as chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from roundwise.inference.detokenizer import INCOMPLETE
from roundwise.inference.generation import Generated
from roundwise.inference.sampling import TokenLogprobs
from roundwise.inference.serving.tool_calls import Message


@dataclass(frozen=True)
class Piece:
    """A piece of an answer's text, and the log probabilities of its tokens if they were asked for."""

    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A whole answer: its pieces, and how it was generated."""

    pieces: tuple[Piece, ...]
    generated: Generated
    message: Message | None = None
    """Its parts, if the request has tools."""

    @property
    def text(self) -> str:
        """The text; with `echo` it begins with the prompt, which `generated` does not have."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Log probabilities of all tokens."""
        return [entry for piece in self.pieces for entry in piece.logprobs]


def usage(answers: Sequence[Generated], prompts: int) -> dict[str, int]:
    """Returns token counts as OpenAI's `usage`; a prompt with several answers counts once.

    Args:
        answers: answers to all prompts, in order, the same number for each.
        prompts: number of prompts.
    """
    answers_per_prompt = len(answers) // prompts
    prompt = sum(answer.prompt_tokens for answer in answers[::answers_per_prompt])
    completion = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


class ResponseFormat:
    """Builds the JSON of a response, whole or as chunks of a stream.

    Args:
        chat: True for chat completions, False for text completions.
        model: name of the model.
        identity: unique part of the response's id.
    """

    def __init__(self, *, chat: bool, model: str, identity: str) -> None:
        self._chat = chat
        self._header = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{identity}",
            "created": int(time.time()),
            "model": model,
        }
        self._offsets: dict[int, int] = {}  # answer -> length of the texts of its tokens so far

    def response(self, answers: list[Choice], usage: dict[str, int]) -> dict[str, Any]:
        """Returns the whole response, for a request without `stream`."""
        choices = [
            {
                "index": index,
                "logprobs": self._logprobs(index, answer.logprobs),
                "finish_reason": _finish_reason(answer.generated, answer.message),
                **(
                    {"message": {"role": "assistant", "refusal": None, **_parts(answer)}}
                    if self._chat
                    else {"text": answer.text}
                ),
            }
            for index, answer in enumerate(answers)
        ]
        return {**self._with_object(""), "choices": choices, "usage": usage}

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """Returns the chunk that starts answer `index` of a chat; None for text completions."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk(index, {"delta": delta}) if self._chat else None

    def piece_chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """Returns a chunk with a piece of text."""
        content = {"delta": {"content": piece.text}} if self._chat else {"text": piece.text}
        return self._chunk(index, content, piece.logprobs)

    def message_chunk(self, index: int, answer: Choice) -> dict[str, Any]:
        """Returns a chunk with all parts of an answer to a request with tools."""
        return self._chunk(index, {"delta": _parts(answer)}, answer.logprobs)

    def last_chunk(self, index: int, answer: Choice) -> dict[str, Any]:
        """Returns the chunk that ends an answer, with its finish_reason."""
        content: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        reason = _finish_reason(answer.generated, answer.message)
        return self._chunk(index, content, reason=reason)

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """Returns the last chunk of a stream, for clients that asked for usage."""
        return {**self._with_object(".chunk"), "choices": [], "usage": usage}

    def _chunk(
        self,
        index: int,
        content: dict[str, Any],
        logprobs: Sequence[TokenLogprobs] = (),
        reason: str | None = None,
    ) -> dict[str, Any]:
        entries = self._logprobs(index, logprobs)
        choice = {"index": index, **content, "logprobs": entries, "finish_reason": reason}
        return {**self._with_object(".chunk"), "choices": [choice]}

    def _logprobs(self, index: int, entries: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not entries:
            return None
        if self._chat:
            return {"content": [_chat_entry(entry) for entry in entries], "refusal": None}
        offsets = []
        for entry in entries:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(entry.text)
        return {
            "tokens": [entry.text for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [_top_logprobs(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _with_object(self, suffix: str) -> dict[str, Any]:
        return {
            **self._header,
            "object": f"chat.completion{suffix}" if self._chat else "text_completion",
        }


def _top_logprobs(entry: TokenLogprobs) -> dict[str, float] | None:
    """Returns the most likely tokens, and the chosen one, by text; of equal texts the most likely."""
    if entry.logprob is None:
        return None
    top: dict[str, float] = {}
    for text, logprob in (*entry.top, (entry.text, entry.logprob)):
        top.setdefault(text, logprob)
    return top


def _chat_entry(entry: TokenLogprobs) -> dict[str, Any]:
    top = [_with_bytes(text, logprob) for text, logprob in entry.top]
    return {**_with_bytes(entry.text, entry.logprob), "top_logprobs": top}


def _with_bytes(text: str, logprob: float | None) -> dict[str, Any]:
    # A token can be a part of a character; its bytes are not known then.
    known = list(text.encode()) if INCOMPLETE not in text else None
    return {"token": text, "logprob": logprob, "bytes": known}


def _parts(answer: Choice) -> dict[str, Any]:
    return {"content": answer.text} if answer.message is None else answer.message.fields()


def _finish_reason(answer: Generated, message: Message | None) -> str:
    """Returns OpenAI's finish_reason; an answer that the time limit ended counts as too long."""
    if message is not None and message.tool_calls and answer.finish == "stop":
        return "tool_calls"
    return "stop" if answer.finish == "stop" else "length"
