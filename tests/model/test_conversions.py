"""Every tensor of the model is mapped to its name in the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from roundwise.checkpoint.reader import Checkpoint
from roundwise.errors import CheckpointError
from roundwise.model.conversions import map_tensor_names
from roundwise.model.streamed import open_streamed_model
from tests.helpers import ARCHITECTURES, LLAMA, random_model


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_files_as_transformers_writes_them(name: str, folder_of: Callable[[str], Path]) -> None:
    streamed = open_streamed_model(folder_of(name))
    names = map_tensor_names(streamed.model, streamed.checkpoint)
    stored = streamed.checkpoint.tensors
    for key, parameter in streamed.model.named_parameters(remove_duplicate=False):
        assert names[key] in stored
        assert names[key] == key or key in ("lm_head.weight",)
        assert stored[names[key]].shape == tuple(parameter.shape)


def test_a_base_model_has_no_prefix_in_its_files(tmp_path: Path) -> None:
    model = random_model(ARCHITECTURES["gpt2"].config())
    model.transformer.save_pretrained(tmp_path)
    names = map_tensor_names(model, Checkpoint(tmp_path))
    assert names["transformer.h.1.mlp.c_fc.weight"] == "h.1.mlp.c_fc.weight"
    assert names["lm_head.weight"] == "wte.weight"  # tied


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model = random_model(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    names = map_tensor_names(model, Checkpoint(tmp_path))
    assert names["lm_head.weight"] == "model.embed_tokens.weight"


def test_missing_tensors_are_named(llama: Path) -> None:
    model, checkpoint = open_streamed_model(llama).model, Checkpoint(llama)
    for index in (0, 1):
        for layer in ("gate_proj", "up_proj"):
            del checkpoint.tensors[f"model.layers.{index}.mlp.{layer}.weight"]
    with pytest.raises(
        CheckpointError,
        match=r"lacks model\.layers\.0\.mlp\.gate_proj\.weight, .* and 1 more, which",
    ):
        map_tensor_names(model, checkpoint)


def test_a_shape_that_differs_from_the_config(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"vocab_size": 128', '"vocab_size": 96'))
    with pytest.raises(CheckpointError, match=r"has shape \[128, 64\].*requires \[96, 64\]"):
        open_streamed_model(folder).load_outside_blocks()
