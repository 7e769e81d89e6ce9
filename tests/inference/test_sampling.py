"""Choice of tokens: random numbers of one request only, extreme parameters, settings that are pinned."""

from __future__ import annotations

import json
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.errors import ConfigError, NumericalError
from roundwise.inference.generation import generate
from roundwise.inference.sampling import (
    Sampler,
    Sampling,
    TokenLogprobs,
    pinned_config,
    unsupported_fields,
)
from roundwise.system.hub import bundled_model

DEFAULTS = transformers.GenerationConfig()


@cache
def loaded() -> tuple[Any, Any]:
    return rw.load(bundled_model(), dtype=torch.float32)


def text(sampling: Sampling, prompt: str = "import ") -> str:
    model, tokenizer = loaded()
    return generate(model, tokenizer, tokenizer(prompt)["input_ids"], sampling).text


def choose(logits: list[float], sampling: Sampling, ids: list[int] | None = None) -> int:
    sampler = Sampler(sampling, DEFAULTS, str)
    return sampler.choose(ids or [0], torch.tensor([logits]))


class TestRandomness:
    def test_a_seed_does_not_decide_the_next_request(self) -> None:
        after = set()
        for _ in range(4):
            text(Sampling(4, temperature=1.0, seed=7))
            after.add(text(Sampling(16, temperature=1.0)))
        assert len(after) > 1

    def test_a_request_does_not_change_the_random_numbers_of_the_process(self) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        text(Sampling(4, temperature=1.0, seed=7))
        text(Sampling(4, temperature=1.0))
        assert torch.equal(torch.rand(3), expected)

    def test_a_seed_gives_the_same_text_whatever_came_before(self) -> None:
        first = text(Sampling(16, temperature=1.0, seed=3))
        text(Sampling(5, temperature=1.0, seed=4))
        torch.manual_seed(99)
        assert text(Sampling(16, temperature=1.0, seed=3)) == first

    def test_without_seeds_all_are_different(self) -> None:
        torch.manual_seed(0)
        assert len({text(Sampling(24, temperature=1.0)) for _ in range(4)}) == 4

    def test_tokens_are_drawn_by_their_probability(self) -> None:
        logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
        sampler = Sampler(Sampling(1, temperature=1.0, seed=0), DEFAULTS, str)
        drawn = [sampler.choose([0], logits) for _ in range(4000)]
        shares = torch.bincount(torch.tensor(drawn)) / 4000
        assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)


class TestExtremes:
    @pytest.mark.parametrize("temperature", [1e-5, 1e-38, 1e-45, 1e-320, 5e-324])
    def test_a_tiny_temperature_is_the_most_likely_token(self, temperature: float) -> None:
        assert text(Sampling(8, temperature=temperature)) == text(Sampling(8))

    @pytest.mark.parametrize("penalty", [1e-320, 1e-38, 1e-3, 1e300])
    def test_any_penalty_gives_a_text(self, penalty: float) -> None:
        for temperature in (0.0, 1.0):
            assert text(Sampling(4, temperature=temperature, repetition_penalty=penalty))

    @pytest.mark.parametrize("options", [{"top_p": 1e-320}, {"min_p": 1.0}, {"top_k": 1}])
    def test_narrow_limits_are_the_most_likely_token(self, options: dict[str, Any]) -> None:
        assert text(Sampling(8, temperature=2.0, **options)) == text(Sampling(8))

    def test_a_huge_temperature_is_uniform(self) -> None:
        assert {choose([9.0, 0.0], Sampling(1, 1e300, seed=s)) for s in range(20)} == {0, 1}

    def test_tokens_that_cannot_be_are_never_chosen(self) -> None:
        for temperature in (0.0, 1e-320, 1.0, 1e300):
            assert choose([-math.inf, -3.0, -math.inf], Sampling(1, temperature)) == 1

    @pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
    def test_other_temperatures_are_refused(self, value: float) -> None:
        with pytest.raises(ConfigError, match="temperature"):
            Sampling(1, temperature=value)

    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
    def test_other_penalties_are_refused(self, value: float) -> None:
        with pytest.raises(ConfigError, match="repetition_penalty"):
            Sampling(1, repetition_penalty=value)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_model_that_computes_no_number(self, value: float) -> None:
        for temperature in (0.0, 1.0):
            with pytest.raises(NumericalError, match="the model computed NaN or infinity"):
                choose([1.0, value, 0.0], Sampling(1, temperature))


def test_the_penalty_is_that_of_the_paper() -> None:
    # CTRL: positive logits are divided, negative ones multiplied.
    assert choose([2.0, 1.5], Sampling(1, repetition_penalty=1.5), [0]) == 1
    assert choose([-1.0, -1.4], Sampling(1, repetition_penalty=1.5), [0]) == 1
    assert choose([2.0, 1.5], Sampling(1, repetition_penalty=1.2), [0]) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 4},
        {"guidance_scale": 3.0},
        {"num_beams": 2, "num_return_sequences": 2},
        {"no_repeat_ngram_size": 2},
        {"forced_eos_token_id": 5, "min_new_tokens": 6},
        {"suppress_tokens": list(range(2000))},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "typical_p": 0.2},
        {"max_new_tokens": 2, "stop_strings": ["e"]},
        {"return_dict_in_generate": True, "output_scores": True},
        {"token_healing": True},
        {"num_return_sequences": 3, "do_sample": True},
    ],
)
def test_settings_that_are_not_supported_do_not_change_the_text(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    prompt = "import os\n\ndef "
    folder = shutil.copytree(bundled_model(), tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    model, tokenizer = rw.load(folder, dtype=torch.float32)
    ids = tokenizer(prompt)["input_ids"]
    before = model.generation_config.to_dict()
    assert generate(model, tokenizer, ids, Sampling(12)).text == text(Sampling(12), prompt)
    assert model.generation_config.to_dict() == before


def test_they_are_named() -> None:
    config = transformers.GenerationConfig(
        num_beams=4, guidance_scale=1.5, temperature=0.7, do_sample=True, max_length=99,
        eos_token_id=[1, 2], length_penalty=1.0, no_repeat_ngram_size=0, of_its_own=3,
        suppress_tokens=[3],
    )  # fmt: skip
    assert unsupported_fields(config) == ["guidance_scale", "num_beams", "suppress_tokens"]
    assert unsupported_fields(loaded()[0].generation_config) == []


def test_the_config_is_pinned_for_a_while() -> None:
    model, _ = loaded()
    own = model.generation_config
    with pinned_config(model, 7, pad_token=3) as config:
        assert model.generation_config is config
        assert (config.max_new_tokens, config.pad_token_id) == (7, 3)
        assert config.eos_token_id == own.eos_token_id
    assert model.generation_config is own


def test_log_probabilities_are_those_of_the_model() -> None:
    model, tokenizer = loaded()
    ids = tokenizer("import os")["input_ids"]
    seen: list[TokenLogprobs] = []
    answer = generate(
        model, tokenizer, ids, Sampling(6, temperature=1.5, seed=1, logprobs=3),
        on_logprobs=seen.extend,
    )  # fmt: skip
    assert len(seen) == answer.tokens == 6
    everything = [*ids, *tokenizer(answer.text, add_special_tokens=False)["input_ids"]]
    assert len(everything) == len(ids) + 6  # the text has the tokens that were generated
    with torch.no_grad():
        logits = model(torch.tensor([everything])).logits[0].double()
    expected = logits.log_softmax(-1)
    for at, entry in enumerate(seen):
        row = expected[len(ids) - 1 + at]
        token = everything[len(ids) + at]
        assert entry.text == tokenizer.decode([token])
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [t for t, _ in entry.top] == [tokenizer.decode([t]) for t in row.topk(3).indices]
        assert [v for _, v in entry.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_log_probabilities_do_not_know_temperature_or_penalty() -> None:
    sampling = Sampling(1, temperature=0.1, top_k=1, repetition_penalty=5.0, logprobs=2)
    sampler = Sampler(sampling, DEFAULTS, str)
    sampler.choose([0], torch.tensor([[0.5, 0.3, 0.2]]).log())
    assert sampler.last is not None
    assert [value for _, value in sampler.last.top] == pytest.approx([math.log(0.5), math.log(0.3)])
