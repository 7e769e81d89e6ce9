"""Every class: planned, quantized, verified, loaded, and as the table in the docs says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.matrix.check import run
from tests.matrix.table import BEGIN, END, line
from tests.matrix.tiny import class_names

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
#: One class of each kind: plain, experts (one by one, joined by rows, all at once), fused files,
#: two lists of blocks, computed positions, and one that cannot be calibrated with text.
SAMPLE = (
    "LlamaForCausalLM", "Qwen3MoeForCausalLM", "Step3p7ForConditionalGeneration",
    "Llama4ForCausalLM", "NomicBertModel", "HrmTextForCausalLM", "MarianMTModel",
    "WhisperForConditionalGeneration",
)  # fmt: skip


def listed() -> dict[str, str]:
    """Lines of the table, by class."""
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [row for row in text.splitlines() if row.startswith("| ")][1:]
    return {row.split("|")[1].strip(): row for row in rows}


def check(name: str, folder: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    row = run(name, folder)
    torch.set_num_threads(threads)
    assert line(row) == listed().get(name, line(row))


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.matrix
@pytest.mark.filterwarnings("default")  # of transformers' own classes
@pytest.mark.parametrize("name", [name for name in listed() if name not in SAMPLE])
def test_a_class(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.matrix
@pytest.mark.filterwarnings("default")
def test_the_table_has_every_class() -> None:
    assert {*class_names()} == {*listed()}
