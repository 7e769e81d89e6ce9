"""Perplexity through a server equals that of the model in this process, on the same windows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.calibration.special_tokens import NO_SPECIAL_TOKENS, SpecialTokens
from roundwise.errors import NumericalError, RunError
from roundwise.evaluation.endpoint.client import Endpoint
from roundwise.evaluation.endpoint.measure import Reference, partial_kl, served_perplexity
from roundwise.evaluation.perplexity import cut_windows
from tests.evaluation.endpoint.servers import Double, serving

FORMS = ["vllm", "openai", "llama.cpp"]
BOS = SpecialTokens(prefix=(0,))


@pytest.fixture(scope="module")
def coarse(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The bundled model rounded to 3 bits."""
    out = tmp_path_factory.mktemp("coarse") / "rtn"
    rw.quantize(tiny, out, rw.QuantizeConfig(bits=3, method="rtn"))
    return rw.load(out, dtype=torch.float32)[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("special", [NO_SPECIAL_TOKENS, BOS], ids=["plain", "bos"])
@pytest.mark.parametrize(("window", "stride"), [(64, 64), (50, 20)])
@pytest.mark.parametrize("form", FORMS)
def test_perplexity_is_that_of_the_model(
    form: str, window: int, stride: int, special: SpecialTokens, loaded: tuple[Any, Any],
    ids: list[int],
) -> None:  # fmt: skip
    expected = rw.perplexity(*loaded, ids[:130], window=window, stride=stride, special=special)
    windows = cut_windows(ids[:130], window, stride, special)
    done: list[float] = []
    with serving(Double(*loaded, form)) as server:
        result = served_perplexity(Endpoint(server.url), loaded[1], windows, progress=done.append)
    assert result.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert (result.tokens, result.window, result.stride) == (
        expected.tokens, expected.window, expected.stride,
    )  # fmt: skip
    assert done[-1] == 1.0
    prompts = [body["prompt"] for _, body in server.bodies]
    assert all(prompt[0] == 0 for prompt in prompts) == (special is BOS)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_model_here_and_there(form: str, loaded: tuple[Any, Any], ids: list[int]) -> None:
    windows = cut_windows(ids[:60], 30, 30, NO_SPECIAL_TOKENS)
    with serving(Double(*loaded, form)) as server:
        result = served_perplexity(
            Endpoint(server.url), loaded[1], windows, against=Reference("here", loaded[0])
        )
    assert result.against is not None
    assert result.against.kl_divergence == pytest.approx(0, abs=1e-6)
    assert result.against.top1_agreement == 1.0
    assert result.against.perplexity == pytest.approx(result.perplexity, rel=1e-5)
    assert 0 < result.against.listed_probability < 1


@pytest.mark.parametrize("form", FORMS)
def test_divergence_from_another_model(
    form: str, loaded: tuple[Any, Any], coarse: Any, ids: list[int]
) -> None:
    windows = cut_windows(ids[:120], 40, 40, NO_SPECIAL_TOKENS)
    with serving(Double(coarse, loaded[1], form)) as server:
        result = served_perplexity(
            Endpoint(server.url), loaded[1], windows, against=Reference("original", loaded[0])
        )
    original = Double(*loaded, form)
    full, partial, agreements, count = 0.0, 0.0, 0, 0
    for begin in range(0, 120, 40):
        p, q = (each.logprobs(ids[begin : begin + 40])[:-1] for each in (original, server))
        full += float((p.exp() * (p - q)).sum())
        agreements += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
        for own, served, token in zip(p, q, ids[begin + 1 :], strict=False):
            top = served.topk(200 if form == "llama.cpp" else 20).indices.tolist()
            listed = sorted({*top, token})
            if form == "llama.cpp" and token not in top:  # asked again, for the whole vocabulary
                listed = list(range(len(own)))
            rest = [1 - float(row[listed].exp().sum()) for row in (own, served)]
            partial += float((own.exp() * (own - served))[listed].sum())
            partial += rest[0] * math.log(rest[0] / rest[1]) if rest[0] > 1e-9 else 0.0
    found = result.against
    assert found is not None
    assert found.top1_agreement == pytest.approx(agreements / count)
    assert 0 < found.kl_divergence <= full / count + 1e-9
    if form == "openai":  # tokens with the same text are not listed
        assert 0.5 * partial < found.kl_divergence * count <= partial + 1e-6
    else:
        assert found.kl_divergence == pytest.approx(partial / count, rel=1e-4)


def test_a_partial_divergence() -> None:
    own, served = torch.tensor([0.5, 0.2], dtype=torch.float64), torch.tensor([0.4, 0.2])
    expected = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4)
    assert partial_kl(own.log(), served.double().log()) == pytest.approx(expected, rel=1e-6)
    whole = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    assert partial_kl(whole, whole) == pytest.approx(0, abs=1e-12)


def test_a_token_without_a_probability(
    loaded: tuple[Any, Any], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = cut_windows(ids[:20], 20, 20, NO_SPECIAL_TOKENS)
    with serving(Double(*loaded, "vllm")) as server:
        endpoint = Endpoint(server.url)
        monkeypatch.setattr(server, "logprobs", lambda ids: torch.full((len(ids), 4096), -math.inf))
        with pytest.raises(NumericalError, match="gives a token no probability"):
            served_perplexity(endpoint, loaded[1], windows)


def test_a_server_that_fails_on_the_way(loaded: tuple[Any, Any], ids: list[int]) -> None:
    windows = cut_windows(ids[:200], 20, 20, NO_SPECIAL_TOKENS)
    with (
        serving(Double(*loaded, "vllm", fail_after=4)) as server,
        pytest.raises(RunError, match=r"\(500\): out of memory"),
    ):
        served_perplexity(Endpoint(server.url), loaded[1], windows, parallel=1)
