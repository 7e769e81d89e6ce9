"""`roundwise plan`: sizes, peak memory and engines, compared with the run."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.model.streamed import open_streamed_model
from roundwise.plan.plan import plan
from tests.helpers import ARCHITECTURES, windows

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from sparse import write_headers

#: Runs in a process of its own, so that the peak memory is that of the run.
RUN = """
import json, sys, torch, roundwise as rw
torch.set_num_threads(1)
model, out, settings, mode, rows, length, budget = json.loads(sys.argv[1])
draw = torch.Generator().manual_seed(0)
windows = torch.randint(500, (rows, length), generator=draw).tolist()
result = rw.quantize(model, out, rw.QuantizeConfig(**settings), windows, samples=rows,
                     seq_len=length, mode=mode, max_memory=budget)
print(json.dumps(result.as_dict()))
"""
SHAPES = {
    "llama": transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=512, max_position_embeddings=256,
    ),
    "gpt2": transformers.GPT2Config(
        n_embd=1024, n_layer=2, n_head=8, vocab_size=512, n_positions=256
    ),
    "qwen3": transformers.Qwen3Config(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, vocab_size=4096, max_position_embeddings=256,
        tie_word_embeddings=True,
    ),
    "mixture": transformers.Qwen3MoeConfig(
        hidden_size=768, moe_intermediate_size=768, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, vocab_size=512, max_position_embeddings=256,
        num_experts=16, num_experts_per_tok=4,
    ),
}  # fmt: skip


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("name", "settings", "mode"),
    [
        ("llama", {"recipe": "textbook"}, "true_sequential"),
        ("gpt2", {"recipe": "textbook", "bits": 3}, "true_sequential"),
        ("qwen3", {"refine": 0}, "block"),
        ("mixture", {"refine": 0}, "true_sequential"),
        ("mixture", {"refine": 0}, "block"),
    ],
)
def test_peak_and_size_are_as_planned(name, settings, mode, tmp_path):
    config = SHAPES[name]
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    rows, length = 16, 128
    result = run(tmp_path / "model", tmp_path / "out", settings, mode, rows, length, None)
    assert result["planned_peak_bytes"] == pytest.approx(result["peak_rss_bytes"], rel=0.15)
    planned = plan(
        open_streamed_model(tmp_path / "model"), rw.QuantizeConfig(**settings),
        samples=rows, seq_len=length, mode=mode,
    )  # fmt: skip
    assert planned.bytes_after == pytest.approx(result["bytes_after"], rel=0.01)
    assert planned.bits_per_weight == pytest.approx(result["bits_per_weight"], rel=0.01)
    assert planned.memory.mode == result["mode"]
    assert planned.tied_embeddings == (name in ("gpt2", "qwen3"))


def run(model, out, settings, mode, rows, length, budget):
    """The result of a run in a process of its own, as JSON values."""
    arguments = [str(model), str(out), settings, mode, rows, length, budget]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_offloaded_batches_are_not_in_memory(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=512, max_position_embeddings=256,
    )  # fmt: skip
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    rows, length = 128, 256
    results = [
        run(tmp_path / "model", tmp_path / str(budget), {"refine": 0}, "true_sequential", rows,
            length, budget)
        for budget in (None, 1)
    ]  # fmt: skip
    for result in results:
        assert result["planned_peak_bytes"] == pytest.approx(result["peak_rss_bytes"], rel=0.15)
    # Residual streams and inputs of the widest layer, of two models, for 15 of 16 batches.
    saved = 2 * rows * length * (256 + 1024) * 2 * 15 / 16
    peaks = [result["peak_rss_bytes"] for result in results]
    assert peaks[0] - peaks[1] > 0.7 * saved


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sizes_and_shared_inputs_equal_those_of_the_run(name, folder_of, quantized):
    config = rw.QuantizeConfig(group_size=32, recipe="textbook")
    planned = plan(open_streamed_model(folder_of(name)), config, samples=4, seq_len=32)
    manifest = json.loads((quantized(name, recipe="textbook") / "roundwise.json").read_text())
    assert planned.bytes_after == manifest["bytes_after"]
    assert planned.bits_per_weight == pytest.approx(manifest["bits_per_weight"])
    assert {m.name for m in planned.modules} >= {layer["name"] for layer in manifest["layers"]}
    assert not planned.problems
    assert (
        "which layers share an input is found out when the run reaches them" not in planned.warnings
    )
    shared = {m.name: m.shares_input_with for m in planned.modules}
    assert all(leader is not None for leader in shared.values())
    if name == "llama":
        block = "model.layers.0"
        assert shared[f"{block}.self_attn.v_proj"] == f"{block}.self_attn.q_proj"
        assert shared[f"{block}.mlp.up_proj"] == f"{block}.mlp.gate_proj"
        assert shared[f"{block}.mlp.down_proj"] == f"{block}.mlp.down_proj"


def test_all_settings_that_do_not_fit_are_reported(llama):
    config = rw.QuantizeConfig(group_size=64)  # does not divide 96
    planned = plan(open_streamed_model(llama), config)
    downs = [m for m in planned.modules if m.name.endswith("down_proj")]
    (problem,) = planned.problems
    assert f"group_size=64 does not divide the input channels of {len(downs)} of 14 lay" in problem
    assert all(m.reason and "group_size=64 does not divide" in m.reason for m in downs)
    assert {*planned.served_by.values()} == {"the run would be refused"}


def huge(folder: Path) -> Path:
    """A checkpoint of a Llama with 405B parameters: sparse files with headers but no weights."""
    config = transformers.LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
        num_key_value_heads=8, vocab_size=128256, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    write_headers(folder, config)
    return folder


def test_a_model_of_405_billion_parameters_needs_seconds_and_no_memory(tmp_path):
    folder = huge(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.monotonic()
    planned = plan(open_streamed_model(folder), rw.QuantizeConfig())
    seconds = time.monotonic() - begun
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert planned.bytes_before > 800e9
    assert 200e9 < planned.bytes_after < 230e9
    assert len(planned.modules) == 126 * 7
    assert planned.tensor_parallel == [1, 2, 4, 8, 16, 32]
    assert seconds < 60
    assert grown < 500e6


def test_the_command(commands, text_model):
    ended = commands.run("plan", text_model, "--group-size", 32, "--samples", 8, "--json")
    assert ended.code == 0, ended.stderr
    assert ended.json["served_by"]["vLLM, CPU"] is None
    assert ended.json["seconds"] > 0
    shown = commands.run("plan", text_model, "--group-size", 32, "--samples", 8, "--asym")
    assert shown.code == 0
    assert "symmetric weights only" in shown.stdout
    refused = commands.run("plan", text_model, "--group-size", 1024)
    assert refused.code == 1
    assert "does not divide" in refused.stderr


@pytest.mark.parametrize(
    ("override", "split"),
    [
        ({r"q_proj": {"bits": 8}}, "model.layers.0.self_attn.qkv_proj"),
        ({r"layers\.1.*up_proj": None}, "model.layers.1.mlp.gate_up_proj"),
        ({r"gate_proj|up_proj": {"group_size": 64}, "o_proj": None}, None),
    ],
)
def test_layers_that_vllm_fuses_must_agree(override, split, text_model):
    config = rw.QuantizeConfig(group_size=32, dynamic=override)
    planned = plan(open_streamed_model(text_model), config, samples=4, seq_len=32)
    for engine in ("vLLM, CPU", "vLLM, GPU"):
        reason = planned.served_by[engine]
        if split is None or (engine == "vLLM, CPU" and "q_proj" in override):
            assert (reason is None) == (split is None)  # 8 bits are the first reason there
        else:
            assert reason == (
                f"it fuses layers into {split}, but these layers have different settings"
            )
    assert planned.served_by["GPTQModel"] is None


@pytest.mark.slow
def test_the_size_of_a_target_equals_that_of_the_run(tiny, tmp_path):
    config = rw.QuantizeConfig(target_bpw=3.5, target_widths=(2, 4))
    planned = plan(open_streamed_model(tiny), config, samples=4, seq_len=32)
    result = rw.quantize(tiny, tmp_path / "out", config, windows(4), samples=4, seq_len=32)
    # At most the target, and so near that no wider layer would fit.
    assert 0.97 * planned.bytes_after < result.bytes_after <= planned.bytes_after
    assert planned.bits_per_weight == pytest.approx(3.5)
    assert planned.phases["survey"] > 0
    assert "42 layers are chosen when the run begins" in " ".join(planned.warnings)
    reason = planned.served_by["vLLM, GPU"]
    assert reason is not None
    assert reason.startswith("its kernels take 4, 8 bits, not 2; it takes them with --quant")
    wide = plan(
        open_streamed_model(tiny), config.merged({"target_widths": (4, 8), "target_bpw": 5.0})
    )
    assert wide.served_by["vLLM, GPU"] is None


def test_json_values_of_a_layer(llama):
    config = rw.QuantizeConfig(group_size=32, dynamic={"o_proj": None})
    printed = plan(open_streamed_model(llama), config, samples=4, seq_len=32).as_dict()
    layers = {layer["name"]: layer for layer in printed["modules"]}
    attention = "model.layers.0.self_attn"
    assert layers[f"{attention}.k_proj"] == {
        "name": f"{attention}.k_proj", "shape": (32, 64), "bits": 4, "group_size": 32,
        "shares": f"{attention}.q_proj", "why_not": None,
    }  # fmt: skip
    assert layers[f"{attention}.o_proj"]["why_not"] == "skipped with --skip"
    assert printed["seconds"] == pytest.approx(sum(printed["phases"].values()))
    assert printed["memory"]["fits"] is True
    json.dumps(printed)
