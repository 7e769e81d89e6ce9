"""What a report measures: both models on a text, beside rounding to nearest, and their answers."""

import pytest

import roundwise as rw
from roundwise.errors import CheckpointError
from roundwise.evaluation.compare import Protocol
from roundwise.evaluation.report.measure import evaluate, generate_answers, greedy_answer
from roundwise.system.hub import bundled_model


def test_the_command_measures_and_lets_both_models_answer(finished_run, commands):
    out, _ = finished_run
    done = commands.run(
        "report", str(out), "--against", str(bundled_model()), "--text", "python-stdlib",
        "--max-tokens", "800", "--window", "128", "--prompt", "def f(x):", "--prompt", "import ",
        "--output", str(out.parent / "full.html"), "--json",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    page = (out.parent / "full.html").read_text()
    assert done.json["bytes"] == len(page.encode())
    compared = commands.run(
        "compare", str(bundled_model()), str(out), "--text", "python-stdlib", "--max-tokens", "800",
        "--window", "128", "--no-speed", "--baseline", "rtn", "--json",
    )  # fmt: skip
    for model in compared.json["models"]:
        assert f"{model['kl_divergence']:.5f}" in page
        assert f"{model['perplexity']['quantized']:.4f}" in page
    assert page.count('<div class="two">') == 2
    assert page.count("<svg") == 5


def test_other_folders_are_refused(finished_run, commands):
    out, _ = finished_run
    done = commands.run("report", str(out), "--text", "python-stdlib")
    assert (done.code, "--against MODEL" in done.stderr) == (2, True)
    done = commands.run("report", str(bundled_model()))
    assert (done.code, "has no roundwise.json" in done.stderr) == (2, True)


@pytest.fixture(scope="module")
def quantized_text_model(text_model, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("measure") / "q"
    config = rw.QuantizeConfig(bits=2, group_size=32, recipe="textbook")
    rw.quantize(text_model, out, config, str(text), samples=8, seq_len=32)
    return out


def test_the_original_comes_first(text_model, quantized_text_model, text):
    ids = rw.load(text_model)[1](text.read_text())["input_ids"][:256]
    protocol = Protocol(ids, window=64, stride=32, speed=False)
    steps = []
    evaluation = evaluate(
        text_model, quantized_text_model, protocol, "notes.txt",
        progress=lambda step, _: steps.append(step),
    )  # fmt: skip
    assert evaluation.text == "notes.txt: 256 tokens, windows of 64, stride 32"
    original, quantized, rounded = evaluation.models
    assert (original.name, quantized.name, rounded.name) == ("original", "q", "rounded to nearest")
    assert (original.kl_divergence, original.top1_agreement) == (0.0, 1.0)
    assert original.kl_by_position == []
    assert quantized.bytes == rounded.bytes < original.bytes
    assert quantized.kl_divergence > 0 < rounded.kl_divergence
    assert [start for start, _ in quantized.kl_by_position] == list(range(0, 64, 8))
    model, _ = rw.load(text_model)
    expected = rw.perplexity(model, None, ids, window=64, stride=32).perplexity
    assert original.perplexity == pytest.approx(expected, rel=1e-6)
    assert any(step.startswith("divergence of") for step in steps)


def test_answers_of_both_models(text_model, quantized_text_model):
    prompts = ["import os", "def f(x):"]
    answers = generate_answers(text_model, quantized_text_model, prompts, tokens=6)
    assert [each.prompt for each in answers] == prompts
    for path, texts in (
        (text_model, [each.original for each in answers]),
        (quantized_text_model, [each.quantized for each in answers]),
    ):
        model, tokenizer = rw.load(path)
        assert texts == [greedy_answer(model, tokenizer, prompt, 6) for prompt in prompts]
        ids = tokenizer(prompts[0], return_tensors="pt")["input_ids"]
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert texts[0] == tokenizer.decode(expected, skip_special_tokens=True)
    assert generate_answers("nowhere", "nowhere", []) == []


def test_a_model_without_a_tokenizer_cannot_answer(llama):
    with pytest.raises(CheckpointError, match="has no usable tokenizer"):
        generate_answers(llama, llama, ["import os"])
