"""`eval`, `compare` and `bench` through `roundwise serve`: what the model in this process says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import roundwise as rw
from roundwise.evaluation.reference_prompts import compare_answers
from tests.cli.outputs import only_json
from tests.helpers import Commands
from tests.served import Served

PROMPTS = ["def read_file(path):", "import os"]
KEY = ["--api-key", "secret"]


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, rounded to 4 bits."""
    out = tmp_path_factory.mktemp("served") / "tiny-4bit"
    rw.quantize(tiny, out, rw.QuantizeConfig(method="rtn"))
    return out


@pytest.fixture(scope="module")
def server(commands: Commands, checkpoint: Path) -> Iterator[Served]:
    served = Served(
        commands.start(
            "serve", checkpoint, "--port", 0, "--json", "--backend", "transformers", *KEY,
            "--dtype", "float32", "--max-model-len", 300, "--max-requests", 4,
        )
    )  # fmt: skip
    yield served
    served.stop()


def test_eval(server: Served, commands: Commands, checkpoint: Path, tiny: Path, text: Path) -> None:
    options = ["--text", text, "--window", 100, "--stride", 50, "--max-tokens", 250]
    found = only_json(
        commands.run(
            "eval", checkpoint, "--endpoint", server.url, *KEY, *options, "--against", tiny,
            "--dtype", "float32", "--json",
        )
    )  # fmt: skip
    tokenizer = rw.load(tiny)[1]
    expected, original = (
        rw.perplexity(
            rw.load(model, dtype=torch.float32)[0], tokenizer, text.read_text(), window=100,
            stride=50, max_tokens=250,
        )
        for model in (checkpoint, tiny)
    )  # fmt: skip
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-4)
    assert (found["tokens"], found["window"], found["stride"]) == (expected.tokens, 100, 50)
    assert (found["model"], found["scored_by"]) == ("tiny-4bit", "echo")
    assert found["against"]["perplexity"] == pytest.approx(original.perplexity, rel=1e-5)
    assert 0 < found["against"]["kl_divergence"] < 0.1
    assert 0.5 < found["against"]["top1_agreement"] < 1


def test_eval_in_words(server: Served, commands: Commands, checkpoint: Path, text: Path) -> None:
    ended = commands.run(
        "eval", checkpoint, "--endpoint", server.url, *KEY, "--text", text, "--window", 5000,
        "--max-tokens", 400, "--against", checkpoint,
    )  # fmt: skip
    assert ended.code == 0, ended.stderr
    lines = ended.stdout.splitlines()
    # One token less than the server's context: it generates one. Two windows lose their first token.
    assert re.fullmatch(r"perplexity \d+\.\d{4}  \(398 tokens, window 299, stride 299\)", lines[0])
    assert lines[1].endswith("scored by echo")
    assert lines[2].startswith(f"{checkpoint} here: perplexity")
    assert re.match(
        r"KL per token at least 0\.00\d+, top-1 agreement (9\d\.\d\d|100\.00)%", lines[3]
    )


def test_compare(
    server: Served, commands: Commands, checkpoint: Path, tiny: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    options = ["--prompts", file, "--max-new-tokens", 10, "--dtype", "float32"]
    there = commands.run("compare", tiny, "--endpoint", server.url, *KEY, *options, "--json")
    here = commands.run("compare", tiny, checkpoint, *options, "--json")
    [expected] = compare_answers(tiny, [checkpoint], PROMPTS, tokens=10, dtype=torch.float32)
    for ended, name in ((there, server.url.removesuffix("/v1")), (here, "tiny-4bit")):
        found = only_json(ended)
        assert found["models"] == []
        assert found["prompts"] == [{**expected.as_dict(), "name": name}]


def test_the_exit_code_of_compare(
    commands: Commands, checkpoint: Path, tiny: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("import os\nclass Stack:\ndef main():\nif __name__ ==")
    coarse = tmp_path / "coarse"
    rw.quantize(tiny, coarse, rw.QuantizeConfig(bits=2, method="rtn"))
    options = ["--prompts", file, "--max-new-tokens", 16, "--min-agreement", 0.99]
    assert commands.run("compare", tiny, tiny, *options).code == 0
    ended = commands.run("compare", tiny, coarse, *options)
    assert ended.code == 1
    assert re.search(
        r"failed: coarse: \d+\.\d% of the answers agree, less than 99\.0%", ended.stderr
    )
    assert "coarse: " in ended.stdout
    assert "  original   " in ended.stdout
    assert re.search(r"parts at token \d+ of 16, which the original gave \d+%", ended.stdout)


def test_bench(server: Served, commands: Commands, checkpoint: Path) -> None:
    options = ["--prompt-tokens", 8, "--generated-tokens", 4, "--repetitions", 2]
    ended = commands.run(
        "bench", checkpoint, "--endpoint", server.url, *KEY, "--concurrency", "1,3", *options,
        "--json",
    )  # fmt: skip
    found = only_json(ended)
    assert [(load["concurrency"], load["requests"]) for load in found["loads"]] == [(1, 2), (3, 6)]
    for load in found["loads"]:
        assert load["failed"] == 0
        assert load["prompt_tokens"] == 8
        assert load["generated_tokens"] <= 4 * load["requests"]
        assert load["generation_tokens_per_second"] > 0
        assert 0 < load["first_token_ms"]["p50"] <= load["first_token_ms"]["p99"]
        assert load["request_seconds"]["p50"] > 0


def test_bench_in_words_says_what_failed(server: Served, commands: Commands) -> None:
    # The server takes four requests; the others are refused.
    ended = commands.run(
        "bench", "--endpoint", server.url, *KEY, "--concurrency", "16", "--prompt-tokens", 100,
        "--generated-tokens", 50, "--repetitions", 1,
    )  # fmt: skip
    assert ended.code == 1
    assert re.search(r"failed: \d+ of 16 requests with 16 at a time: .*429", ended.stderr)
    assert "tokens/s" in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "--text", "x"], "name the model to measure"),
        (["eval", "m", "--text", "x", "--against", "y"], "--against needs --endpoint"),
        (["eval", "m", "--endpoint", "e", "--tasks", "t"], "--endpoint measures a text"),
        (["bench"], "name the model to measure"),
        (["bench", "m", "--concurrency", "2"], "--concurrency needs --endpoint"),
        (["bench", "--endpoint", "e", "--kernel", "cpp"], "are for a model in this process"),
        (["compare", "m"], "name a quantized model behind the original"),
        (["compare", "m", "q", "--min-agreement", "1"], "need prompts: --prompts FILE"),
        (["compare", "m", "q", "--prompts", "p", "--endpoint", "e"], "give only the original"),
        (["compare", "m", "--prompts", "p", "--endpoint", "e", "--text", "t"], "give only the"),
        (["eval", "m", "--text", "x", "--endpoint", "http://127.0.0.1:9"], "start it first"),
    ],
)  # fmt: skip
def test_bad_usage(arguments: list[str], said: str, commands: Commands) -> None:
    ended = commands.run(*arguments)
    assert ended.code == 2
    assert said in ended.sentence


@pytest.mark.parametrize("numbers", ["0", "1,x", "-1", "1,2000", ","])
def test_numbers_of_requests(numbers: str, commands: Commands) -> None:
    ended = commands.run("bench", "--endpoint", "e", "--concurrency", numbers)
    assert ended.code == 2
    assert "write numbers from 1 to 1024" in ended.sentence
