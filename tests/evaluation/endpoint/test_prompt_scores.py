"""Log probabilities of a prompt are the model's, in each way that servers have."""

from __future__ import annotations

from typing import Any

import pytest

from roundwise.errors import RunError
from roundwise.evaluation.endpoint.client import Endpoint
from roundwise.evaluation.endpoint.prompt_scores import PromptScorer
from tests.evaluation.endpoint.servers import Double, serving

WAYS = [("vllm", "prompt_logprobs", 20), ("openai", "echo", 20), ("llama.cpp", "n_probs", 200)]


@pytest.mark.parametrize(("form", "way", "count"), WAYS)
def test_scores_are_those_of_the_model(
    form: str, way: str, count: int, loaded: tuple[Any, Any], ids: list[int]
) -> None:
    with serving(Double(*loaded, form)) as server:
        scorer = PromptScorer(Endpoint(server.url), loaded[1], ids)
        scores = scorer.score(ids[:40], slice(5, 40))
    assert (scorer.way, scorer.count) == (way, count)
    rows = server.logprobs(ids[:40])
    assert len(scores) == 35
    for place, score in enumerate(scores, start=5):
        row = rows[place - 1]
        assert score.logprob == pytest.approx(float(row[ids[place]]), abs=1e-5)
        assert score.top[ids[place]] == score.logprob
        assert len(score.top) >= (
            5 if way == "echo" else count
        )  # texts of several tokens are left out
        for token, logprob in score.top.items():
            assert logprob == pytest.approx(float(row[token]), abs=1e-5)
        assert int(row.argmax()) in score.best
        assert len(score.best) == 1 or way == "echo"


def test_an_unlikely_token_is_found_by_llama_cpp_too(
    loaded: tuple[Any, Any], ids: list[int]
) -> None:
    with serving(Double(*loaded, "llama.cpp")) as server:
        scorer = PromptScorer(Endpoint(server.url), loaded[1], ids)
        least = int(server.logprobs(ids[:5])[-1].argmin())
        [score] = scorer.score([*ids[:5], least], slice(5, 6))
    assert score.logprob == pytest.approx(float(server.logprobs(ids[:5])[-1].min()), abs=1e-5)
    assert server.bodies[-1][1]["n_probs"] == len(loaded[1])


@pytest.mark.parametrize("most", [5, 1])
def test_a_server_with_a_lower_limit(most: int, loaded: tuple[Any, Any], ids: list[int]) -> None:
    with serving(Double(*loaded, "vllm", most=most)) as server:
        scorer = PromptScorer(Endpoint(server.url), loaded[1], ids)
    assert (scorer.way, scorer.count) == ("prompt_logprobs", most)


def test_a_server_without_log_probabilities(loaded: tuple[Any, Any], ids: list[int]) -> None:
    # It ignores the fields, as llama.cpp did with `echo` for a time: never taken for an answer.
    with (
        serving(Double(*loaded, "mute")) as server,
        pytest.raises(RunError, match=r"prompt_logprobs: .*; echo: .*; n_probs: .*404"),
    ):
        PromptScorer(Endpoint(server.url), loaded[1], ids)


def test_other_tokens_than_were_sent(
    loaded: tuple[Any, Any], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Double(*loaded, "vllm", most=1)) as server:
        scorer = PromptScorer(Endpoint(server.url), loaded[1], ids)
        whole = server.answer("/v1/completions", {"prompt": ids[1:9], "prompt_logprobs": 1})
        monkeypatch.setattr(server, "answer", lambda *_: whole)
        with pytest.raises(RunError, match="scores other tokens than were sent"):
            scorer.score(ids[:8], slice(1, 8))
