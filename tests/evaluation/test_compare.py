"""`roundwise compare`: figures, verdict and warnings, in Python and as a command."""

import json
from pathlib import Path

import pytest
import torch

import roundwise as rw
from roundwise.checkpoint.gptq_format import parse_dynamic_rules, quantization_config
from roundwise.errors import CheckpointError
from roundwise.evaluation.compare import (
    PARTS,
    Comparison,
    Pair,
    Protocol,
    SpeedSummary,
    compare,
    means_by_part,
)
from roundwise.evaluation.perplexity import perplexity
from roundwise.evaluation.verdict import TaskChange, degradation, task_changes, verdict


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


def test_one_table_for_several_with_a_baseline(
    commands, text_model, quantized_text_model, other_text
):
    ended = commands.run(
        "compare", text_model, quantized_text_model, "--text", other_text, "--window", 64,
        "--stride", 64, "--max-tokens", 256, "--baseline", "rtn", "--json", "--dtype", "float32",
        "--max-kl", 100,
    )  # fmt: skip
    assert ended.code == 0, ended.stderr
    result = ended.json
    ours, rtn = result["models"]
    assert (ours["name"], rtn["name"]) == ("q3", "rtn")
    assert result["perplexity"] == ours["perplexity"]
    assert set(result["bytes"]) == {"base", "quantized"}
    assert result["verdict"] in ("safe", "acceptable", "investigate", "failed")
    assert 0 < ours["kl_divergence"] < rtn["kl_divergence"]
    assert ours["bytes"]["quantized"] == rtn["bytes"]["quantized"]
    for side in ("base", "quantized"):
        assert all(value > 0 for value in ours["speed"][side].values())


@pytest.mark.parametrize("limit", [["--max-kl", "1e-9"], ["--max-perplexity-increase", "0"]])
def test_the_exit_code_tells_if_limits_hold(
    commands, text_model, quantized_text_model, text, limit
):
    arguments = ["--text", text, "--window", 64, "--max-tokens", 256, "--no-speed"]
    worst = ["--max-perplexity-increase", "1e9", "--max-kl", "1e9"]
    assert commands.run("compare", text_model, quantized_text_model, *arguments, *worst).code == 0
    model = quantized_text_model if limit[0] == "--max-kl" else _worse(quantized_text_model)
    ended = commands.run("compare", text_model, model, *arguments, *limit)
    assert ended.code == 1
    assert "failed: q3" in ended.stderr


def _worse(folder: Path) -> Path:
    """The quantized model with a larger perplexity: with random weights, it rises or falls by chance."""
    from safetensors.torch import load_file, save_file

    other = folder.parent / "worse" / "q3"
    if not other.exists():
        other.mkdir(parents=True)
        for file in folder.iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        (other / "roundwise.json").unlink()
        for shard in other.glob("*.safetensors"):
            tensors = load_file(shard)
            if "lm_head.weight" in tensors:
                tensors["lm_head.weight"] *= 50
            save_file(tensors, shard, metadata={"format": "pt"})
    return other


def test_text_that_was_used_for_calibration_is_reported(
    commands, text_model, quantized_text_model, text, other_text
):
    def warnings(source: Path) -> list[str]:
        ended = commands.run(
            "compare", text_model, quantized_text_model, "--text", source, "--window", 64,
            "--max-tokens", 6000, "--no-speed", "--json",
        )  # fmt: skip
        return ended.json["warnings"]

    assert "was also used for calibration" in warnings(text)[0]
    assert warnings(other_text) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to compare on"),
        (["--max-kl", "1"], "need a text"),
        (["--baseline", "awq", "--text", "x"], "use rtn"),
    ],
)
def test_bad_usage(commands, text_model, quantized_text_model, arguments, said):
    ended = commands.run("compare", text_model, quantized_text_model, *arguments)
    assert ended.code == 2
    assert said in ended.sentence


def test_another_vocabulary_is_refused(commands, llama, quantized_text_model, text_model, text):
    ended = commands.run(
        "compare",
        text_model,
        llama,
        "--text",
        text,
        "--max-tokens",
        256,
        "--window",
        64,
        "--no-speed",
    )
    assert ended.code == 2
    assert "another vocabulary" in ended.sentence


def test_overrides_come_back_from_a_checkpoint():
    config = rw.QuantizeConfig(dynamic={"mlp": {"bits": 8}, "o_proj": None})
    settings = quantization_config(config, true_sequential=True)
    assert parse_dynamic_rules(settings) == config.dynamic
    foreign = {"dynamic": {"+:model\\.layers\\.0": {"bits": 8}, "-:lm": {}}}
    assert parse_dynamic_rules(foreign) == {"^(?:model\\.layers\\.0)": {"bits": 8}, "^(?:lm)": None}


@pytest.mark.parametrize(
    ("perplexity", "expected"),
    [
        ((10.0, 9.9), "safe"),
        ((10.0, 10.09), "safe"),
        ((10.0, 10.15), "acceptable"),
        ((10.0, 10.3), "investigate"),
        ((100.0, 101.6), "failed"),
    ],
)
def test_without_tasks_the_relative_rise_of_perplexity_decides(perplexity, expected):
    assert verdict(perplexity, []) == expected


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([0.5, 0.5], "safe"), ([0.49, 0.495], "acceptable"), ([0.45, 0.5], "investigate")],
)
def test_with_tasks_their_mean_decides(scores, expected):
    tasks = [TaskChange(str(i), "acc", 0.5, score) for i, score in enumerate(scores)]
    assert verdict((10.0, 10.5), tasks) == expected
    assert verdict(None, tasks) == expected
    assert degradation(None, tasks) == pytest.approx(100 * (1 - sum(scores)))


def test_a_large_rise_of_perplexity_fails_whatever_the_tasks_say():
    assert verdict((10.0, 11.6), [TaskChange("a", "acc", 0.5, 0.6)]) == "failed"


def test_a_task_is_flagged_beyond_two_points():
    assert not TaskChange("a", "acc", 0.50, 0.481).flagged
    assert TaskChange("a", "acc", 0.50, 0.479).flagged


def test_the_normalized_score_comes_first_and_perplexities_have_none():
    base = {"a": {"acc": 0.5, "acc_norm": 0.6, "acc_stderr": 0.1}, "b": {"word_perplexity": 9.0}}
    after = {"a": {"acc": 0.4, "acc_norm": 0.55, "acc_stderr": 0.1}, "b": {"word_perplexity": 9.5}}
    assert task_changes(base, after) == [TaskChange("a", "acc_norm", 0.6, 0.55)]


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
    assert result["verdict"] == "investigate"
    without = Comparison("q4", None, None, None, [], Pair(16, 4), comparison.tasks, None, [])
    assert without.as_dict()["perplexity"] is None
    assert without.as_dict()["speed"] is None
