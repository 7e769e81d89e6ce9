"""`roundwise compare`: figures, verdict and warnings, in Python and as a command."""

import json
from pathlib import Path

import pytest
import torch

import roundwise as rw
from roundwise.errors import CheckpointError
from roundwise.evaluation.compare import (
    PARTS,
    Comparison,
    Pair,
    Protocol,
    SpeedSummary,
    _advice,
    compare,
    means_by_part,
)
from roundwise.evaluation.perplexity import perplexity
from roundwise.evaluation.verdict import TaskChange, advice


@pytest.fixture(scope="module")
def quantized_text_model(text_model, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "q3"
    config = rw.QuantizeConfig(bits=3, group_size=32, recipe="textbook")
    rw.quantize(text_model, out, config, str(text), samples=64, seq_len=32)
    return out


@pytest.fixture(scope="module")
def other_text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("other") / "held-out.txt"
    path.write_text(Path(json.__file__).read_text() * 2)
    return path


def test_figures_are_those_of_a_direct_computation(text_model, quantized_text_model, other_text):
    base, tokenizer = rw.load(text_model, dtype=torch.float32)
    quantized, _ = rw.load(quantized_text_model, dtype=torch.float32)
    ids = tokenizer(other_text.read_text())["input_ids"][:256]
    protocol = Protocol(ids, window=64, stride=32, speed=False, dtype=torch.float32)
    [comparison] = compare(text_model, [quantized_text_model], protocol)
    kl, agreements = [], []
    with torch.no_grad():
        for start in range(0, 256, 64):
            window = torch.tensor([ids[start : start + 64]])
            p, q = (m(window).logits[0].double().log_softmax(-1) for m in (base, quantized))
            kl.append((p.exp() * (p - q)).sum(-1))
            agreements.append((p.argmax(-1) == q.argmax(-1)).double())
    assert comparison.kl_divergence == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert comparison.top1_agreement == pytest.approx(float(torch.cat(agreements).mean()))
    by_position = torch.stack(kl).mean(0).view(8, 8).mean(1)
    assert [start for start, _ in comparison.kl_by_position] == list(range(0, 64, 8))
    assert [v for _, v in comparison.kl_by_position] == pytest.approx(
        by_position.tolist(), rel=1e-3
    )
    expected = [
        perplexity(m, None, ids, window=64, stride=32).perplexity for m in (base, quantized)
    ]
    assert comparison.perplexity == pytest.approx(tuple(expected), rel=1e-6)
    assert comparison.bytes[1] < comparison.bytes[0]


def test_tasks_need_a_tokenizer(llama):
    with pytest.raises(CheckpointError, match="has no usable tokenizer"):
        compare(llama, [llama], Protocol([], tasks=["arc_easy"], speed=False))


def test_means_by_part():
    values = [float(i) for i in range(PARTS * 2)]
    assert means_by_part(values) == [(2 * i, 2 * i + 0.5) for i in range(PARTS)]
    assert means_by_part([1.0, 3.0]) == [(0, 1.0), (1, 3.0)]
    assert means_by_part([5.0] * 13) == [(13 * i // PARTS, 5.0) for i in range(PARTS)]


def test_the_json_of_a_comparison():
    speeds = SpeedSummary(100.0, 10.0, 2**20, 0.5), SpeedSummary(200.0, 30.0, 2**19, 0.25)
    comparison = Comparison(
        name="q4", perplexity=Pair(10.0, 10.1), kl_divergence=0.01, top1_agreement=0.9,
        kl_by_position=[(0, 0.02), (4, 0.01)], bytes=Pair(16, 4),
        tasks=[TaskChange("arc", "acc", 0.5, 0.4)], speed=Pair(*speeds), warnings=["w"],
        advice="try --bits 8",
    )  # fmt: skip
    result = json.loads(json.dumps(comparison.as_dict()))
    assert result["perplexity"] == {"base": 10.0, "quantized": 10.1}
    assert result["bytes"] == {"base": 16, "quantized": 4}
    assert result["kl_by_position"][1] == {"from": 4, "kl_divergence": 0.01}
    assert result["tasks"] == [
        {"task": "arc", "metric": "acc", "base": 0.5, "quantized": 0.4,
         "points": pytest.approx(-10), "flagged": True}
    ]  # fmt: skip
    assert result["speed"]["quantized"] == {
        "prompt_tokens_per_second": 200.0, "generation_tokens_per_second": 30.0,
        "peak_rss_bytes": 2**19, "load_seconds": 0.25,
    }  # fmt: skip
    assert result["degradation_percent"] == pytest.approx(20)
    assert result["verdict"] == "failed"
    assert result["reasons"] == ["tasks lost 10.0 points on average (limit 5)"]
    assert result["advice"] == "try --bits 8"
    without = Comparison("q4", None, None, None, [], Pair(16, 4), comparison.tasks, None, [], None)
    assert without.as_dict()["perplexity"] is None
    assert without.as_dict()["speed"] is None


@pytest.mark.parametrize("file_format", ["gptq", "compressed-tensors"])
def test_advice_follows_the_settings_of_most_layers_in_either_format(file_format, quantized, llama):
    options = {"method": "rtn", "bits": 4, "dynamic": {"up_proj": {"bits": 8}}}
    assert _advice(quantized("llama", format=file_format, **options)) == advice(4, 32)
    assert _advice(llama) is None
