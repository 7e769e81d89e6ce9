"""Gradients of a few tokens, block by block, equal those of plain autograd on the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.calibration.windows import Batch
from roundwise.checkpoint.side_files import WORK
from roundwise.errors import FallbackError
from roundwise.forward import output_gradients
from roundwise.forward.output_gradients import OutputGradients
from roundwise.model.blocks import Block
from roundwise.model.streamed import open_streamed_model
from tests.helpers import ARCHITECTURES, batches, contents, windows

QUICK: dict[str, Any] = {"group_size": 32, "recipe": "textbook", "output_tokens": 64}


def measure(
    folder: Path, out: Path, calibration: list[Batch], tokens: int = 1 << 20
) -> OutputGradients:
    """Writes the gradients of a model's blocks."""
    (out / WORK).mkdir(parents=True)
    streamed = open_streamed_model(folder)
    streamed.load_outside_blocks()
    gradients = OutputGradients(out)
    assert gradients.measure(streamed, calibration, tokens=tokens, first=0) is None
    assert all(p.is_meta for block in streamed.blocks for p in block.module.parameters())
    return gradients


def moment(parts: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """gᵀg / n of gradients g in parts, and n."""
    g = torch.cat(parts).float()
    return g.T @ g / len(g), len(g)


def moments_by_autograd(
    folder: Path, names: list[str], calibration: list[Batch]
) -> dict[str, torch.Tensor]:
    """gᵀg / n of plain autograd, with the same sampled tokens as those of `OutputGradients`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    generator = torch.Generator().manual_seed(0)
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, y, name=name: kept[name].append(y) or y.retain_grad()
        )
    total: dict[str, torch.Tensor] = {}
    count = 0
    for batch in calibration:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        rows = logits.detach().reshape(-1, logits.shape[-1])
        sampled = [
            output_gradients.sample_tokens(part.softmax(-1), generator)
            for part in rows.split(output_gradients.MIN_TOKENS)
        ]
        loss = -logits.log_softmax(-1).reshape(rows.shape).gather(1, torch.cat(sampled)).sum()
        loss.backward()
        for name in names:
            g = kept[name].pop().grad.reshape(batch.input_ids.numel(), -1)
            total[name] = total.get(name, 0) + g.T @ g
        count += batch.input_ids.numel()
    return {name: value / count for name, value in total.items()}


def test_tokens_are_sampled_by_their_probabilities():
    p = torch.tensor([[0.0, 0.5, 0.125, 0.375, 0.0]])
    generator = torch.Generator().manual_seed(0)
    sampled = output_gradients.sample_tokens(p.expand(40_000, -1), generator)
    assert sampled.shape == (40_000, 1)
    frequencies = torch.bincount(sampled[:, 0], minlength=5) / len(sampled)
    assert frequencies.tolist() == pytest.approx(p[0].tolist(), abs=0.01)  # 4 standard deviations
    assert frequencies[0] == 0 and frequencies[4] == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_equal_those_of_the_whole_model(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    calibration = batches(windows())
    gradients = measure(folder_of(name), tmp_path, calibration)
    blocks = open_streamed_model(folder_of(name)).blocks
    linears = [linear for block in blocks for linear in block.linears]
    expected = moments_by_autograd(folder_of(name), linears, calibration)
    for index, block in enumerate(blocks):
        outputs = gradients.of_block(index)
        for linear in block.linears:
            B, tokens = moment(outputs[linear])
            assert tokens == sum(batch.input_ids.numel() for batch in calibration)
            scale = float(expected[linear].diagonal().mean())
            assert torch.allclose(B, expected[linear], rtol=1e-3, atol=1e-4 * scale), linear


def test_the_requested_tokens_run_in_parts_that_fit(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration, folder = batches(windows(8), size=4), folder_of("llama")
    length = calibration[0].input_ids.shape[1]
    few = measure(folder, tmp_path / "few", calibration, tokens=3 * length)
    name = "model.layers.0.mlp.down_proj"
    assert moment(few.of_block(0)[name])[1] == 3 * length
    whole = moment(measure(folder, tmp_path / "whole", calibration).of_block(0)[name])
    monkeypatch.setattr(output_gradients, "MAX_LOGITS", 128 * length)  # a window at a time
    monkeypatch.setattr(output_gradients, "MIN_TOKENS", 1)
    monkeypatch.setattr(output_gradients, "MIN_CONTEXT", 1)
    parts = measure(folder, tmp_path / "parts", calibration)
    assert len([*(tmp_path / "parts" / WORK).glob("gradients-00000-*")]) == 8
    assert moment(parts.of_block(0)[name])[1] == whole[1]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_have_the_gradients_of_their_tokens(
    name: str, tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    result = rw.quantize(
        folder_of(name), tmp_path / "out", rw.QuantizeConfig(**QUICK), windows(), batch_size=2
    )
    counts = {
        layer["name"]: layer["gradients"] for layer in result.layers if "experts" in layer["name"]
    }
    assert len({*counts.values()}) > 1
    assert max(counts.values()) < 64 * 2
    assert not any("gradients" in line for line in result.not_as_asked)


def test_padding_has_no_gradient(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    rows = windows(2)
    ids = torch.tensor([rows[0], rows[1][:20] + [0] * (len(rows[1]) - 20)])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 20:] = False
    name = "model.layers.1.mlp.down_proj"
    gradients = measure(folder_of("llama"), tmp_path, [Batch(ids, mask)])
    # The last block's down_proj has a gradient only where the model's output has one.
    (file,) = (tmp_path / WORK).glob("gradients-00001-*")
    g = output_gradients.read_header(file)[name].read()
    assert torch.equal(g, torch.cat(gradients.of_block(1)[name]))
    assert not bool(g[len(rows[0]) + 20 :].any())
    assert bool(g[: len(rows[0]) + 20].any())
    assert len(g) == ids.numel()


def test_runs_are_deterministic_and_remove_their_gradients(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    outs = [tmp_path / name for name in ("one", "other")]
    for out in outs:
        rw.quantize(folder_of("llama"), out, rw.QuantizeConfig(**QUICK), windows(), batch_size=2)
    assert contents(outs[0]) == contents(outs[1])
    assert not (outs[0] / WORK).exists()
    manifest = json.loads((outs[0] / "roundwise.json").read_text())
    assert all(layer["gradients"] == 64 for layer in manifest["layers"])


def test_gradients_of_a_stopped_run_are_reused_unless_they_changed(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = batches(windows())
    gradients = measure(folder_of("llama"), tmp_path, calibration)
    streamed = open_streamed_model(folder_of("llama"))
    streamed.load_outside_blocks()
    passes: list[int] = []
    plain = output_gradients._forward_backward
    monkeypatch.setattr(
        output_gradients, "_forward_backward", lambda *args: passes.append(1) or plain(*args)
    )

    def again(first: int) -> int:
        passes.clear()
        assert gradients.measure(streamed, calibration, tokens=1 << 20, first=first) is None
        return len(passes)

    assert again(first=0) == 0
    file = min(gradients.folder.glob("gradients-00000-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert again(first=1) == 0  # the damaged block is finished
    assert again(first=0) == len(calibration)
    gradients.index.write_text("[]")
    assert again(first=0) == len(calibration)


def test_a_model_that_cannot_be_differentiated(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = output_gradients._checkpointed_forward

    def broken(streamed: Any, block: Block, *args: Any) -> Any:
        forward = plain(streamed, block, *args)
        return lambda x, *a, **k: forward(x, *a, **k).detach()

    monkeypatch.setattr(output_gradients, "_checkpointed_forward", broken)
    config, folder = rw.QuantizeConfig(**QUICK), folder_of("llama")
    result = rw.quantize(folder, tmp_path / "out", config, windows(), batch_size=2)
    lines = [line for line in result.not_as_asked if "outputs" in line]
    assert len(lines) == 1
    assert lines[0].startswith("all outputs of a layer count alike: the model gives no gradients")
    assert not any(layer["gradients"] for layer in result.layers)
    without = rw.quantize(
        folder, tmp_path / "without", rw.QuantizeConfig(**{**QUICK, "output_tokens": 0}), windows(),
        batch_size=2,
    )  # fmt: skip
    assert [layer["relative_error"] for layer in result.layers] == [
        layer["relative_error"] for layer in without.layers
    ]
    with pytest.raises(FallbackError, match="--output-tokens 0 asks for it"):
        rw.quantize(
            folder, tmp_path / "strict", config, windows(), samples=4, seq_len=32, batch_size=2,
            strict=True,
        )  # fmt: skip
