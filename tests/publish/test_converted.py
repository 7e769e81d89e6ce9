"""The card of a converted checkpoint is the one that a run in that format would have written."""

import shutil

import pytest
import yaml

from roundwise.checkpoint.manifest import read_manifest
from roundwise.convert import convert
from roundwise.publish.card import END, rewrite_card
from roundwise.publish.converted import rewrite_converted_card
from roundwise.publish.measurement import Measurement
from tests.publish.test_card import THEIRS, front_matter

MEASURED = Measurement((20.5, 21.25), 0.0125, 0.975, (), "prose.txt")
CASES = [
    ("llama", {}, "gptq", "compressed-tensors"),
    ("llama", {}, "compressed-tensors", "gptq"),
    ("llama", {}, "gptq", "gptq_v2"),
    ("llama", {"bits": 3, "sym": False}, "gptq_v2", "compressed-tensors"),
    ("llama", {"dynamic": {"q_proj": {"bits": 8}}}, "gptq", "compressed-tensors"),
    ("llama", {"lm_head": True, "bits": 3}, "gptq", "compressed-tensors"),
    ("mixtral", {}, "gptq", "compressed-tensors"),
    ("gpt_oss", {}, "gptq", "compressed-tensors"),
]


def converted(source, out, to):
    convert(source, out, to)
    rewrite_converted_card(out, to, read_manifest(source))
    return out / "README.md"


@pytest.mark.parametrize(("name", "settings", "before", "after"), CASES)
def test_the_same_card_as_of_a_run_in_that_format(
    name, settings, before, after, quantized, tmp_path
):
    source, direct = (
        quantized(name, recipe="textbook", format=file_format, **settings)
        for file_format in (before, after)
    )
    card = converted(source, tmp_path / "out", after)
    expected = (direct / "README.md").read_text()
    assert card.read_text() == expected
    if after != "gptq_v2":
        assert (source / "README.md").read_text() != expected


@pytest.fixture
def measured(quantized, tmp_path):
    """A checkpoint whose card has words and metadata of others, and a measurement."""
    source = tmp_path / "source"
    shutil.copytree(quantized("llama", recipe="textbook"), source)
    (source / "README.md").write_text(THEIRS)
    rewrite_card(source, base_model="them/theirs", name="me/tiny", measurement=MEASURED)
    return source


def test_what_others_wrote_and_what_was_measured_stays(measured, tmp_path):
    card = converted(measured, tmp_path / "out", "compressed-tensors")
    data, text = front_matter(card), card.read_text()
    assert data["base_model"] == "them/theirs" and data["license"] == "other"
    assert data["tags"] == ["chat", "compressed-tensors", "4-bit", "roundwise"]
    assert "| perplexity | 20.5000 | 21.2500 |" in text and "model-index" in data
    assert "| GPTQModel 7.7.0 | no: " in text
    assert text.endswith(f"{END}\n# Their model\n\nTheir words.\n")
    assert "me/tiny" not in text  # that is the repository of the source


def test_of_a_dense_checkpoint(measured, tmp_path):
    out = tmp_path / "out"
    card = converted(measured, out, "dense")
    data, text = front_matter(card), card.read_text()
    assert data["tags"] == ["chat", "roundwise"]
    assert "quantized to 4 bits with roundwise, and dequantized." in text
    for words in ("bits per weight", "## Engines", "vllm serve", "import roundwise"):
        assert words not in text
    before, after = text.split("## Accuracy\n")
    assert after.startswith("\nThis was measured before the weights were dequantized")
    assert "| perplexity | 20.5000 | 21.2500 |" in after and "# Their model" not in before


@pytest.mark.parametrize(
    ("to", "tags"),
    [
        ("compressed-tensors", ["chat", "compressed-tensors", "8-bit"]),
        ("gptq_v2", ["chat", "gptq", "8-bit"]), ("dense", ["chat"]),
    ],
)  # fmt: skip
def test_of_a_checkpoint_by_others_only_tags_change(to, tags, quantized, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(quantized("llama", recipe="textbook"), source)
    (source / "roundwise.json").unlink()
    (source / "README.md").write_text(THEIRS)
    card = converted(source, tmp_path / "out", to)
    assert front_matter(card) == {**yaml.safe_load(THEIRS.split("---\n")[1]), "tags": tags}
    assert card.read_text().endswith("---\n# Their model\n\nTheir words.\n")
    if to == "gptq_v2":  # no tag is wrong
        assert card.read_text() == THEIRS


def test_without_a_card_none_is_written(quantized, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(quantized("llama", recipe="textbook"), source)
    (source / "README.md").unlink()
    assert not converted(source, tmp_path / "out", "dense").exists()
