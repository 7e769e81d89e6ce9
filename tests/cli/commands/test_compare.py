"""`roundwise compare`: figures, table, limits and bad usage."""

import json
from pathlib import Path

import pytest

import roundwise as rw


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


@pytest.mark.slow
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
