"""`roundwise convert` as a command."""

import pytest
import torch

from roundwise.checkpoint.reader import Checkpoint
from roundwise.convert import convert
from roundwise.errors import ConfigError, OutputError
from tests.gguf.templates import write_template


def test_invalid_arguments_are_refused(quantized, llama, tmp_path, commands):
    source = quantized("llama", recipe="textbook")
    with pytest.raises(ConfigError, match="use gptq, gptq_v2, compressed-tensors, dense or gguf"):
        convert(source, tmp_path / "out", "awq")
    with pytest.raises(ConfigError, match="--dtype is only for --to dense"):
        convert(source, tmp_path / "out", "gptq", dtype=torch.float16)
    with pytest.raises(OutputError, match="is not empty"):
        convert(source, llama, "gptq")
    ended = commands.run("convert", llama, tmp_path / "out", "--to", "dense")
    assert ended.code == 2
    assert "is not quantized" in ended.sentence


def test_as_a_command(quantized, tmp_path, commands):
    source = quantized("llama", recipe="textbook")
    ended = commands.run("convert", source, tmp_path / "v2", "--to", "gptq_v2", "--json")
    assert ended.code == 0, ended.stderr
    assert ended.json["bytes"] == Checkpoint(source).nbytes()


def test_every_command_takes_compressed_tensors(text_model, text, tmp_path, commands):
    options = ["--bits", "3", "--asym", "--method", "rtn", "--override", "up_proj=bits:8"]
    packed, v2 = tmp_path / "packed", tmp_path / "v2"
    for out, file_format in ((packed, "compressed-tensors"), (v2, "gptq_v2")):
        line = ["quantize", text_model, out, *options, "--format", file_format, "--json"]
        assert commands.run(*line).code == 0
    found, other = (commands.run("inspect", out, "--json").json for out in (packed, v2))
    assert found["quantization"]["quant_method"] == "compressed-tensors"
    sizes = ("name", "bits", "group_size", "in_features", "out_features")
    for one, two in zip(found["layers"], other["layers"], strict=True):
        assert [one[key] for key in sizes] == [two[key] for key in sizes]
    assert found["other_tensors"] == other["other_tensors"]
    assert commands.run("verify", packed, "--against", text_model).code == 0
    figures = commands.run(
        "compare", text_model, packed, v2, "--text", text, "--max-tokens", "256", "--window", "64",
        "--baseline", "rtn", "--no-speed", "--json",
    )  # fmt: skip
    assert figures.code == 0, figures.stderr
    # The baseline is rounded to nearest with the settings of the first: it is the first again.
    distances = [model["kl_divergence"] for model in figures.json["models"]]
    assert len(distances) == 3 and distances == [distances[0]] * 3 and distances[0] > 0
    answers = [
        commands.run("generate", out, "import", "--max-new-tokens", "8", "--json").json
        for out in (packed, v2)
    ]
    assert answers[0]["text"] == answers[1]["text"]
    again = commands.run("quantize", packed, tmp_path / "again", "--method", "rtn")
    assert again.code == 0
    assert "to 3 and 8 bits" in " ".join(again.stdout.split())


def test_gguf_as_a_command(quantized, llama, tmp_path, commands):
    source, out = quantized("llama", recipe="textbook"), tmp_path / "model.gguf"
    template = write_template(llama, tmp_path / "f16.gguf")
    line = ["convert", source, out, "--to", "gguf"]
    ended = commands.run(*line)
    assert ended.code == 2 and "convert_hf_to_gguf.py --outtype f16" in ended.sentence
    line += ["--template", template, "--original", llama, "--rest", "q8_0"]
    ended = commands.run(*line, "--json")
    assert ended.code == 0, ended.stderr
    assert ended.json["types"]["Q4_0"] == 14 and ended.json["bytes"] == out.stat().st_size
    ended = commands.run(*line)
    assert ended.code == 2 and "exists: choose another name" in ended.sentence
    out.unlink()
    ended = commands.run(*line)
    assert "14 Q4_0" in ended.stdout and "bits per weight" in ended.stdout
    ended = commands.run("convert", source, tmp_path / "v2", "--to", "gptq_v2", "--rest", "q8_0")
    assert ended.code == 2 and "--rest is only for --to gguf" in ended.sentence
    ended = commands.run(
        "convert", source, tmp_path / "o.gguf", "--to", "gguf", "--template", template, "--dtype",
        "float16",
    )  # fmt: skip
    assert ended.code == 2 and "--dtype is only for --to dense" in ended.sentence
