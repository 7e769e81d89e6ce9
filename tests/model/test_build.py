"""A model is built from its config alone, without memory for its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.checkpoint.reader import Checkpoint
from roundwise.errors import CheckpointError, ConfigError
from roundwise.model.build import (
    build,
    config_dtype,
    config_size,
    context_length,
    embedding_shape,
    forward_kwargs,
    initialize_tensors,
    load_config,
    model_class,
    text_config,
)
from roundwise.model.streamed import open_streamed_model
from tests.helpers import ARCHITECTURES, LLAMA, edited_json
from tests.matrix.tiny import tiny_model


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
    both = forward_kwargs(tiny_model("T5ForConditionalGeneration"), ids, mask)
    assert both["decoder_input_ids"] is both["input_ids"] is ids
    assert both["decoder_attention_mask"] is both["attention_mask"]


def test_a_model_that_does_not_take_text() -> None:
    model = tiny_model("WhisperForConditionalGeneration")
    with pytest.raises(ConfigError, match="takes input_features instead of text"):
        forward_kwargs(model, torch.tensor([[5]]))


class TestContextLength:
    """How many tokens a model takes, which is not always what its config says."""

    @pytest.mark.parametrize(
        ("config", "limit"),
        [
            (transformers.RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
            (transformers.RobertaConfig(max_position_embeddings=70, pad_token_id=0), 69),
            (transformers.MPNetConfig(max_position_embeddings=514, pad_token_id=1), 512),
            (transformers.BertConfig(max_position_embeddings=512), 512),
            (transformers.XLNetConfig(d_model=64, n_layer=2, n_head=4, d_inner=96), None),
            (transformers.LlamaConfig(max_position_embeddings=77), 77),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_of_a_model(self, config: Any, limit: int | None) -> None:
        for name in ("hidden_size", "intermediate_size"):
            if not isinstance(config, transformers.XLNetConfig):
                setattr(config, name, 48)
        config.num_hidden_layers = 2
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config)
        assert context_length(model) == limit

    def test_of_roberta_is_what_its_forward_takes(self) -> None:
        config = transformers.RobertaConfig(
            vocab_size=99, hidden_size=48, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4, max_position_embeddings=34, pad_token_id=1,
        )  # fmt: skip
        model = transformers.RobertaModel(config)
        limit = context_length(model)
        assert limit == 32
        model(input_ids=torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"is_encoder_decoder": True}, "is_encoder_decoder=true, but LlamaForCausalLM is not an enc"),
        ({"num_labels": 10**9}, "num_labels=1000000000, but no known model has more than 1000000"),
        ({"architectures": ["x" * 100_000], "model_type": "y" * 100_000}, "cannot open"),
        ({"architectures": "LlamaForCausalLM"}, None),
        ({"architectures": [3, None]}, None),
        ({"architectures": ["A\x1b[2J" * 50_000]}, None),
        ({"return_dict": False}, None),
    ],
)  # fmt: skip
def test_settings_of_a_config(
    changes: dict[str, Any], says: str | None, copy_of: Callable[[str], Path]
) -> None:
    folder = copy_of("llama")
    with edited_json(folder / "config.json") as config:
        config.update(changes)
    if says is None:
        model, _ = rw.load(folder)
        assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 128)
        return
    for read in (rw.load, open_streamed_model):
        with pytest.raises(CheckpointError, match=says) as error:
            read(folder)
        assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


class TestSizes:
    """Sizes that a config has, has for each layer, or has not."""

    def test_a_plain_config(self) -> None:
        model = tiny_model("LlamaForCausalLM")
        assert config_size(model, "num_attention_heads") == 4
        assert embedding_shape(model) == (128, 64)

    def test_a_size_that_differs_between_layers(self) -> None:
        model = tiny_model("EmbeddingGemma2TextModel")
        assert config_size(model, "num_key_value_heads") is None
        assert config_size(model, "hidden_size") == 64

    def test_characters_without_a_vocabulary(self) -> None:
        model = tiny_model("CanineModel")
        assert embedding_shape(model) == (0, 64)

    def test_several_text_configs(self) -> None:
        if int(transformers.__version__.split(".")[1]) < 23:
            pytest.skip("needs transformers 5.23, where a MusicgenConfig has defaults")
        config = tiny_model("MusicgenForConditionalGeneration").config
        assert text_config(config) is config.decoder


def test_parameters_that_a_class_makes_on_the_cpu_are_on_the_meta_device() -> None:
    config = tiny_model("XLNetModel").config
    config.architectures = ["XLNetModel"]
    assert all(weight.is_meta for weight in build(config, torch.float32).parameters())


def test_tensors_that_are_never_stored_are_computed() -> None:
    config = tiny_model("MarianMTModel").config
    config.architectures = ["MarianMTModel"]
    model = build(config, torch.float32)
    name = "model.encoder.embed_positions.weight"
    assert model.get_parameter(name).is_meta
    initialize_tensors(model, {name})
    expected = tiny_model("MarianMTModel").get_parameter(name)
    assert model.get_parameter(name).shape == expected.shape
    assert not model.get_parameter(name).is_meta
    position_1 = model.get_parameter(name)[1]
    assert torch.allclose(position_1[0], torch.sin(torch.tensor(1.0)))
    assert model.get_parameter("model.decoder.layers.0.fc1.weight").is_meta
