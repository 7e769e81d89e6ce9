"""Finds the special tokens that a tokenizer puts around a text, such as <bos>, or [CLS] and [SEP].

A model has seen them around every text of its training. Many models keep a part of their attention on
the first of them (an attention sink: Xiao et al. 2023, arXiv 2309.17453), so a window without it gives
activations that the model never has in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from roundwise.errors import CalibrationError

#: Texts to find them with: of the first, all tokens stand unchanged between the special tokens.
PROBES = ("a", "The first line.\nThe second one.", "0")


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids that stand around the tokens of every text; empty: none."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    begin: int | None = field(default=None, compare=False)
    """Token that a chat template may write in place of the prefix; None: there is none."""

    @property
    def count(self) -> int:
        """Number of special tokens of a text."""
        return len(self.prefix) + len(self.suffix)

    def around(self, tokens: Sequence[int]) -> list[int]:
        """Returns a text's tokens between the special tokens.

        Args:
            tokens: token ids of the text.
        """
        return [*self.prefix, *tokens, *self.suffix]

    def add_to(self, tokens: Sequence[int]) -> list[int]:
        """Returns a text's tokens with the special tokens; those that are there are not added again.

        Args:
            tokens: token ids of the text. A chat template, for example, writes <bos> itself.
        """
        begins = tuple(tokens[: len(self.prefix)]) == self.prefix
        begins = begins or (self.begin is not None and [*tokens[:1]] == [self.begin])
        prefix = () if begins else self.prefix
        ends = bool(self.suffix) and tuple(tokens[-len(self.suffix) :]) == self.suffix
        return [*prefix, *tokens, *([] if ends else self.suffix)]


#: A text stands alone.
NO_SPECIAL_TOKENS = SpecialTokens()


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Returns the special tokens that a tokenizer puts around a text, found by trying it.

    Args:
        tokenizer: transformers tokenizer; None: no special tokens.

    Raises:
        CalibrationError: the tokens of a text change when special tokens are added.
    """
    if tokenizer is None:
        return NO_SPECIAL_TOKENS
    for probe in PROBES:
        plain = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
        whole = tokenizer(probe, verbose=False)["input_ids"]
        for start in range(len(whole) - len(plain) + 1):
            end = start + len(plain)
            if plain and list(whole[start:end]) == list(plain):
                begin = getattr(tokenizer, "bos_token_id", None)
                return SpecialTokens(tuple(whole[:start]), tuple(whole[end:]), begin)
    raise CalibrationError(
        f"the special tokens of {type(tokenizer).__name__} cannot be told from those of a text: use "
        "--no-special-tokens"
    )
