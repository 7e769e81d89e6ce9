"""Blocks, linears and the output head are found by structure, whatever the architecture."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

import roundwise as rw
from roundwise.checkpoint.reader import Checkpoint
from roundwise.cli.commands.inspect import summarize
from roundwise.convert import convert
from roundwise.errors import CheckpointError, ConfigError, RoundwiseError
from roundwise.model.blocks import (
    OutputHead,
    check_quantized_head,
    find_blocks,
    head_block,
    is_tied,
    output_head_name,
    set_weight,
    untie,
    untied_checkpoint,
    weight_of,
    wrapped_forwards,
)
from roundwise.model.dequantized_view import dequantized_checkpoint
from roundwise.model.streamed import open_streamed_model
from roundwise.verify import audit
from tests.handmade import PLAIN, is_linear, write
from tests.helpers import (
    ARCHITECTURES,
    LLAMA,
    Architecture,
    edited_json,
    linear_names,
    random_model,
    tensors_of,
)
from tests.matrix.tiny import tiny_model

NAMES = pytest.mark.parametrize("name", ARCHITECTURES)


def saved(folder: Path, *, tied: bool) -> Path:
    config = transformers.Qwen3Config(**LLAMA, tie_word_embeddings=tied)
    random_model(config).save_pretrained(folder)
    assert ("lm_head.weight" in tensors_of(folder)) != tied
    return folder


@NAMES
def test_blocks_and_linears(name: str, folder_of: Callable[[str], Path]) -> None:
    architecture: Architecture = ARCHITECTURES[name]
    streamed = open_streamed_model(folder_of(name))
    count = len(streamed.model.get_submodule(architecture.blocks))
    assert [b.name for b in streamed.blocks] == [f"{architecture.blocks}.{i}" for i in range(count)]
    linears = {linear for block in streamed.blocks for linear in block.linears}
    assert linears == set(linear_names(streamed.model, architecture))


def test_an_encoder_and_a_decoder_are_two_stacks() -> None:
    blocks = find_blocks(tiny_model("T5ForConditionalGeneration"))
    assert [(block.name, block.stack) for block in blocks] == [
        ("encoder.block.0", 0), ("encoder.block.1", 0),
        ("decoder.block.0", 1), ("decoder.block.1", 1),
    ]  # fmt: skip


def test_vision_towers_are_not_searched() -> None:
    blocks = find_blocks(tiny_model("Gemma3ForConditionalGeneration"))
    assert all("language_model" in block.name for block in blocks)


def test_a_tower_beside_a_text_model_is_not_searched() -> None:
    blocks = find_blocks(tiny_model("GitForCausalLM"))  # its config has no part of its own for text
    assert [block.name for block in blocks] == ["git.encoder.layer.0", "git.encoder.layer.1"]


def test_lists_in_lists_are_searched() -> None:
    names = [block.name for block in find_blocks(tiny_model("FunnelModel"))]
    assert names[:2] == ["encoder.blocks.0.0", "encoder.blocks.0.1"]


def test_lists_of_the_same_blocks_are_all_taken() -> None:
    names = [block.name for block in find_blocks(tiny_model("HrmTextForCausalLM"))]
    lists = ("model.L_module.layers", "model.H_module.layers")
    assert names == [f"{name}.{index}" for name in lists for index in range(2)]


def test_a_conv1d_is_seen_as_a_linear() -> None:
    conv = Conv1D(6, 4)
    assert weight_of(conv).shape == (6, 4)
    W = torch.randn(6, 4)
    set_weight(conv, W)
    assert torch.equal(weight_of(conv), W)
    x = torch.randn(2, 4)
    torch.testing.assert_close(conv(x), x @ W.T + conv.bias)


def test_the_weight_keeps_its_dtype() -> None:
    linear = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    set_weight(linear, torch.randn(4, 4))
    assert linear.weight.dtype == torch.bfloat16


def test_a_model_without_repeated_blocks() -> None:
    with pytest.raises(ConfigError, match="Sequential has no repeated blocks with linear layers"):
        find_blocks(torch.nn.Sequential(torch.nn.Linear(4, 4)))


def test_the_list_with_most_weights_is_chosen() -> None:
    model = torch.nn.Module()
    model.adapters = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(5))
    model.layers = torch.nn.ModuleList(
        torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(2)) for _ in range(3)
    )
    assert [block.name for block in find_blocks(model)] == ["layers.0", "layers.1", "layers.2"]
    assert list(find_blocks(model)[1].linears) == ["layers.1.0", "layers.1.1"]


class Doubling(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class SameProduct(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class Router(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = super().forward(x)
        return scores, scores.topk(2).indices


def test_small_linears_and_other_forwards_are_skipped() -> None:
    model = torch.nn.Module()
    kinds = [torch.nn.Linear(64, 64), SameProduct(64, 64), Doubling(64, 64), Router(64, 64)]
    small = [torch.nn.Linear(64, 31), torch.nn.Linear(16, 64)]
    model.layers = torch.nn.ModuleList([torch.nn.ModuleList([*kinds, *small])])
    (block,) = find_blocks(model)
    assert list(block.linears) == ["layers.0.0", "layers.0.1"]
    assert block.skipped_linears == {
        "layers.0.2": "Doubling computes more than a matrix product",
        "layers.0.3": "Router computes more than a matrix product",
        "layers.0.4": "it has fewer than 32 channels",
        "layers.0.5": "it has fewer than 32 channels",
    }


def test_forwards_are_wrapped_and_restored(llama: Path) -> None:
    model = open_streamed_model(llama).model
    blocks = find_blocks(model)
    before = [block.module.forward for block in blocks]
    calls: list[tuple[int, str]] = []

    def wrap(index: int, block: Any, forward: Any) -> Any:
        assert forward == before[index]
        return lambda x: calls.append((index, block.name)) or x

    with pytest.raises(RuntimeError, match="stop"), wrapped_forwards(blocks, wrap):
        assert [block.module(index) for index, block in enumerate(blocks)] == [0, 1]
        raise RuntimeError("stop")
    assert calls == [(0, "model.layers.0"), (1, "model.layers.1")]
    assert [block.module.forward for block in blocks] == before


def test_the_head_as_a_block() -> None:
    model = random_model(ARCHITECTURES["llama"].config())
    x = torch.randn(2, 64)
    linear = model.get_output_embeddings()
    expected = linear(x)
    block = head_block(model)
    assert (block.name, block.prefix, block.is_head) == ("lm_head", "", True)
    assert isinstance(block.module, OutputHead)
    assert model.lm_head is block.module
    assert torch.equal(block.module(x), expected)
    assert dict(block.modules()) == block.linears == {"lm_head": linear}


def test_a_model_without_a_head() -> None:
    model = transformers.AutoModel.from_config(ARCHITECTURES["llama"].config())
    with pytest.raises(ConfigError, match="LlamaModel has no linear head"):
        output_head_name(model)


def test_a_config_is_untied() -> None:
    config = transformers.Qwen3Config(**LLAMA, tie_word_embeddings=True)
    assert is_tied(config)
    untie(config)
    assert not is_tied(config)


def test_a_model_that_computes_differently_when_untied_is_refused(tmp_path: Path) -> None:
    streamed = open_streamed_model(saved(tmp_path, tied=True))

    class ScaledWhenTied(type(streamed.model)):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> Any:
            output = super().forward(**inputs)
            return output * 0.5 if self.config.tie_word_embeddings else output

    streamed.model.all_tied_weights_keys = {}
    streamed.model.__class__ = ScaledWhenTied
    with pytest.raises(ConfigError, match="computes differently if its head is not tied"):
        untied_checkpoint(streamed.checkpoint, streamed.model, streamed.checkpoint_name_of)


def test_a_model_that_cannot_be_untied_is_refused(tmp_path: Path) -> None:
    streamed = open_streamed_model(saved(tmp_path, tied=True))
    with pytest.raises(ConfigError, match="always ties its head to the embedding"):
        untied_checkpoint(streamed.checkpoint, streamed.model, streamed.checkpoint_name_of)


class TestQuantizedHead:
    """A quantized head that the config ties to the embedding is refused by every reader."""

    @pytest.fixture
    def folder(self, llama: Path, tmp_path: Path) -> Path:
        write(
            llama, tmp_path / "head", {**PLAIN, "lm_head": True},
            chosen=lambda name: is_linear(name) or name == "lm_head.weight",
        )  # fmt: skip
        return tmp_path / "head"

    READERS: ClassVar[dict[str, Callable[[Path], Any]]] = {
        "load": rw.load,
        "transformers": transformers.AutoModelForCausalLM.from_pretrained,
        "verify": lambda folder: audit(folder).raise_on_failure(),
        "convert": lambda folder: convert(folder, folder / "out", "gptq_v2"),
        "source": lambda folder: dequantized_checkpoint(Checkpoint(folder)),
        "inspect": lambda folder: summarize(str(folder)),
    }

    @pytest.mark.parametrize("reader", READERS)
    def test_tied(self, reader: str, folder: Path) -> None:
        self.READERS[reader](folder)
        shutil.rmtree(folder / "out", ignore_errors=True)
        with edited_json(folder / "config.json") as config:
            config["tie_word_embeddings"] = True
        with pytest.raises(
            RoundwiseError, match=r"quantized \(lm_head\), .*set tie_word_embeddings"
        ):
            self.READERS[reader](folder)

    @pytest.mark.parametrize(("model_type", "tied"), [("gemma3_text", True), ("llama", False)])
    def test_the_default_of_the_family_counts(self, model_type: str, tied: bool) -> None:
        config = transformers.AutoConfig.for_model(model_type)
        assert is_tied(config) == tied
        check_quantized_head(lambda: config, ["model.layers.0.mlp.up_proj"])
        if tied:
            with pytest.raises(CheckpointError, match="the output head is quantized"):
                check_quantized_head(lambda: config, ["a.b", "lm_head"])
        else:
            check_quantized_head(lambda: config, ["a.b", "lm_head"])
