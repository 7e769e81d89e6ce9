"""Log probabilities of a text: those of the logits, whole or in parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from roundwise.errors import NumericalError
from roundwise.inference import prompt_logprobs as module
from roundwise.inference.prompt_logprobs import prompt_logprobs
from roundwise.inference.sampling import LOWEST_LOGPROB, TokenLogprobs

IDS = torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bloom"])
@pytest.mark.parametrize("chunk", [256, 7])
def test_they_are_those_of_the_logits(
    name: str, chunk: int, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder_of(name)).eval()
    entries = prompt_logprobs(model, IDS, 3, str)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].double().log_softmax(-1)
    assert entries[0] == TokenLogprobs(str(IDS[0]), None)
    assert len(entries) == len(IDS)
    for at, entry in enumerate(entries[1:], start=1):
        row = expected[at - 1]
        assert entry.text == str(IDS[at])
        assert entry.logprob == pytest.approx(float(row[IDS[at]]), abs=1e-4)
        values, tokens = row.topk(3)
        assert [text for text, _ in entry.top] == [str(token) for token in tokens.tolist()]
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


class Fixed:
    """A model that returns the same logits everywhere."""

    device = torch.device("cpu")

    def __init__(self, *logits: float) -> None:
        self.row = torch.tensor(logits)

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = self.row.expand(1, input_ids.shape[1], -1)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def test_impossible_tokens_have_a_number_too() -> None:
    [_, entry] = prompt_logprobs(Fixed(0.0, float("-inf")), [0, 1], 2, str)
    assert entry.logprob == LOWEST_LOGPROB
    assert entry.top == (("0", 0.0), ("1", LOWEST_LOGPROB))


def test_nan_is_an_error() -> None:
    with pytest.raises(NumericalError, match="NaN"):
        prompt_logprobs(Fixed(0.0, float("nan")), [0, 1], 1, str)


def test_it_can_be_cancelled(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 8)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder_of("llama")).eval()
    assert len(prompt_logprobs(model, IDS, 1, str, cancelled=lambda: True)) == 9
