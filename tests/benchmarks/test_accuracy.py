"""Tests of `benchmarks/accuracy.py`: its reader, its split of texts, its tables."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import roundwise as rw
from roundwise import QuantizeConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from peers.methods import ABLATION, MAIN, jobs
from peers.reader import read_dense, unpack
from peers.table import ingredients, report
from peers.texts import split


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 2},
        {"bits": 3, "sym": False},
        {"bits": 4, "desc_act": True},
        {"bits": 4, "sym": False, "format": "gptq"},
        {"bits": 8},
    ],
)
def test_gptq_files_are_read_as_our_own_loader_reads_them(quantized, settings):
    folder = quantized("llama", recipe="textbook", **settings)
    dense = read_dense(folder)
    assert dense.trivial is not settings.get("desc_act", False)
    model, _ = rw.load(folder, dtype=torch.float32)
    for layer in dense.layers:
        linear = model.get_submodule(layer)
        inputs = torch.eye(linear.in_features)
        with torch.no_grad():
            bias = linear.bias if linear.bias is not None else 0
            weight = (linear(inputs) - bias).T
        assert torch.allclose(weight, torch.tensor(dense.state[f"{layer}.weight"]), atol=1e-6)


def packed(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Rows of codes as rows of 32-bit words, by arithmetic on one big number per row."""
    words = codes.shape[1] * bits // 32
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * place) for place, code in enumerate(row))
        rows.append([(number >> (32 * word)) & 0xFFFFFFFF for word in range(words)])
    return torch.from_numpy(np.array(rows, np.uint32).view(np.int32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpack_is_the_inverse_of_arithmetic(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (5, 64))
    assert (unpack(packed(codes, bits).numpy(), bits, 64) == codes).all()


@pytest.mark.parametrize("sym", [True, False])
def test_compressed_tensors_are_read(tmp_path, sym):
    draw = np.random.default_rng(0)
    codes, zeros = draw.integers(0, 8, (32, 64)), draw.integers(0, 8, (32, 2))
    scale = torch.rand(32, 2, dtype=torch.bfloat16)
    tensors = {
        "fc.weight_packed": packed(codes, 3),
        "fc.weight_scale": scale,
        "fc.weight_shape": torch.tensor([32, 64]),
        "fc.bias": torch.ones(32),
    }
    if not sym:
        tensors["fc.weight_zero_point"] = packed(zeros.T, 3).T.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 3}}},
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    dense = read_dense(tmp_path)
    middle = np.full((32, 2), 4) if sym else zeros
    expected = (codes - middle.repeat(32, axis=1)) * scale.float().numpy().repeat(32, axis=1)
    assert np.allclose(dense.state["fc.weight"], expected)
    assert dense.layers == ["fc"]
    assert set(dense.state) == {"fc.weight", "fc.bias"}


def test_a_zero_point_that_readers_disagree_about_is_refused(quantized, tmp_path):
    folder = quantized("llama", recipe="textbook", bits=4)
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    name = next(name for name in tensors if name.endswith(".qzeros"))
    tensors[name][0, 0] = -1
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="zero point of 0"):
        read_dense(tmp_path)


def test_held_out_text_is_the_last_tenth():
    text = "".join(f"line {number}\n" for number in range(1000))
    training, held_out = split(text)
    assert training + held_out == text
    assert training.endswith("\n")
    assert 0.09 < len(held_out) / len(text) < 0.1


def record(tool, method, seed, kl, **more):
    key = {
        "tool": tool, "method": method, "bits": 3, "group_size": 128, "sym": True, "seed": seed,
        "settings": {}, "model": "m", "text": "t", "tokens": 512, "windows": [128, 512],
    }  # fmt: skip
    found = {
        "perplexity": 30.0 + kl, "base_perplexity": 30.0, "kl": kl, "top1": 0.9, "cpu_seconds": 1.0,
        "trivial_g_idx": True, "peak_bytes": 10**9, "version": "1", "machine": "x",
    }  # fmt: skip
    return {"key": key, **found, **more}


def test_tables_hold_means_spreads_ratios_and_refusals():
    failed = record("gptqmodel", "mse 2.4", 0, 0)
    del failed["kl"]
    failed["error"] = "ValueError: a | b"
    text = report(
        [
            record("roundwise", "rtn", 0, 0.02),
            record("roundwise", "textbook", 0, 0.008),
            record("roundwise", "best", 0, 0.001),
            record("roundwise", "best", 1, 0.003),
            record("gptqmodel", "default", 0, 0.005),
            failed,
        ]
    )
    assert (
        "| 0.002000 | 0.100 (≤ 0.125) | 0.250 (≤ 0.36) | gptqmodel default | 0.005000 | 0.40 |"
        in text
    )
    assert "| roundwise best | 2 | 30.002 ± 0.001 | 0.002000 ± 0.001000 | 90.00% |" in text
    assert "ValueError: a \\| b" in text


def test_ingredients_have_a_table_of_their_own():
    records = [
        record("roundwise", "rtn", 0, 0.02),
        record("roundwise", "best", 0, 0.001),
        record("roundwise", "best", 1, 0.5),
        record("roundwise", "best, alpha 0", 0, 0.004),
    ]
    assert "alpha 0" not in report(records)
    text = ingredients(records)
    assert text.splitlines()[2:] == [
        "| rtn | 0.020000 | 90.00% | 1.000 | 1 | 1000 |",
        "| best | 0.001000 | 90.00% | 0.050 | 1 | 1000 |",
        "| best, alpha 0 | 0.004000 | 90.00% | 0.200 | 1 | 1000 |",
    ]
    assert ingredients(records[:3]) == ""


def test_secondary_methods_run_with_one_seed():
    selected = list(jobs(["roundwise", "autoround"], [(3, 128, True)], [0, 1, 2], ABLATION, ""))
    seeds = {}
    for job in selected:
        seeds.setdefault(job.row, []).append(job.seed)
    assert seeds["roundwise rtn"] == [0]
    assert seeds["roundwise best"] == [0, 1, 2]
    assert seeds["roundwise best, beta 0"] == [0]
    assert seeds["autoround default (200 iterations)"] == [0, 1, 2]


def test_every_ablation_changes_the_recipe_it_is_named_after():
    settled = {name: QuantizeConfig(**settings) for name, settings in (MAIN | ABLATION).items()}
    for name in ABLATION:
        base = settled[name.split(",")[0]]
        assert settled[name] != base, name
        assert settled[name].recipe == base.recipe, name
