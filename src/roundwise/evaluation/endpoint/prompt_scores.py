"""Log probabilities of the tokens of a prompt, from the server that serves a model.

OpenAI's API has no field for them that all servers know. There are three ways, and `PromptScorer` takes
the first that works: `prompt_logprobs` (vLLM), `echo` with `logprobs` (roundwise, and OpenAI's older
API), and one request per token with `n_probs` (llama.cpp, which returns them for generated tokens only).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from roundwise.errors import RunError
from roundwise.evaluation.endpoint.client import Endpoint, Refused, Unsupported, first_choice

#: Numbers of most likely tokens to ask for; servers have limits.
COUNTS = (20, 5, 1)
#: The same for llama.cpp, which has no limit: a token that is not among them needs another request.
LLAMA_COUNT = 200
#: Tokens of the text with which the ways are tried.
TRIAL_TOKENS = 8


@dataclass(frozen=True)
class TokenScore:
    """Prediction of a token of a prompt."""

    logprob: float
    """Log probability of the token."""
    top: dict[int, float]
    """Token id -> log probability: the most likely tokens whose ids are known, and the token itself."""
    best: frozenset[int]
    """The most likely token; several if the server gives its text only, which is that of several."""


class PromptScorer:
    """Asks a server for the log probabilities of prompts, in the first way that works.

    Args:
        endpoint: the server.
        tokenizer: tokenizer of its model.
        trial: some tokens of a text, with which the ways are tried.

    Raises:
        RunError: no way works.
    """

    def __init__(self, endpoint: Endpoint, tokenizer: Any, trial: list[int]) -> None:
        self._endpoint, self._tokenizer = endpoint, tokenizer
        self.way, self.count = self._try_ways(trial[:TRIAL_TOKENS])
        """Name of the way, and number of most likely tokens that it asks for."""

    def score(self, ids: list[int], places: slice) -> list[TokenScore]:
        """Returns the predictions of some tokens of a prompt.

        Args:
            ids: token ids of the prompt.
            places: places of the tokens; the first token of a prompt has no prediction.

        Raises:
            RunError: the server fails, or scores other tokens than were sent.
        """
        return self._ways[self.way](ids, places, self.count)

    @cached_property
    def _ways(self) -> Mapping[str, Callable[[list[int], slice, int], list[TokenScore]]]:
        return {
            "prompt_logprobs": self._prompt_logprobs,
            "echo": self._echo,
            "n_probs": self._one_by_one,
        }

    def _try_ways(self, trial: list[int]) -> tuple[str, int]:
        reasons = {}
        for name, way in self._ways.items():
            for count in COUNTS if name != "n_probs" else (LLAMA_COUNT,):
                try:
                    way(trial, slice(1, len(trial)), count)
                    return name, count
                except (Refused, Unsupported) as error:
                    reasons[name] = f"{name}: {error}"
        raise RunError(
            f"{self._endpoint.url} gives no log probabilities of a prompt: "
            f"{'; '.join(reasons.values())}"
        )

    def _prompt_logprobs(self, ids: list[int], places: slice, count: int) -> list[TokenScore]:
        """vLLM: an object from token id to log probability for each token of the prompt."""
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": count}
        choice = first_choice(self._endpoint.post("/v1/completions", body))
        entries = _checked(choice.get("prompt_logprobs"), len(ids))
        scores = []
        for token, entry in zip(ids[places], entries[places], strict=True):
            top = {int(key): _number(value["logprob"]) for key, value in entry.items()}
            if token not in top:
                raise RunError(f"{self._endpoint.url} scores other tokens than were sent")
            scores.append(_score_of(token, top[token], top))
        return scores

    def _echo(self, ids: list[int], places: slice, count: int) -> list[TokenScore]:
        """OpenAI's older API: the prompt is a part of the answer; most likely tokens are texts."""
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": count, "echo": True}
        choice = first_choice(self._endpoint.post("/v1/completions", body))
        found = choice.get("logprobs")
        if not isinstance(found, dict):
            raise Unsupported("the answer has no log probabilities")
        logprobs = _checked(found.get("token_logprobs"), len(ids), len(ids) + 1)
        tops = found.get("top_logprobs")
        tops = tops if isinstance(tops, list) else [None] * len(logprobs)
        scores = []
        for token, logprob, texts in zip(
            ids[places], logprobs[: len(ids)][places], tops[: len(ids)][places], strict=True
        ):
            by_id, own = {}, _number(logprob)
            for text, value in (texts or {}).items():
                tokens = self._ids_of_text.get(text, ())
                if len(tokens) == 1:
                    by_id[tokens[0]] = _number(value)
            best = max(texts, key=texts.__getitem__) if texts else ""
            scores.append(
                TokenScore(own, {**by_id, token: own}, frozenset(self._ids_of_text.get(best, ())))
            )
        return scores

    def _one_by_one(self, ids: list[int], places: slice, count: int) -> list[TokenScore]:
        """llama.cpp: the distribution of one generated token behind each part of the prompt."""
        scores = []
        for place in range(*places.indices(len(ids))):
            top = self._next_token(ids[:place], count)
            if ids[place] not in top:
                top = self._next_token(ids[:place], len(self._tokenizer))
            if ids[place] not in top:
                raise Unsupported("token ids are missing from its distribution")
            scores.append(_score_of(ids[place], top[ids[place]], top))
        return scores

    def _next_token(self, ids: list[int], count: int) -> dict[int, float]:
        """Returns the `count` most likely tokens behind a prompt, from llama.cpp."""
        body = {
            "prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": count, "cache_prompt": True,
            "post_sampling_probs": False,
        }  # fmt: skip
        answer = self._endpoint.post("/completion", body)
        steps = answer.get("completion_probabilities") or answer.get("probs") or [{}]
        found = steps[0].get("top_logprobs")
        if not found:
            raise Unsupported("the answer has no log probabilities")
        return {int(entry["id"]): _number(entry["logprob"]) for entry in found}

    @cached_property
    def _ids_of_text(self) -> dict[str, list[int]]:
        """Text of a token -> tokens with this text."""
        ids_of_text: dict[str, list[int]] = {}
        ids = list(range(len(self._tokenizer)))
        texts = self._tokenizer.batch_decode(
            [[token] for token in ids], clean_up_tokenization_spaces=False
        )
        for token, text in zip(ids, texts, strict=True):
            ids_of_text.setdefault(text, []).append(token)
        return ids_of_text


def _score_of(token: int, logprob: float, top: dict[int, float]) -> TokenScore:
    return TokenScore(logprob, {**top, token: logprob}, frozenset([max(top, key=top.__getitem__)]))


def _checked(entries: Any, *lengths: int) -> list[Any]:
    """Returns a list with an entry for each token of the prompt; fails if the server ignored a field."""
    if not isinstance(entries, list) or len(entries) not in lengths:
        raise Unsupported("the answer has no log probabilities of the prompt")
    return entries


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        raise Unsupported(f"{value!r} is not a log probability")
    return float(value)
