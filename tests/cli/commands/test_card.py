"""`roundwise card` as a command."""

import json
import shutil


def test_a_card_with_what_compare_measured(text_model, text, tmp_path, commands):
    out = tmp_path / "out"
    line = ["quantize", text_model, out, "--method", "rtn", "--group-size", "32", "--json"]
    assert commands.run(*line).code == 0
    measured = commands.run(
        "compare", text_model, out, "--text", text, "--max-tokens", "256", "--window", "64",
        "--no-speed", "--json",
    )  # fmt: skip
    (tmp_path / "compare.json").write_text(measured.stdout)
    ended = commands.run(
        "card", out, "--evaluation", tmp_path / "compare.json", "--base-model", "me/base", "--json"
    )
    assert ended.code == 0, ended.stderr
    assert ended.json == {"card": str(out / "README.md")}
    card = (out / "README.md").read_text()
    assert "base_model: me/base" in card and "model-index:" in card
    assert f"| {json.loads(measured.stdout)['perplexity']['quantized']:.4f} |" in card
    assert f"on {text.name}" in card
    assert commands.run("verify", out, "--against", text_model).code == 0
    shutil.copy(out / "config.json", tmp_path / "other.json")
    ended = commands.run("card", out, "--evaluation", tmp_path / "other.json")
    assert ended.code == 2 and "not what `roundwise compare --json` prints" in ended.sentence
    ended = commands.run("card", out, "--push", "nobody")
    assert ended.code == 2 and "write owner/name" in ended.sentence
