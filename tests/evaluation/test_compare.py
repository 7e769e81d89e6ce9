"""`roundwise compare`, in Python and as a command."""

import json
from pathlib import Path

import pytest
import torch

import roundwise as rw
from roundwise.checkpoint.gptq_format import parse_dynamic_rules, quantization_config
from roundwise.evaluation.compare import Protocol, compare
from roundwise.evaluation.perplexity import perplexity


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
    [found] = compare(text_model, [quantized_text_model], protocol)
    kl, broadcast_object = [], []
    with torch.no_grad():
        for start in range(0, 256, 64):
            window = torch.tensor([ids[start : start + 64]])
            p, q = (m(window).logits[0].double().log_softmax(-1) for m in (base, quantized))
            kl.append((p.exp() * (p - q)).sum(-1))
            broadcast_object.append((p.argmax(-1) == q.argmax(-1)).double())
    assert found.kl_divergence == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert found.top1_agreement == pytest.approx(float(torch.cat(broadcast_object).mean()))
    by_position = torch.stack(kl).mean(0).view(8, 8).mean(1)
    assert [at for at, _ in found.kl_by_position] == list(range(0, 64, 8))
    assert [v for _, v in found.kl_by_position] == pytest.approx(by_position.tolist(), rel=1e-3)
    expected = [
        perplexity(m, None, ids, window=64, stride=32).perplexity for m in (base, quantized)
    ]
    assert found.perplexity == pytest.approx(tuple(expected), rel=1e-6)
    assert found.bytes[1] < found.bytes[0]


def test_one_table_for_several_with_a_baseline(
    commands, text_model, quantized_text_model, other_text
):
    ended = commands.run(
        "compare", text_model, quantized_text_model, "--text", other_text, "--window", 64,
        "--stride", 64, "--max-tokens", 256, "--baseline", "rtn", "--json", "--dtype", "float32",
        "--max-kl", 100,
    )  # fmt: skip
    assert ended.code == 0, ended.stderr
    found = ended.json
    ours, rtn = found["models"]
    assert (ours["name"], rtn["name"]) == ("q3", "rtn")
    assert found["perplexity"] == ours["perplexity"]
    assert set(found["bytes"]) == {"base", "quantized"}
    assert found["verdict"] in ("safe", "acceptable", "investigate", "failed")
    assert 0 < ours["kl_divergence"] < rtn["kl_divergence"]
    assert ours["bytes"]["quantized"] == rtn["bytes"]["quantized"]
    for side in ("base", "quantized"):
        assert all(value > 0 for value in ours["speed"][side].values())


@pytest.mark.parametrize("limit", [["--max-kl", "1e-9"], ["--max-perplexity-increase", "0"]])
def test_the_exit_code_says_whether_limits_hold(
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
    """The quantized model; random weights make perplexity rise or fall by luck, so make it rise."""
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


def test_text_that_was_calibrated_with_is_pointed_out(
    commands, text_model, quantized_text_model, text, other_text
):
    def warnings(source: Path) -> list[str]:
        ended = commands.run(
            "compare", text_model, quantized_text_model, "--text", source, "--window", 64,
            "--max-tokens", 6000, "--no-speed", "--json",
        )  # fmt: skip
        return ended.json["warnings"]

    assert "was calibrated with" in warnings(text)[0]
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
