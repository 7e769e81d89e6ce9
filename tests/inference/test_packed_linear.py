"""PackedLinear computes from the tensors of compressed-tensors, and gives them back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import roundwise as rw
from roundwise.checkpoint.compressed_tensors import encode
from roundwise.core.quantized_weight import WIDTHS, QuantizedWeight
from roundwise.inference.packed_linear import PackedLinear
from tests.helpers import raw, tensors_of, windows


def some_weight(
    rows: int, columns: int, groups: int, bits: int, *, sym: bool, act_order: bool
) -> QuantizedWeight:
    g_idx = torch.arange(columns, dtype=torch.int32) // (columns // groups)
    middle = torch.full((rows, groups), 2 ** (bits - 1), dtype=torch.int32)
    return QuantizedWeight(
        codes=torch.randint(2**bits, (rows, columns), dtype=torch.uint8),
        scales=(torch.rand(rows, groups) + 0.1).to(torch.float16),
        zeros=middle if sym else torch.randint(2**bits, (rows, groups), dtype=torch.int32),
        g_idx=g_idx[torch.randperm(columns)] if act_order else g_idx,
        bits=bits,
    )


def layer_of(q: QuantizedWeight, *, sym: bool, act_order: bool) -> PackedLinear:
    (rows, columns), groups = q.codes.shape, q.scales.shape[1]
    layer = PackedLinear(
        columns, rows, bits=q.bits, groups=groups, bias=False, stored_g_idx=act_order,
        stored_zeros=not sym,
    )  # fmt: skip
    tensors = encode(q, sym=sym) | ({"weight_g_idx": q.g_idx} if act_order else {})
    layer.load_state_dict(tensors)
    return layer


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS), rows=st.integers(1, 70), width=st.integers(1, 40),
    groups=st.integers(1, 3), sym=st.booleans(), act_order=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_products_and_state_of_any_shape(
    bits: int, rows: int, width: int, groups: int, sym: bool, act_order: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    q = some_weight(rows, width * groups, groups, bits, sym=sym, act_order=act_order)
    layer = layer_of(q, sym=sym, act_order=act_order)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x, W = torch.randn(3, width * groups), q.dequantize()
    for dtype in (torch.float32, torch.float64):
        y = layer(x.to(dtype))
        expected = x.double() @ W.double().T
        assert y.shape == (3, rows) and y.dtype == dtype
        bound = 1e-4 + 0.02 * float((x.abs() @ W.abs().T).max())
        assert float((y.double() - expected).abs().max()) <= bound
    assert torch.equal(layer.dequantize(), W.T)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("sym", [True, False])
def test_from_pretrained_and_back(sym: bool, quantized: Any, tmp_path: Path) -> None:
    options = {"bits": 3, "sym": sym, "recipe": "textbook"}
    folder = quantized("llama", **options, format="compressed-tensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    ids = torch.tensor(windows(seed=5))
    gptq, _ = rw.load(quantized("llama", **options, format="gptq_v2"))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, gptq(input_ids=ids).logits)
    model.save_pretrained(tmp_path / "saved")
    before, after = tensors_of(folder), tensors_of(tmp_path / "saved")
    packed = [name for name in before if "weight_" in name]
    assert packed and all(raw(before[name]) == raw(after[name]) for name in packed)
    again, _ = rw.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
