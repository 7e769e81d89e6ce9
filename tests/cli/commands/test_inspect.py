"""`roundwise inspect`: layers, widths and sizes of a checkpoint, read from its headers."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import roundwise as rw
from roundwise.cli import output
from roundwise.cli.commands import inspect
from roundwise.cli.commands.inspect import summarize
from roundwise.model.streamed import open_streamed_model
from roundwise.plan.plan import plan
from roundwise.system.console import SafeConsole
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
        assert found["served_by"] == {}
        assert "quantized  no" in commands.run("inspect", text_model).stdout

    def test_words(self, commands: Commands, made: tuple[Path, Ended]) -> None:
        ended = commands.run("inspect", made[0])
        assert ended.code == 0
        assert "LlamaForCausalLM" in ended.stdout
        assert re.search(r"^group size +32$", ended.stdout, re.MULTILINE)
        assert re.search(r"^desc act +no$", ended.stdout, re.MULTILINE)
        assert re.search(r"^vLLM, CPU +serves it$", ended.stdout, re.MULTILINE)
        for representation in ("{", "[", "False", "True", "None", "'"):
            assert representation not in ended.stdout


SERVING = [
    ({}, {"vLLM, CPU", "vLLM, GPU", "SGLang", "ExLlamaV2", "GPTQModel"}),
    ({"bits": 3}, {"GPTQModel"}),
    ({"sym": False}, {"ExLlamaV2", "GPTQModel"}),
    ({"desc_act": True}, {"ExLlamaV2", "GPTQModel"}),
    ({"dynamic": {"q_proj": {"bits": 8}}}, {"GPTQModel"}),
    ({"format": "compressed-tensors", "sym": False}, {"vLLM, CPU", "vLLM, GPU", "SGLang"}),
]


@pytest.mark.parametrize(("settings", "engines"), SERVING, ids=[str(each) for each, _ in SERVING])
def test_who_serves_a_finished_checkpoint(
    settings: dict[str, Any], engines: set[str], quantized: Callable[..., Path],
    commands: Commands,
) -> None:  # fmt: skip
    """The same as `plan` says before the run."""
    folder = quantized("llama", **settings)
    found = summarize(str(folder)).served_by
    assert {name for name, reason in found.items() if reason is None} == {
        *engines, "transformers with roundwise",
    }  # fmt: skip


@pytest.mark.slow
def test_plan_and_inspect_say_the_same(
    quantized: Callable[..., Path], folder_of: Callable[[str], Path]
) -> None:
    for name in ("llama", "gpt2", "mixtral"):
        for settings in ({}, {"bits": 3}, {"sym": False}, {"dynamic": {"q_proj": {"bits": 8}}}):
            config = rw.QuantizeConfig(group_size=32, **settings)
            planned = plan(open_streamed_model(folder_of(name)), config)
            assert summarize(str(quantized(name, **settings))).served_by == planned.served_by


def test_long_values_continue_below_themselves_on_a_terminal(
    quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = SafeConsole(force_terminal=True, width=80, record=True, file=io.StringIO())
    for module in (inspect, output):
        monkeypatch.setattr(module, "stdout", terminal)
    inspect.command(str(quantized("llama", sym=False)))
    lines = terminal.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    [at] = [i for i, line in enumerate(lines) if line.startswith("vLLM, CPU")]
    column = lines[at].index("no: it takes symmetric weights only")
    assert lines[at + 1].startswith(" " * column)
    assert lines[at + 1][column] != " "
