"""Gradients of a few tokens, block by block: those of plain autograd on the whole model."""

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
from roundwise.checkpoint.manifest import WORK
from roundwise.errors import FallbackError
from roundwise.forward import output_gradients
from roundwise.forward.output_gradients import OutputGradients
from roundwise.model.blocks import Block
from roundwise.model.streamed import open_streamed_model
from tests.helpers import ARCHITECTURES, batches, contents, windows

QUICK: dict[str, Any] = {"group_size": 32, "recipe": "textbook", "output_tokens": 64}


def measured(
    folder: Path, out: Path, played: list[Batch], tokens: int = 1 << 20
) -> OutputGradients:
    """What is measured of a model's blocks."""
    (out / WORK).mkdir(parents=True)
    streamed = open_streamed_model(folder)
    streamed.load_outside_blocks()
    found = OutputGradients(out)
    assert found.measure(streamed, played, tokens=tokens, first=0) is None
    assert all(p.is_meta for block in streamed.blocks for p in block.module.parameters())
    return found


def plainly(folder: Path, names: list[str], played: list[Batch]) -> dict[str, torch.Tensor]:
    """gᵀg / n of plain autograd; the same tokens are drawn as `OutputGradients` draws them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    generator = torch.Generator().manual_seed(0)
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, y, name=name: kept[name].append(y) or y.retain_grad()
        )
    total: dict[str, torch.Tensor] = {}
    count = 0
    for batch in played:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        rows = logits.detach().reshape(-1, logits.shape[-1])
        drawn = [
            output_gradients.draw(part.softmax(-1), generator)
            for part in rows.split(output_gradients.FEWEST)
        ]
        loss = -logits.log_softmax(-1).reshape(rows.shape).gather(1, torch.cat(drawn)).sum()
        loss.backward()
        for name in names:
            g = kept[name].pop().grad.reshape(batch.input_ids.numel(), -1)
            total[name] = total.get(name, 0) + g.T @ g
        count += batch.input_ids.numel()
    return {name: value / count for name, value in total.items()}


def test_tokens_are_drawn_as_often_as_is_likely():
    p = torch.tensor([[0.0, 0.5, 0.125, 0.375, 0.0]])
    drawn = output_gradients.draw(p.expand(40_000, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (40_000, 1)
    found = torch.bincount(drawn[:, 0], minlength=5) / len(drawn)
    assert found.tolist() == pytest.approx(p[0].tolist(), abs=0.01)  # four standard deviations
    assert found[0] == 0 and found[4] == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_they_are_those_of_the_whole_model(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    played = batches(windows())
    found = measured(folder_of(name), tmp_path, played)
    blocks = open_streamed_model(folder_of(name)).blocks
    expected = plainly(folder_of(name), [n for block in blocks for n in block.linears], played)
    for index, block in enumerate(blocks):
        outputs = found.weights_of_block(index)
        for linear in block.linears:
            B, tokens = outputs(linear)
            assert tokens == sum(batch.input_ids.numel() for batch in played)
            scale = float(expected[linear].diagonal().mean())
            assert torch.allclose(B, expected[linear], rtol=1e-3, atol=1e-4 * scale), linear


def test_as_many_tokens_as_asked_for_in_parts_that_fit(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played, folder = batches(windows(8), size=4), folder_of("llama")
    length = played[0].input_ids.shape[1]
    found = measured(folder, tmp_path / "few", played, tokens=3 * length)
    name = "model.layers.0.mlp.down_proj"
    assert found.weights_of_block(0)(name)[1] == 3 * length
    whole = measured(folder, tmp_path / "whole", played).weights_of_block(0)(name)
    monkeypatch.setattr(output_gradients, "LOGITS", 128 * length)  # a window at a time
    monkeypatch.setattr(output_gradients, "FEWEST", 1)
    monkeypatch.setattr(output_gradients, "CONTEXT", 1)
    parted = measured(folder, tmp_path / "parted", played)
    assert len([*(tmp_path / "parted" / WORK).glob("gradients-00000-*")]) == 8
    assert parted.weights_of_block(0)(name)[1] == whole[1]


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


def test_padding_counts_for_nothing(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    rows = windows(2)
    ids = torch.tensor([rows[0], rows[1][:20] + [0] * (len(rows[1]) - 20)])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 20:] = False
    name = "model.layers.1.mlp.down_proj"
    B, tokens = measured(folder_of("llama"), tmp_path, [Batch(ids, mask)]).weights_of_block(1)(name)
    # The last block's down_proj has no gradient where there is none at the output.
    (file,) = (tmp_path / WORK).glob("gradients-00001-*")
    g = output_gradients.read_header(file)[name].read()
    assert not bool(g[len(rows[0]) + 20 :].any())
    assert bool(g[: len(rows[0]) + 20].any())
    assert B is not None and tokens == ids.numel()


def test_the_run_is_repeated_to_the_byte_and_leaves_nothing_behind(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    outs = [tmp_path / name for name in ("one", "other")]
    for out in outs:
        rw.quantize(folder_of("llama"), out, rw.QuantizeConfig(**QUICK), windows(), batch_size=2)
    assert contents(outs[0]) == contents(outs[1])
    assert not (outs[0] / WORK).exists()
    manifest = json.loads((outs[0] / "roundwise.json").read_text())
    assert all(layer["gradients"] == 64 for layer in manifest["layers"])


def test_what_was_written_by_a_stopped_run_is_read_unless_it_changed(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = batches(windows())
    found = measured(folder_of("llama"), tmp_path, played)
    streamed = open_streamed_model(folder_of("llama"))
    streamed.load_outside_blocks()
    passes: list[int] = []
    plain = output_gradients._forth_and_back
    monkeypatch.setattr(
        output_gradients, "_forth_and_back", lambda *args: passes.append(1) or plain(*args)
    )

    def again(first: int) -> int:
        passes.clear()
        assert found.measure(streamed, played, tokens=1 << 20, first=first) is None
        return len(passes)

    assert again(first=0) == 0
    file = min(found.folder.glob("gradients-00000-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert again(first=1) == 0  # the damaged block is finished
    assert again(first=0) == len(played)
    found.index.write_text("[]")
    assert again(first=0) == len(played)


def test_a_model_that_cannot_be_differentiated(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = output_gradients._checkpointed

    def broken(streamed: Any, block: Block, *args: Any) -> Any:
        forward = plain(streamed, block, *args)
        return lambda x, *a, **k: forward(x, *a, **k).detach()

    monkeypatch.setattr(output_gradients, "_checkpointed", broken)
    config, folder = rw.QuantizeConfig(**QUICK), folder_of("llama")
    result = rw.quantize(folder, tmp_path / "out", config, windows(), batch_size=2)
    lines = [line for line in result.not_as_asked if "outputs" in line]
    assert len(lines) == 1
    assert lines[0].startswith("all outputs of a layer count alike: the model gives no gradients")
    assert not any(layer["gradients"] for layer in result.layers)
    alike = rw.quantize(
        folder, tmp_path / "alike", rw.QuantizeConfig(**{**QUICK, "output_tokens": 0}), windows(),
        batch_size=2,
    )  # fmt: skip
    assert [layer["relative_error"] for layer in result.layers] == [
        layer["relative_error"] for layer in alike.layers
    ]
    with pytest.raises(FallbackError, match="--output-tokens 0 asks for it"):
        rw.quantize(
            folder, tmp_path / "strict", config, windows(), samples=4, seq_len=32, batch_size=2,
            strict=True,
        )  # fmt: skip
