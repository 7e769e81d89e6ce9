"""Finds tool calls in an answer, for models whose way of writing them transformers knows."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

#: Fields of a parsed answer in which templates put what the model thinks.
REASONING_FIELDS = ("reasoning_content", "thinking")


@dataclass(frozen=True)
class Message:
    """An answer in its parts."""

    content: str
    reasoning: str | None = None
    tool_calls: tuple[tuple[str, str], ...] = ()
    """Name of the function and its arguments as JSON, for each call."""

    def fields(self) -> dict[str, Any]:
        """Returns the fields of OpenAI's message that depend on the parts."""
        fields: dict[str, Any] = {"content": self.content or (None if self.tool_calls else "")}
        if self.reasoning is not None:
            fields["reasoning_content"] = self.reasoning
        if self.tool_calls:
            fields["tool_calls"] = [
                {
                    "index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for index, (name, arguments) in enumerate(self.tool_calls)
            ]  # fmt: skip
        return fields


def response_template(tokenizer: Any, model_type: str) -> dict[str, Any] | None:
    """Returns the description of how a model writes its answers; None: not known.

    Args:
        tokenizer: transformers tokenizer; its own description comes first.
        model_type: field of config.json; transformers has descriptions for some.
    """
    own: dict[str, Any] | None = getattr(tokenizer, "response_template", None)
    if own is not None:
        return own
    try:
        from transformers.cli.serving import utils

        known = utils._RESPONSE_TEMPLATE_FALLBACKS
    except (AttributeError, ImportError):  # not a public name: other versions may not have it
        return None
    return next((template for types, template in known.items() if model_type in types), None)


def parse_message(
    tokenizer: Any,
    template: dict[str, Any],
    prompt: list[int],
    answer: list[int],
    tools: list[dict[str, Any]],
) -> Message:
    """Returns an answer in its parts.

    Args:
        tokenizer: transformers tokenizer.
        template: how the model writes its answers.
        prompt, answer: token ids.
        tools: tools of the request, whose schemas decide the types of arguments.
    """
    parsed = tokenizer.parse_response(
        tokenizer.decode(answer), template, prefix=tokenizer.decode(prompt), tools=tools
    )
    calls = []
    for call in parsed.get("tool_calls") or ():
        function = call["function"]
        arguments = function.get("arguments", {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments)
        calls.append((str(function["name"]), arguments))
    reasoning = next((parsed[name] for name in REASONING_FIELDS if parsed.get(name)), None)
    return Message(parsed.get("content") or "", reasoning, tuple(calls))
