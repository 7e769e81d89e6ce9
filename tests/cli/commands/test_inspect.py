"""`roundwise inspect`: layers, widths and sizes of a checkpoint, read from its headers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.outputs import only_json
from tests.helpers import Commands, Ended


class TestInspect:
    def test_json(self, commands: Commands, made: tuple[Path, Ended]) -> None:
        found = only_json(commands.run("inspect", made[0], "--json"))
        assert found["architecture"] == "LlamaForCausalLM"
        assert found["quantization"]["bits"] == 4
        layers = {layer["name"]: layer for layer in found["layers"]}
        assert len(layers) == 21
        down = layers["model.layers.0.mlp.down_proj"]
        assert (down["in_features"], down["out_features"]) == (96, 64)
        assert (down["bits"], down["group_size"], down["act_order"]) == (4, 32, False)
        assert down["bits_per_weight"] == pytest.approx(4 + 20 / 32 + 32 / 64)
        # Two embeddings, two norms per block, one at the end.
        assert found["other_tensors"] == 2 + 6 + 1

    def test_act_order_shows(self, commands: Commands, quantized: Callable[..., Path]) -> None:
        found = only_json(commands.run("inspect", quantized("llama", desc_act=True), "--json"))
        assert any(layer["act_order"] for layer in found["layers"])

    def test_a_model_that_is_not_quantized(self, commands: Commands, text_model: Path) -> None:
        found = only_json(commands.run("inspect", text_model, "--json"))
        assert found["quantization"] is None
        assert found["layers"] == []
        assert "quantized: no" in commands.run("inspect", text_model).stdout

    def test_words(self, commands: Commands, made: tuple[Path, Ended]) -> None:
        ended = commands.run("inspect", made[0])
        assert ended.code == 0
        assert "LlamaForCausalLM" in ended.stdout
        assert "group_size: 32" in ended.stdout
