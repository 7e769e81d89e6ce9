"""The evaluation text of `eval`, `compare` and `report`: its tokens, and the length of its windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roundwise.calibration.special_tokens import SpecialTokens


def evaluation_tokens(
    model: str, text: str | None, max_tokens: int | None, *, special: bool
) -> tuple[list[int], SpecialTokens]:
    """Returns the first tokens of a text, and the special tokens to put around every window.

    Args:
        model: the original model, whose tokenizer is used.
        text: source of the text; None: no text, no tokens.
        max_tokens: tokens of the text to use; None: all.
        special: False: no special tokens.
    """
    from roundwise.calibration.sources import read_text
    from roundwise.calibration.special_tokens import NO_SPECIAL_TOKENS, special_tokens
    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.evaluation.perplexity import token_ids
    from roundwise.model.tokenizer import load_tokenizer
    from roundwise.system.hub import local_folder

    if text is None:
        return [], NO_SPECIAL_TOKENS
    tokenizer = load_tokenizer(Checkpoint(local_folder(model)))
    around = special_tokens(tokenizer) if special else NO_SPECIAL_TOKENS
    return token_ids(tokenizer, read_text(text))[:max_tokens], around


def fitting_window(model: str, window: int) -> int:
    """Returns `window`, or the longest text that the model takes if that is less."""
    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.model.build import context_length, load_config
    from roundwise.system.hub import local_folder

    config = load_config(Checkpoint(local_folder(model)))
    return min(window, context_length(config) or window)
