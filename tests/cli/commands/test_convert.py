"""`roundwise convert` as a command."""

import pytest
import torch

from roundwise.checkpoint.reader import Checkpoint
from roundwise.convert import convert
from roundwise.errors import ConfigError, OutputError


def test_invalid_arguments_are_refused(quantized, llama, tmp_path, commands):
    source = quantized("llama", recipe="textbook")
    with pytest.raises(ConfigError, match="use gptq, gptq_v2, compressed-tensors, dense"):
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
