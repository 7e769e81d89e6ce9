"""Builds the JSON of OpenAI's responses, whole or as chunks of a stream."""

from __future__ import annotations

import time
from typing import Any

from roundwise.inference.generation import Generated


def usage(answers: list[Generated], prompts: int) -> dict[str, int]:
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

    def response(self, answers: list[Generated], usage: dict[str, int]) -> dict[str, Any]:
        """Returns the whole response, for a request without `stream`."""
        choices = [
            {
                "index": index,
                "logprobs": None,
                "finish_reason": _finish_reason(answer),
                **(
                    {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
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
        return self._chunk(index, {"delta": delta}, None) if self._chat else None

    def text_chunk(self, index: int, text: str) -> dict[str, Any]:
        """Returns a chunk with a piece of text."""
        return self._chunk(
            index, {"delta": {"content": text}} if self._chat else {"text": text}, None
        )

    def last_chunk(self, index: int, answer: Generated) -> dict[str, Any]:
        """Returns the chunk that ends an answer, with its finish_reason."""
        content: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        return self._chunk(index, content, _finish_reason(answer))

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """Returns the last chunk of a stream, for clients that asked for usage."""
        return {**self._with_object(".chunk"), "choices": [], "usage": usage}

    def _chunk(self, index: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": None, "finish_reason": reason}
        return {**self._with_object(".chunk"), "choices": [choice]}

    def _with_object(self, suffix: str) -> dict[str, Any]:
        return {
            **self._header,
            "object": f"chat.completion{suffix}" if self._chat else "text_completion",
        }


def _finish_reason(answer: Generated) -> str:
    """Returns OpenAI's finish_reason; an answer that the time limit ended counts as too long."""
    return "stop" if answer.finish == "stop" else "length"
