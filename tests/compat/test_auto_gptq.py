"""Scripts for AutoGPTQ, as in tutorials, run after changing one import."""

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import roundwise as rw
from roundwise.compat.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from roundwise.errors import ConfigError, OutputError
from roundwise.evaluation.perplexity import perplexity


@pytest.fixture(scope="module")
def saved(text_model, text, tmp_path_factory) -> Path:
    """The first half of a tutorial: calibrate, quantize, save."""
    quantized_model_dir = str(tmp_path_factory.mktemp("compat") / "opt-4bit")
    tokenizer = AutoTokenizer.from_pretrained(text_model, use_fast=True)
    lines = [line for line in text.read_text().splitlines() if len(line) > 40]
    examples = [tokenizer(line, return_tensors="pt") for line in lines[:16]]
    quantize_config = BaseQuantizeConfig(
        bits=4, group_size=32, desc_act=False, damp_percent=0.01, sym=True, model_seqlen=64
    )
    with pytest.warns(UserWarning, match="low_cpu_mem_usage: not needed here"):
        model = AutoGPTQForCausalLM.from_pretrained(
            str(text_model), quantize_config, low_cpu_mem_usage=True, torch_dtype=torch.float32
        )
    assert model.config.vocab_size == 4096  # an attribute of the transformers model
    model.quantize(examples, batch_size=4, cache_examples_on_gpu=False)
    ids = tokenizer("import os", return_tensors="pt")
    assert (
        model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1]
        > ids["input_ids"].shape[1]
    )
    model.save_quantized(quantized_model_dir, use_safetensors=True)
    tokenizer.save_pretrained(quantized_model_dir)
    with pytest.raises(OutputError, match="already has a model"):
        model.save_quantized(quantized_model_dir)
    return Path(quantized_model_dir)


def test_the_second_half_loads_measures_and_generates(saved, text):
    with pytest.warns(UserWarning, match="use_triton: not needed here"):
        model = AutoGPTQForCausalLM.from_quantized(
            str(saved), device="cpu", use_triton=True, inject_fused_attention=False,
            use_safetensors=True, trust_remote_code=False, torch_dtype=torch.float32,
        )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(saved)
    encodings = tokenizer(text.read_text()[:4000], return_tensors="pt")
    max_length, stride, nlls, previous, count = 64, 32, [], 0, 0
    sequence = encodings.input_ids.size(1)
    for begin in range(0, sequence, stride):
        end = min(begin + max_length, sequence)
        targets = encodings.input_ids[:, begin:end].to(model.device)
        labels = targets.clone()
        labels[:, : -(end - previous)] = -100
        with torch.no_grad():
            logits = model(input_ids=targets, use_cache=False).logits[:, :-1]
        nlls.append(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            )
        )
        count += int((labels[:, 1:] != -100).sum())
        previous = end
        if end == sequence:
            break
    ours = perplexity(model.model, tokenizer, text.read_text()[:4000], window=64, stride=32)
    assert count == ours.tokens
    assert float((torch.stack(nlls).sum() / count).exp()) == pytest.approx(
        ours.perplexity, rel=1e-4
    )
    begun = time.time()
    out = model.generate(**tokenizer("def", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert out.shape[1] / (time.time() - begun) > 0
    settings = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["group_size"], settings["desc_act"]) == (4, 32, False)


def test_defaults_are_those_of_auto_gptq():
    config = BaseQuantizeConfig().config()
    assert (config.bits, config.group_size, config.desc_act, config.sym) == (4, -1, True, True)
    static = BaseQuantizeConfig(static_groups=True).config()
    assert (static.order, static.desc_act) == ("static", False)


def test_refused(text_model, saved, tmp_path):
    config = BaseQuantizeConfig()
    with pytest.raises(ConfigError, match="never run here"):
        AutoGPTQForCausalLM.from_pretrained(str(text_model), config, trust_remote_code=True)
    with pytest.raises(ConfigError, match="there is no argument spline"):
        AutoGPTQForCausalLM.from_pretrained(str(text_model), config, spline=1)
    model = AutoGPTQForCausalLM.from_pretrained(str(text_model), config)
    with pytest.raises(ConfigError, match="nothing is quantized yet"):
        model.save_quantized(str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="not read"):
        AutoGPTQForCausalLM.from_quantized(str(saved), use_safetensors=False)
    with pytest.raises(ConfigError, match="already quantized"):
        AutoGPTQForCausalLM.from_quantized(str(saved), device="cpu").quantize(["x"])


def test_a_path_is_a_calibration_source(text_model, text, tmp_path):
    config = rw.QuantizeConfig(group_size=32, recipe="textbook")
    for name, source in (("path", text), ("string", str(text))):
        rw.quantize(text_model, tmp_path / name, config, source, samples=4, seq_len=32)
    left, right = ((tmp_path / name / "roundwise.json").read_bytes() for name in ("path", "string"))
    assert left == right
