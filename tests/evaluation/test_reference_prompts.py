"""Greedy answers to prompts: where they part, in this process and through a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.calibration.records import Chat
from roundwise.errors import CalibrationError, CheckpointError
from roundwise.evaluation.endpoint.client import Endpoint
from roundwise.evaluation.reference_prompts import (
    Answer,
    Prompt,
    common_length,
    compare_answer,
    compare_answers,
    encode_prompts,
    read_prompts,
)
from roundwise.inference.generation import generate
from roundwise.inference.sampling import Sampling
from tests.evaluation.endpoint.servers import Double, serving
from tests.helpers import CHAT_TEMPLATE

PROMPTS = ["def read_file(path):", "import os\n", "class Stack:\n    def push(self"]


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Any]:
    return rw.load(tiny, dtype=torch.float32)


@pytest.fixture(scope="module")
def coarse(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model rounded to 2 bits, which answers otherwise."""
    out = tmp_path_factory.mktemp("coarse") / "rtn-2bit"
    rw.quantize(tiny, out, rw.QuantizeConfig(bits=2, method="rtn"))
    return out


def greedy(model: Any, tokenizer: Any, prompt: str, count: int) -> list[int]:
    """The most likely tokens, one forward for each."""
    ids = list(tokenizer(prompt)["input_ids"])
    begin = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[begin:]


def test_answers_of_the_same_model_agree(tiny: Path, loaded: tuple[Any, Any]) -> None:
    [result] = compare_answers(tiny, [tiny], PROMPTS, tokens=12, dtype=torch.float32)
    assert result.name == "tiny-llama"
    assert (result.agreement, result.same) == (1.0, 3)
    assert all(each.parting is None for each in result.results)


def test_where_answers_part(tiny: Path, coarse: Path, loaded: tuple[Any, Any]) -> None:
    [result] = compare_answers(tiny, [coarse], PROMPTS, tokens=12, dtype=torch.float32)
    model, tokenizer = loaded
    other = rw.load(coarse, dtype=torch.float32)[0]
    total = 0
    for prompt, found in zip(PROMPTS, result.results, strict=True):
        own, theirs = (greedy(each, tokenizer, prompt, 12) for each in (model, other))
        agreeing = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=True)) if a != b), 12)
        total += agreeing
        assert (found.prompt, found.tokens, found.agreeing) == (prompt, 12, agreeing)
        assert (found.parting is None) == (agreeing == 12)
        if found.parting is not None:
            ids = [*tokenizer(prompt)["input_ids"], *own[:agreeing]]
            with torch.no_grad():
                expected = model(torch.tensor([ids])).logits[0, -1].softmax(-1)[own[agreeing]]
            assert found.parting.probability == pytest.approx(float(expected), rel=1e-4)
            assert tokenizer.decode(own[agreeing:]).startswith(found.parting.original)
            assert found.parting.original[:1] != found.parting.quantized[:1] or common_length(
                found.parting.original, found.parting.quantized
            )
    assert result.agreement == pytest.approx(total / 36)
    assert result.agreement < 1
    assert result.as_dict()["results"][0]["agreeing"] == result.results[0].agreeing


def test_a_server_answers(tiny: Path, coarse: Path, loaded: tuple[Any, Any]) -> None:
    [here] = compare_answers(tiny, [coarse], PROMPTS, tokens=8, dtype=torch.float32)
    with serving(Double(rw.load(coarse, dtype=torch.float32)[0], loaded[1], "vllm")) as server:
        [there] = compare_answers(
            tiny, [], PROMPTS, tokens=8, endpoint=Endpoint(server.url), dtype=torch.float32
        )
    assert there.name == server.url
    assert there.results == here.results
    assert all(body["temperature"] == 0 for _, body in server.bodies)


def test_ends_and_halves_of_answers(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompt = Prompt("import os\n", list(tokenizer("import os\n")["input_ids"]))
    own = generate(model, tokenizer, prompt.ids, Sampling(6))
    whole = Answer(own.text, ended=False)
    assert compare_answer(model, tokenizer, prompt, own, whole).parting is None
    # The same text, but it ended: the last token differs.
    ended = compare_answer(model, tokenizer, prompt, own, Answer(own.text, ended=True))
    assert ended.agreeing == 5
    nothing = compare_answer(model, tokenizer, prompt, own, Answer("", ended=True))
    assert (nothing.agreeing, nothing.tokens) == (0, 6)
    assert nothing.parting is not None
    assert nothing.parting.quantized == ""
    assert own.text.startswith(nothing.parting.original)


def test_lines_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("first\n\n  \nsecond line\n")
    assert read_prompts(str(path)) == ["first", "second line"]


@pytest.mark.parametrize("name", ["prompts.jsonl", "PROMPTS.JSONL"])
def test_records(name: str, tmp_path: Path, tiny: Path, loaded: tuple[Any, Any]) -> None:
    path = tmp_path / name
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    records = [{"text": "two\nlines"}, {"messages": [question, answer]}, {"messages": [question]}]
    path.write_text("\n".join(map(json.dumps, records)))
    prompts = read_prompts(str(path))
    assert prompts == ["two\nlines", Chat([question]), Chat([question])]
    tokenizer = loaded[1]
    with pytest.raises(CheckpointError, match="no chat template"):
        encode_prompts(tokenizer, prompts)
    tokenizer.chat_template = CHAT_TEMPLATE
    try:
        encoded = encode_prompts(tokenizer, prompts)
    finally:
        tokenizer.chat_template = None
    assert [prompt.text for prompt in encoded] == ["two\nlines", "q", "q"]
    assert encoded[1].ids == encoded[2].ids


def test_a_chat_with_nothing_to_answer(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": "hello"}]}))
    with pytest.raises(CalibrationError, match="no message to answer"):
        read_prompts(str(path))


def test_another_vocabulary(tiny: Path, llama: Path) -> None:
    with pytest.raises(CheckpointError, match="another vocabulary"):
        compare_answers(tiny, [llama], PROMPTS[:1], tokens=2)


@pytest.mark.parametrize(
    ("left", "right", "length"),
    [("", "a", 0), ("ab", "ab", 2), ("abc", "abd", 2), ("ab", "abc", 2)],
)
def test_common_length(left: str, right: str, length: int) -> None:
    assert common_length(left, right) == length
