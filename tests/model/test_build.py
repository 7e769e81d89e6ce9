"""A model is built from its config alone, without memory for its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from roundwise.checkpoint.reader import Checkpoint
from roundwise.errors import CheckpointError, ConfigError
from roundwise.model.build import (
    build,
    config_dtype,
    context_length,
    forward_kwargs,
    load_config,
    model_class,
)
from tests.helpers import ARCHITECTURES, LLAMA, edited_json
from tests.matrix.families import FAMILIES


def test_the_config_of_a_quantized_checkpoint_is_that_of_a_dense_one(
    copy_of: Callable[[str], Path],
) -> None:
    folder = copy_of("llama")
    with edited_json(folder / "config.json") as config:
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    loaded = load_config(Checkpoint(folder))
    assert loaded.hidden_size == 64
    assert not hasattr(loaded, "quantization_config")


def test_overrides_replace_settings_of_the_file(llama: Path) -> None:
    checkpoint = Checkpoint(llama)
    checkpoint.overrides["rms_norm_eps"] = 0.25
    assert load_config(checkpoint).rms_norm_eps == 0.25


def test_an_unknown_architecture_is_one_sentence(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    with edited_json(folder / "config.json") as config:
        config["model_type"] = "no-such-model"
    with pytest.raises(CheckpointError, match=r"cannot open .*llama \(no-such-model\)"):
        load_config(Checkpoint(folder))


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "no-such-type"}, None),
        ({}, None),
    ],
)
def test_dtype_of_a_config(config: dict[str, Any], dtype: torch.dtype | None) -> None:
    assert config_dtype(config) == dtype


def test_the_named_class_or_else_the_causal_one() -> None:
    config = transformers.LlamaConfig(**LLAMA)
    assert model_class(config) is transformers.LlamaForCausalLM
    config.architectures = ["NoSuchModel", "LlamaForSequenceClassification"]
    assert model_class(config) is transformers.LlamaForSequenceClassification
    with pytest.raises(ConfigError, match="t5 is not a causal language model"):
        model_class(transformers.T5Config())


@pytest.mark.parametrize(("name", "length"), [("gpt2", 64), ("llama", 2048), ("bloom", None)])
def test_context_length(name: str, length: int | None) -> None:
    assert context_length(ARCHITECTURES[name].config()) == length


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_only_computed_buffers_have_memory(name: str) -> None:
    config = ARCHITECTURES[name].config()
    model, plain = (
        build(config, torch.bfloat16),
        transformers.AutoModelForCausalLM.from_config(config),
    )
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    computed = dict(plain.named_non_persistent_buffers())
    assert computed
    for key, buffer in model.named_non_persistent_buffers():
        assert torch.equal(buffer, computed[key])
    assert not model.training


def test_an_invalid_config_is_one_sentence() -> None:
    config = transformers.LlamaConfig(**{**LLAMA, "head_dim": None, "num_attention_heads": 4})
    config.num_key_value_heads = 0
    with pytest.raises(CheckpointError, match=r"cannot build the llama of config\.json"):
        build(config, torch.float32)


def test_arguments_of_a_decoder_and_of_an_encoder_decoder() -> None:
    ids, mask = torch.tensor([[5, 6, 7]]), torch.tensor([[True, True, False]])
    decoder = build(ARCHITECTURES["llama"].config(), torch.float32)
    kwargs = forward_kwargs(decoder, ids, mask)
    assert kwargs.keys() == {"input_ids", "use_cache", "attention_mask"}
    assert kwargs["use_cache"] is False
    assert kwargs["attention_mask"].tolist() == [[1, 1, 0]]
    assert "attention_mask" not in forward_kwargs(decoder, ids)
    both = forward_kwargs(FAMILIES["T5"].make(), ids, mask)
    assert both["decoder_input_ids"] is both["input_ids"] is ids
    assert both["decoder_attention_mask"] is both["attention_mask"]


def test_a_model_that_does_not_take_text() -> None:
    model = FAMILIES["Whisper"].make()
    with pytest.raises(ConfigError, match="takes input_features instead of text"):
        forward_kwargs(model, torch.tensor([[5]]))
