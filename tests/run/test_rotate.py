"""`rotate` in a run: a plain checkpoint of the rotated model, resumable, and verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.checkpoint.quantized_layers import quantized_layers
from roundwise.checkpoint.reader import Checkpoint
from roundwise.errors import ConfigError, OutputError
from roundwise.model.rotate import rotated_checkpoint
from roundwise.verify import audit
from tests.conftest import BEST, QUICK
from tests.helpers import (
    LLAMA,
    Commands,
    Stop,
    contents,
    edited_json,
    random_model,
    raw,
    stop_after,
    tensors_of,
    windows,
)

ROTATED = QUICK.merged({"rotate": True})


def quantize(model: Path, out: Path, **changes: Any) -> rw.QuantizeResult:
    settings = {"config": ROTATED, "calibration": windows(), "samples": 4, "seq_len": 32}
    return rw.quantize(model, out, **{**settings, **changes})


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bfloat16 whose head is its embedding, as published small models have it."""
    folder = tmp_path_factory.mktemp("tied")
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    random_model(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "tied"])
def test_the_result_is_a_plain_checkpoint_of_the_rotated_model(
    name: str, method: str, tied: Path, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tied if name == "tied" else folder_of(name)
    config = rw.QuantizeConfig(bits=8, group_size=32, rotate=True, method=method)
    result = quantize(source, tmp_path / "out", config=config)
    view = rotated_checkpoint(Checkpoint(source), 0)
    after = tensors_of(tmp_path / "out")
    replaced = {f"{layer.name}.weight" for layer in quantized_layers(Checkpoint(result.output))}
    for tensor, info in view.tensors.items():
        if tensor not in replaced:
            assert raw(after[tensor]) == raw(info.read())
    assert result.bytes_before == sum(
        t.numel() * t.element_size() for t in tensors_of(source).values()
    )
    original, _ = rw.load(source, dtype=torch.float32)
    model, _ = rw.load(result.output, dtype=torch.float32)
    ids = torch.tensor(windows(seed=5))
    with torch.no_grad():
        before, now = (m(input_ids=ids).logits for m in (original, model))
    # With 8 bits only rounding errors remain; a wrong rotation would change everything.
    assert float((now - before).norm()) < 0.05 * float(before.norm())


def test_verify_against_the_original(tied: Path, tmp_path: Path) -> None:
    quantize(tied, tmp_path / "out")
    report = audit(tmp_path / "out", against=Checkpoint(tied))
    assert not report.failures
    assert report.checked["weight errors"] == 14
    assert (
        report.checked["tensors carried over"] == 7
    )  # 2 norms per block, the last one, embedding, head
    # With another rotation the tensors differ.
    with edited_json(tmp_path / "out" / "config.json") as config:
        assert config["tie_word_embeddings"] is False
        assert config["quantization_config"]["meta"]["rotate"] == {"seed": 0}
        config["quantization_config"]["meta"]["rotate"]["seed"] = 1
    (tmp_path / "out" / "roundwise.json").unlink()
    failures = audit(tmp_path / "out", against=Checkpoint(tied)).failures
    assert any("lm_head.weight differs from the original" in failure for failure in failures)


@pytest.mark.parametrize("count", [3, 8, 11])
def test_a_stopped_run_gives_the_same_bytes(count: int, tied: Path, tmp_path: Path) -> None:
    config = BEST.merged({"rotate": True})
    with pytest.raises(Stop):
        quantize(tied, tmp_path / "out", config=config, progress=stop_after(count))
    quantize(tied, tmp_path / "out", config=config)
    quantize(tied, tmp_path / "fresh", config=config)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("changes", [{"rotate": False}, {"rotation_seed": 1}])
def test_a_run_does_not_resume_with_another_rotation(
    changes: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        quantize(llama, tmp_path / "out", progress=stop_after(8))
    (name,) = changes
    with pytest.raises(OutputError, match=rf"differs in config\.{name}"):
        quantize(llama, tmp_path / "out", config=ROTATED.merged(changes))


def test_outlier_channels_are_spread_over_all_channels(tmp_path: Path) -> None:
    # Columns that are far larger than all others, with gains of the norm that are as much smaller:
    # rounding to nearest wastes its range on them, unless gains are folded and channels are mixed.
    model = random_model(transformers.LlamaConfig(**LLAMA))
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, linears in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[[5, 40]] /= 30
                for linear in linears:
                    linear.weight[:, [5, 40]] *= 30
    model.save_pretrained(tmp_path / "model")
    ids = torch.tensor(windows(seed=5))
    losses = []
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for rotate in (False, True):
            out = tmp_path / f"out-{rotate}"
            config = rw.QuantizeConfig(group_size=32, method="rtn", rotate=rotate)
            quantize(tmp_path / "model", out, config=config)
            quantized, _ = rw.load(out)
            losses.append(float((quantized(input_ids=ids).logits - before).norm()))
    assert losses[1] < 0.5 * losses[0]


def test_refused_runs_leave_no_folder(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be rotated"):
        quantize(folder_of("gemma3"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(
    commands: Commands, text_model: Path, text: Path, tmp_path: Path
) -> None:
    command = (
        "quantize", text_model, tmp_path / "out", "--calibration", text, "--group-size", 32,
        "--samples", 2, "--seq-len", 32, "--recipe", "textbook", "--rotate", "--rotation-seed", 3,
    )  # fmt: skip
    assert commands.run(*command).code == 0
    settings = Checkpoint(tmp_path / "out").config["quantization_config"]
    assert settings["meta"]["rotate"] == {"seed": 3}
    ended = commands.run("verify", tmp_path / "out", "--against", text_model, "--json")
    assert ended.code == 0, ended.stderr
    assert ended.json["ok"]
