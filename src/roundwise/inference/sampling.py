"""Chooses tokens from logits: sampling parameters, random numbers of each request, log probabilities.

transformers only computes the logits, and `Sampler` chooses each token. So the random numbers belong to
a request, extreme parameters cannot make NaN, and unsupported settings of generation_config.json have
no effect.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from roundwise.errors import ConfigError, NumericalError

#: Log probability of what is impossible; JSON has no infinity, and other servers use this one too.
LOWEST_LOGPROB = -9999.0

#: Fields of generation_config.json that are read.
SUPPORTED_FIELDS = frozenset({
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k",
    "min_p", "repetition_penalty",
})  # fmt: skip
#: Fields that are not read, and do not change which text is generated.
NEUTRAL_FIELDS = frozenset({
    "transformers_version", "max_length", "max_new_tokens", "max_time", "use_cache", "cache_config",
    "cache_implementation", "compile_config", "disable_compile", "continuous_batching_config",
    "prefill_chunk_size", "max_cache_len", "low_memory", "decoder_start_token_id",
    "num_return_sequences", "return_dict_in_generate", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits",
})  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. None: the value in the model's generation_config.json, else no limit."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: greedy, always the most likely token."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    """None: a new one for each call."""
    stop: tuple[str, ...] = ()
    """Stop strings: the answer ends in front of the first one."""
    logprobs: int | None = None
    """Number of most likely tokens whose log probabilities are returned, besides that of the chosen
    token; None: no log probabilities."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature {self.temperature}: must be 0 or a positive number")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p}: must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 0:
            raise ConfigError(f"top_k {self.top_k}: must be 0 (all tokens) or a number of tokens")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(
                f"repetition_penalty {self.repetition_penalty}: must be a positive number"
            )


@dataclass(frozen=True)
class TokenLogprobs:
    """A token, its log probability in the model, and those of the most likely tokens."""

    text: str
    logprob: float | None
    """None: the first token of a text, which no other precedes."""
    top: tuple[tuple[str, float], ...] = ()
    """Most likely tokens, as texts, and their log probabilities; the most likely first."""

    @staticmethod
    def of(
        logprobs: torch.Tensor, token: int, count: int, text_of: Callable[[int], str]
    ) -> TokenLogprobs:
        """Returns the record of a token.

        Args:
            logprobs: log probabilities [vocabulary].
            token: the chosen one.
            count: number of most likely tokens.
            text_of: decodes a token.
        """
        values, tokens = logprobs.topk(min(count, len(logprobs)))
        finite = (max(value, LOWEST_LOGPROB) for value in values.tolist())
        top = tuple(zip(map(text_of, tokens.tolist()), finite, strict=True))
        return TokenLogprobs(text_of(token), max(float(logprobs[token]), LOWEST_LOGPROB), top)


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        sampling: sampling parameters.
        defaults: the model's generation config.
        text_of: decodes a token, for log probabilities.
    """

    def __init__(
        self, sampling: Sampling, defaults: GenerationConfig, text_of: Callable[[int], str]
    ) -> None:
        self._temperature, self._count = sampling.temperature, sampling.logprobs
        self._text_of = text_of
        self.last: TokenLogprobs | None = None
        """Log probabilities of the last chosen token, if the request asks for them."""
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._generator = torch.Generator().manual_seed(seed)
        penalty = _first_set(sampling.repetition_penalty, defaults.repetition_penalty, 1.0)
        self._penalty = None if penalty == 1 else RepetitionPenaltyLogitsProcessor(float(penalty))
        top_k = _first_set(sampling.top_k, defaults.top_k, 0)
        top_p = _first_set(sampling.top_p, defaults.top_p, 1.0)
        min_p = _first_set(sampling.min_p, defaults.min_p, 0.0)
        self._warpers: list[Any] = [
            *([TopKLogitsWarper(top_k)] if top_k else []),
            *([TopPLogitsWarper(float(top_p))] if top_p < 1 else []),
            *([MinPLogitsWarper(float(min_p))] if min_p else []),
        ]

    def choose(self, ids: Sequence[int], scores: torch.Tensor) -> int:
        """Returns the next token.

        Args:
            ids: all tokens up to here.
            scores: logits [1, vocabulary] on the CPU.

        Raises:
            NumericalError: the model computed NaN or infinity.
        """
        logits = scores.double()  # float32 has no room for a temperature of 1e-40
        if not bool((logits < math.inf).all()):  # false for NaN too
            raise NumericalError(
                "the model computed NaN or infinity: its weights are damaged, or they overflow in this "
                "dtype (try --dtype float32)"
            )
        raw = logits[0]
        if self._penalty is not None:
            logits = self._penalty(torch.tensor([ids]), logits)
        logits = torch.nan_to_num(logits, posinf=torch.finfo(logits.dtype).max, neginf=-math.inf)
        if self._temperature == 0:
            token = int(logits.argmax())
        else:
            logits = (
                logits - logits.max()
            ) / self._temperature  # the maximum is 0 at any temperature
            for warper in self._warpers:
                logits = warper(None, logits)
            token = self._draw(logits[0].softmax(dim=-1))
        if self._count is not None:
            self.last = TokenLogprobs.of(raw.log_softmax(dim=-1), token, self._count, self._text_of)
        return token

    def _draw(self, probabilities: torch.Tensor) -> int:
        """Returns a random token; torch.multinomial would sort the whole vocabulary."""
        sums = probabilities.cumsum(dim=-1)
        at = torch.rand(1, generator=self._generator, dtype=sums.dtype) * sums[-1]
        token = int(torch.searchsorted(sums, at, right=True))
        return token if token < len(sums) else int(probabilities.argmax())  # `at` was rounded up


@contextmanager
def pinned_config(model: Any, max_new_tokens: int, pad_token: int) -> Iterator[GenerationConfig]:
    """Context manager: the model's generation config has only its special tokens; yields the config.

    transformers fills every field that a caller leaves open from the model's own config, so this is
    replaced meanwhile: num_beams or guidance_scale would compute something else than asked for.

    Args:
        model: transformers causal language model.
        max_new_tokens: most tokens to generate.
        pad_token: padding token.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=pad_token,
        max_new_tokens=max_new_tokens, do_sample=False,
    )  # fmt: skip
    try:
        yield model.generation_config
    finally:
        model.generation_config = own


def unsupported_fields(config: GenerationConfig) -> list[str]:
    """Returns the set fields of a generation config that would change the text, but are not used."""
    known = GenerationConfig().to_dict().keys()
    defaults = GenerationConfig._get_default_generation_params()
    return sorted(
        name
        for name, value in config.to_diff_dict().items()
        if name in known - SUPPORTED_FIELDS - NEUTRAL_FIELDS
        and not name.startswith("_")
        and value != defaults.get(name)
    )


def _first_set(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
