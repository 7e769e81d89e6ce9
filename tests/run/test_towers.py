"""`--towers`: vision and audio towers are quantized too, with what pictures and sounds make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.calibration.windows import Batch
from roundwise.checkpoint.quantization_config import quantizes_towers, raw_quantization_config
from roundwise.checkpoint.quantized_layers import quantized_layers
from roundwise.checkpoint.reader import Checkpoint
from roundwise.cli.commands.inspect import summarize
from roundwise.convert import convert
from roundwise.errors import CalibrationError, ConfigError
from roundwise.forward.input_groups import InputGroup
from roundwise.model.build import forward_kwargs, model_class, towers
from roundwise.model.streamed import open_streamed_model
from roundwise.plan.plan import plan
from roundwise.verify import audit
from tests.calibration.test_encoded_media import KINDS, small_models
from tests.calibration.test_encoded_media import encoded as encoded_media
from tests.helpers import Stop, contents, hidden, run_blocks, stop_after
from tests.model.test_fake_forward import picture_inputs, save_seeing_model

OPTIONS: dict[str, Any] = {"samples": 6, "seq_len": 128, "batch_size": 2}
MODES = pytest.mark.parametrize("mode", ["true_sequential", "block"])


@pytest.fixture(scope="module")
def model_of(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """Folder of the small model of a kind, and a file of its records, the last of text alone."""
    return small_models(tiny, tmp_path_factory, texts=["import os, sys " * 40])


def encoded(model: Path, records: Path) -> list[Batch]:
    """The records with pictures or sounds, and a batch of the words of one."""
    media = encoded_media(model, records, 3)
    return [*media[:1], Batch(media[0].input_ids[:, -4:], None), *media[1:]]


def config(**changes: Any) -> rw.QuantizeConfig:
    return rw.QuantizeConfig(**{"group_size": 32, "towers": True, **changes})


@KINDS
@MODES
@torch.no_grad()
def test_hessians_are_those_of_the_plain_model(
    kind: str, mode: str, model_of: Callable[[str], tuple[Path, Path]]
) -> None:
    """Sums over the inputs of every linear of the towers, beside a batch that does not call them."""
    model, records = model_of(kind)
    streamed, batches = open_streamed_model(model, include_towers=True), encoded(model, records)
    plain = model_class(streamed.model.config).from_pretrained(model).eval()
    sums: dict[str, torch.Tensor] = {}
    tokens: dict[str, int] = {}

    def add(name: str) -> Any:
        def hook(_: Any, args: Any) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, torch.zeros(())) + x.T @ x
            tokens[name] = tokens.get(name, 0) + len(x)

        return hook

    names = [name for block in streamed.blocks for name in block.linears]
    for name in names:
        plain.get_submodule(name).register_forward_pre_hook(add(name))
    for batch in batches:
        plain(**forward_kwargs(plain, batch.input_ids, None, batch.inputs))
    seen: set[str] = set()

    def solve(group: InputGroup) -> None:
        moments = group.take_moments()
        assert moments is not None
        for name in group.names:
            seen.add(name)
            assert moments.tokens == tokens[name]
            torch.testing.assert_close(
                moments.H.double() * tokens[name], sums[name], rtol=1e-4, atol=1e-3
            )

    for _ in run_blocks(
        streamed, batches, solve, sequential=mode == "true_sequential", reference=True
    ):
        pass
    assert seen == {*names}
    assert sum("tower" in name for name in seen) == 12


@torch.no_grad()
def test_hidden_states_of_a_tower_that_reads_sizes_of_pictures(tmp_path: Path) -> None:
    """Qwen2.5-VL: window attention, patches without a batch axis."""
    model, inputs = save_seeing_model(tmp_path), picture_inputs()
    streamed = open_streamed_model(model, include_towers=True)
    plain = model_class(streamed.model.config).from_pretrained(model).eval()
    seen: dict[str, torch.Tensor] = {}
    for block in streamed.blocks:
        plain.get_submodule(block.name).register_forward_hook(
            lambda _m, _a, output, key=block.name: seen.update({key: hidden(output)})
        )
    plain(**inputs)
    others = {name: x for name, x in inputs.items() if name != "input_ids"}
    names = iter([block.name for block in streamed.blocks])
    for _, scheduler in run_blocks(
        streamed, [Batch(inputs["input_ids"], None, inputs=others)], reference=True
    ):
        name = next(names)
        for batch in [*scheduler.quantized, *scheduler.references]:
            assert torch.equal(hidden(batch.output), seen[name])
    assert not [*names]


@KINDS
@MODES
@pytest.mark.parametrize("file_format", ["gptq", "compressed-tensors"])
def test_a_run(
    kind: str, mode: Any, file_format: Any, model_of: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
) -> None:  # fmt: skip
    model, records = model_of(kind)
    out = tmp_path / "out"
    result = rw.quantize(model, out, config(format=file_format), records, mode=mode, **OPTIONS)
    layers = [layer for layer in result.layers if "tower" in layer.name]
    assert len(layers) == 12 and not any(layer.fallback for layer in layers)
    assert all(layer.relative_error is not None for layer in layers)
    assert len({layer.tokens for layer in layers}) == 1
    assert audit(out, against=Checkpoint(model)).failures == []
    assert {layer.name for layer in quantized_layers(Checkpoint(out))} == {
        open_streamed_model(model, include_towers=True)
        .checkpoint_name_of[f"{layer.name}.weight"]
        .removesuffix(".weight")
        for layer in result.layers
    }
    assert json.loads((out / "roundwise.json").read_text())["run"]["config"]["towers"] is True
    # The result computes with pictures and sounds as its dequantized weights do.
    convert(out, tmp_path / "dense", "dense", dtype=torch.float32)
    batch = encoded(model, records)[0]
    cls = model_class(open_streamed_model(model).model.config)
    loaded = [
        rw.load(out, dtype=torch.float32)[0],
        cls.from_pretrained(out, dtype=torch.float32).eval(),
        cls.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval(),
        cls.from_pretrained(model, dtype=torch.float32).eval(),
    ]
    if file_format == "gptq":
        tower = loaded[1].get_submodule(towers(loaded[3])[0])
        assert sum("Quant" in type(module).__name__ for module in tower.modules()) == 12
    with torch.no_grad():
        logits = [
            x(**forward_kwargs(x, batch.input_ids, None, batch.inputs)).logits for x in loaded
        ]
    torch.testing.assert_close(logits[0], logits[2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits[1], logits[2], rtol=1e-3, atol=1e-3)
    divergence = torch.nn.functional.kl_div(
        logits[2].log_softmax(-1), logits[3].log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert float(divergence.mean()) < 0.05


@MODES
def test_a_run_resumes_inside_and_behind_a_tower(
    mode: Any, model_of: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    model, records = model_of("image")
    rw.quantize(model, tmp_path / "whole", config(), records, mode=mode, **OPTIONS)
    for count in (4, 9, 17, 25):  # inside and after the first block, then of the language model
        out = tmp_path / f"stopped-{count}"
        with pytest.raises(Stop):
            rw.quantize(
                model, out, config(), records, mode=mode, progress=stop_after(count), **OPTIONS
            )
        rw.quantize(model, out, config(), records, mode=mode, **OPTIONS)
        assert contents(out) == contents(tmp_path / "whole"), count


def test_results_say_that_other_engines_may_not_read_towers(
    model_of: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    rw.quantize(model_of("image")[0], out, config(method="rtn"))
    convert(out, tmp_path / "other", "compressed-tensors")
    for folder in (out, tmp_path / "other"):
        served = summarize(str(folder)).served_by
        assert served.pop("transformers with roundwise") is None
        assert all(reason for reason in served.values())
        assert "vision or audio towers" in (served["vLLM, GPU"] or "")
        raw = raw_quantization_config(Checkpoint(folder))
        assert raw is not None and quantizes_towers(raw)


def test_rounding_to_nearest_needs_no_pictures(
    model_of: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    result = rw.quantize(model_of("image")[0], tmp_path / "out", config(method="rtn"))
    assert sum("tower" in layer.name for layer in result.layers) == 12
    assert audit(tmp_path / "out", against=Checkpoint(model_of("image")[0])).failures == []


def test_what_cannot_be_used(
    model_of: Callable[[str], tuple[Path, Path]], tiny: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="--towers needs calibration records with pictures"):
        rw.quantize(model_of("image")[0], tmp_path / "out", config(), text, **OPTIONS)
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no vision or audio tower"):
        rw.quantize(tiny, tmp_path / "out", config(), text, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_the_plan(model_of: Callable[[str], tuple[Path, Path]]) -> None:
    streamed = open_streamed_model(model_of("image")[0], include_towers=True)
    planned = plan(streamed, config())
    assert sum("tower" in module.name for module in planned.modules if module.bits) == 12
    assert planned.served_by.pop("transformers with roundwise") is None
    assert all(
        reason and "vision or audio tower" in reason for reason in planned.served_by.values()
    )
