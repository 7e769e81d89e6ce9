"""Models that are not plain decoders: two lists of blocks, vision towers, unreached blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor
from transformers.models.llama import modeling_llama as llama

import roundwise as rw
from roundwise.errors import CheckpointError
from roundwise.forward.input_groups import OTHER_TOKENS
from roundwise.model.build import forward_kwargs, model_class
from roundwise.model.streamed import open_streamed_model
from tests.helpers import (
    Stop,
    batches,
    contents,
    hidden,
    random_model,
    raw,
    run_blocks,
    stop_after,
    tensors_of,
    windows,
)
from tests.matrix.tiny import tiny_model

CONFIG = rw.QuantizeConfig(group_size=32)
MODES = pytest.mark.parametrize("mode", ["true_sequential", "block"])


def quantize(model: Path, out: Path, **changes: Any) -> rw.QuantizeResult:
    settings = {"config": CONFIG, "calibration": windows(), "samples": 4, "seq_len": 32}
    return rw.quantize(model, out, **{**settings, "batch_size": 2, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny_model(name).save_pretrained(made[name])
        return made[name]

    return save


@MODES
@pytest.mark.parametrize(
    "name",
    [
        "T5ForConditionalGeneration",
        "BartForConditionalGeneration",
        "BertForMaskedLM",
        "ModernBertForMaskedLM",
        "Gemma3ForConditionalGeneration",
        "FalconH1ForCausalLM",
    ],
)
def test_hidden_states_equal_those_of_the_plain_model(
    name: str, mode: str, folder: Callable[[str], Path]
) -> None:
    streamed, calibration = open_streamed_model(folder(name)), batches(windows())
    plain = model_class(streamed.model.config).from_pretrained(folder(name)).eval()
    seen: dict[str, list[torch.Tensor]] = {block.name: [] for block in streamed.blocks}
    for block in streamed.blocks:
        plain.get_submodule(block.name).register_forward_hook(
            lambda _m, _a, output, key=block.name: seen[key].append(hidden(output))
        )
    with torch.no_grad():
        for batch in calibration:
            plain(**forward_kwargs(plain, batch.input_ids))
    names = iter([block.name for block in streamed.blocks])
    sequential = mode == "true_sequential"
    for _, scheduler in run_blocks(streamed, calibration, sequential=sequential, reference=True):
        name = next(names)
        for batch in [*scheduler.quantized, *scheduler.references]:
            assert torch.equal(hidden(batch.output), seen[name][batch.number])


@pytest.mark.sampled(2)
@MODES
def test_an_encoder_decoder_run_resumes(
    mode: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    # The decoder also needs the outputs of the encoder.
    quantize(folder("BartForConditionalGeneration"), tmp_path / "whole", mode=mode)
    for count in range(9, 34, 4):
        out = tmp_path / f"stopped-{count}"
        with pytest.raises(Stop):
            quantize(
                folder("BartForConditionalGeneration"), out, mode=mode, progress=stop_after(count)
            )
        quantize(folder("BartForConditionalGeneration"), out, mode=mode)
        assert contents(out) == contents(tmp_path / "whole"), count


def test_vision_towers_are_copied_byte_for_byte(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    result = quantize(folder("Gemma3ForConditionalGeneration"), tmp_path)
    assert all("language_model" in layer["name"] for layer in result.layers)
    before, after = tensors_of(folder("Gemma3ForConditionalGeneration")), tensors_of(tmp_path)
    tower = [key for key in before if "vision" in key]
    assert len(tower) > 20
    assert all(raw(before[key]) == raw(after[key]) for key in tower)


def test_blocks_that_text_does_not_reach_are_skipped_and_reported(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    result = quantize(folder("MllamaForConditionalGeneration"), tmp_path)
    assert not any(".layers.1." in layer["name"] for layer in result.layers)
    assert any("the model does not call its block for text alone" in w for w in result.not_as_asked)


def test_linears_whose_weight_is_read_without_a_call_are_skipped_and_reported(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    result = quantize(folder("MambaForCausalLM"), tmp_path)
    assert not any("dt_proj" in layer["name"] for layer in result.layers)
    assert any(
        "dt_proj and 1 more stay dense: the model never calls it" in w for w in result.not_as_asked
    )


def test_layers_that_are_called_several_times_are_reported(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    result = quantize(folder("AlbertForMaskedLM"), tmp_path)
    assert any("called several times in a forward" in warning for warning in result.not_as_asked)
    assert not any(
        "called several" in w for w in quantize(folder("BertForMaskedLM"), tmp_path / "b").warnings
    )


class TestUnusualForwards:
    """Blocks that return lists, experts that transformers calls one by one, models that fail."""

    def quantize(self, folder: Path, out: Path, **changes: Any) -> rw.QuantizeResult:
        config = rw.QuantizeConfig(**{"group_size": 32, **changes})
        return rw.quantize(folder, out, config, windows(), samples=4, seq_len=32, batch_size=2)

    @pytest.mark.parametrize("mode", ["true_sequential", "block"])
    def test_blocks_that_return_lists(self, mode: Any, tmp_path: Path) -> None:
        config = transformers.OpenAIGPTConfig(
            vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64
        )
        random_model(config).save_pretrained(tmp_path / "model")
        result = rw.quantize(
            tmp_path / "model", tmp_path / "out", rw.QuantizeConfig(group_size=32), windows(),
            samples=4, seq_len=32, batch_size=2, mode=mode,
        )  # fmt: skip
        assert len(result.layers) == 8 and not any(layer.fallback for layer in result.layers)
        rw.load(tmp_path / "out")

    def test_experts_that_see_other_tokens(self, tmp_path: Path) -> None:
        """The drift of an expert is that of its own tokens, which the two models choose differently."""
        config = transformers.SwitchTransformersConfig(
            vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_decoder_layers=2,
            num_heads=4, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.SwitchTransformersForConditionalGeneration(config)
        model.save_pretrained(tmp_path / "model")
        result = self.quantize(tmp_path / "model", tmp_path / "out", bits=2)
        apart = [layer.name for layer in result.layers if layer.fallback == OTHER_TOKENS]
        assert apart and all(".experts." in name for name in apart)
        assert any("drift is not corrected" in issue for issue in result.not_as_asked)
        without = self.quantize(tmp_path / "model", tmp_path / "no", bits=2, alpha=0.0, beta=0.0)
        assert not any(layer.fallback == OTHER_TOKENS for layer in without.layers)

    @pytest.mark.parametrize(
        ("kind", "says"),
        [
            (llama.LlamaMLP, r"block model\.layers\.0 \(LlamaDecoderLayer\) fails .*: no way"),
            (torch.nn.Embedding, "LlamaForCausalLM fails on calibration text outside .*: no way"),
        ],
    )
    def test_a_forward_that_fails_is_named(
        self, kind: Any, says: str, folder_of: Callable[[str], Path], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        original = kind.forward

        def forward(module: Any, x: torch.Tensor) -> torch.Tensor:
            if not isinstance(x, FakeTensor):  # the probe on fake tensors may fail
                raise TypeError("no way\nat all")
            return original(module, x)

        monkeypatch.setattr(kind, "forward", forward)
        with pytest.raises(CheckpointError, match=says):
            self.quantize(folder_of("llama"), tmp_path / "out", recipe="textbook")
