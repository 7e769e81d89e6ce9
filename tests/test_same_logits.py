"""A model computes the same logits from every format that it is written in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import roundwise as rw
from roundwise.checkpoint.quantized_layers import quantized_layers
from roundwise.checkpoint.reader import Checkpoint
from roundwise.convert import convert
from roundwise.gguf.convert import convert_to_gguf
from roundwise.model.gguf_source import open_source
from tests.gguf.templates import write_template
from tests.helpers import tensors_of, windows

#: The CPU kernel rounds activations to 16-bit integers; weights are exactly those of the dense model.
ACTIVATIONS = 5e-4
#: Q4_1 and Q5_1 hold the minimum of a block, -scale · zero, in float16; the other types are exact.
MINIMUM = 1e-2
#: Bits, symmetry -> the type of GGUF that holds the same codes; None: none does.
CASES = {
    (2, True): "Q4_0", (3, True): "Q4_0", (4, True): "Q4_0", (5, True): "Q5_0", (6, True): "Q8_0",
    (7, True): "Q8_0", (8, True): "Q8_0",
    (2, False): "Q4_0", (3, False): "Q4_0", (4, False): "Q4_1", (5, False): "Q5_1",
    (6, False): "Q8_0", (7, False): "Q8_0", (8, False): None,
}  # fmt: skip
QUICK = [(4, True), (4, False), (8, True)]


def logits(folder: Path) -> torch.Tensor:
    """Logits of a checkpoint, computed by our loader in float32."""
    model, _ = rw.load(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(windows(2, seed=1))).logits


def with_tensors(like: Path, tensors: dict[str, torch.Tensor], out: Path) -> Path:
    """Writes a dense checkpoint with the config of another one."""
    out.mkdir()
    shutil.copy(like / "config.json", out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def read_back(file: Path, original: Path, tokenizer: Path, out: Path) -> Path:
    """Writes a GGUF file as transformers and the `gguf` package decode it, for our loader."""
    shutil.copy(original / "config.json", file.parent)
    shutil.copy(tokenizer, file.parent)
    opened = open_source(file)
    tensors = {name: info.read() for name, info in opened.tensors.items()}
    return with_tensors(opened.folder, tensors, out)


def with_rounded_minimums(quantized: Path, dense: Path, out: Path) -> Path:
    """Writes the dense checkpoint in which -scale · zero of each group is rounded to float16."""
    tensors = tensors_of(dense)
    for layer in quantized_layers(Checkpoint(quantized)):
        q = layer.read()
        scales, groups = q.scales.float(), q.g_idx.long()
        minimums = -scales * q.zeros
        rounded = minimums.to(torch.float16).float()
        tensors[f"{layer.name}.weight"] = scales[:, groups] * q.codes + rounded[:, groups]
    return with_tensors(dense, tensors, out)


@pytest.mark.parametrize(
    ("bits", "sym", "kind"),
    [
        pytest.param(*case, kind, marks=[] if case in QUICK else [pytest.mark.slow])
        for case, kind in CASES.items()
    ],
)
def test_gptq_compressed_tensors_and_gguf(
    bits: int, sym: bool, kind: str | None,
    quantized: Callable[..., Path], llama: Path, tiny: Path, tmp_path: Path,
) -> None:  # fmt: skip
    settings = {"bits": bits, "sym": sym, "recipe": "textbook"}
    gptq = quantized("llama", format="gptq", **settings)
    packed = quantized("llama", format="compressed-tensors", **settings)
    dense = convert(gptq, tmp_path / "dense", "dense", dtype=torch.float32)
    expected, computed = logits(dense), logits(gptq)
    torch.testing.assert_close(computed, expected, rtol=0, atol=ACTIVATIONS)
    assert torch.equal(logits(packed), computed)
    # It is not the original that is computed: that one is far away.
    distance = (expected - logits(llama)).abs().max()
    assert distance > 10 * ACTIVATIONS
    if kind is None:
        return
    file = tmp_path / "gguf" / "model.gguf"
    file.parent.mkdir()
    template = write_template(llama, tmp_path / "f32.gguf", "F32")
    result = convert_to_gguf(gptq, file, template=template)
    assert result.types[kind] == 14 and not result.issues
    decoded = logits(read_back(file, llama, tiny / "tokenizer.json", tmp_path / "read"))
    if kind in ("Q4_1", "Q5_1"):
        torch.testing.assert_close(decoded, expected, rtol=0, atol=MINIMUM)
        assert distance > 10 * MINIMUM
        expected = logits(with_rounded_minimums(gptq, dense, tmp_path / "rounded"))
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)
