"""The model card says what a checkpoint is; what others wrote, and their licence, is kept."""

import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import roundwise as rw
from roundwise.checkpoint.manifest import read_manifest
from roundwise.checkpoint.reader import Checkpoint
from roundwise.errors import CheckpointError
from roundwise.publish.card import (
    BEGIN,
    END,
    rewrite_card,
    write_card,
)
from roundwise.publish.measurement import Measurement
from roundwise.verify import audit
from tests.helpers import windows

THEIRS = """---
license: other
license_name: their-licence
license_link: https://example.org/licence
language: [en, de]
tags: [chat, gptq, 8-bit]
model-index:
- name: theirs
  results:
  - task: {type: text-generation}
    dataset: {type: x, name: x}
    metrics: [{type: accuracy, value: 0.9}]
---
# Their model

Their words.
"""

MEASURED = Measurement((20.5, 21.25), 0.0125, 0.975, (("arc", "acc", 0.5, 0.49),), "prose.txt")


@pytest.fixture
def folder(quantized, tmp_path):
    """A copy of a checkpoint that is to be changed."""
    return Path(shutil.copytree(quantized("llama", recipe="textbook"), tmp_path / "tiny-4bit"))


def front_matter(card: Path) -> dict:
    return yaml.safe_load(card.read_text().split("---\n")[1])


def test_every_run_writes_one(quantized, llama):
    out = quantized("llama", recipe="textbook")
    card = out / "README.md"
    data = front_matter(card)
    assert data == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["gptq", "4-bit", "roundwise"],
    }  # fmt: skip
    text = card.read_text()
    for words in (
        "14 are quantized", "symmetric, groups of 32", "GPTQ, recipe textbook",
        "| vLLM, GPU 0.33 | yes |", f"vllm serve {llama.name}-gptq-4bit",
        "AutoModelForCausalLM.from_pretrained",
    ):  # fmt: skip
        assert words in text
    assert str(llama) not in text and "Accuracy" not in text
    assert "README.md" not in read_manifest(out).files
    assert not audit(out, against=Checkpoint(llama)).failures


def test_the_card_of_the_original_is_kept_below(copy_of, tmp_path):
    source, out = copy_of("llama"), tmp_path / "out"
    (source / "README.md").write_text(THEIRS)
    settings = rw.QuantizeConfig(method="rtn", group_size=32, format="compressed-tensors")
    rw.quantize(source, out, settings, windows())
    data, text = front_matter(out / "README.md"), (out / "README.md").read_text()
    assert data["license"] == "other" and data["license_name"] == "their-licence"
    assert data["license_link"] == "https://example.org/licence"
    assert data["language"] == ["en", "de"]
    assert data["tags"] == ["chat", "compressed-tensors", "4-bit", "roundwise"]
    assert "model-index" not in data  # those are results of the original
    assert text.endswith(f"{END}\n# Their model\n\nTheir words.\n")
    assert text.index("rounded to nearest") < text.index("# Their model")
    assert not audit(out, against=Checkpoint(source)).failures


def test_only_our_part_is_replaced(folder):
    card = folder / "README.md"
    write_card(folder, read_manifest(folder), Checkpoint(folder).config, base_model="them/theirs")
    before, ours, after = card.read_text().partition(END)
    card.write_text(f"{before}{ours}\n\nAn own word.\n{after}")
    rewrite_card(folder, name="me/tiny-4bit", measurement=MEASURED)
    data, text = front_matter(card), card.read_text()
    assert data["base_model"] == "them/theirs" and data["base_model_relation"] == "quantized"
    assert text.count(BEGIN) == text.count(END) == 1 and text.count("An own word.") == 1
    assert "vllm serve me/tiny-4bit" in text
    once = text
    rewrite_card(folder, name="me/tiny-4bit", measurement=MEASURED)
    assert card.read_text() == once


def test_results_have_the_form_of_the_hub(folder):
    rewrite_card(folder, name="me/tiny-4bit", measurement=MEASURED)
    card = ModelCard.load(folder / "README.md")
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results == {
        ("prose.txt", "perplexity"): 21.25, ("prose.txt", "kl_divergence"): 0.0125,
        ("prose.txt", "top1_agreement"): 0.975, ("arc", "acc"): 0.49,
    }  # fmt: skip
    assert card.data.model_name == "me/tiny-4bit"
    assert "| perplexity | 20.5000 | 21.2500 |" in card.text
    assert "| arc, acc | 0.5000 | 0.4900 |" in card.text


def test_what_was_measured_stays_when_the_card_is_written_again(folder):
    rewrite_card(folder, name="me/tiny-4bit", measurement=MEASURED)
    once = (folder / "README.md").read_text()
    rewrite_card(folder, name="you/tiny-4bit")
    again = (folder / "README.md").read_text()
    assert again == once.replace("me/tiny-4bit", "you/tiny-4bit")


def test_results_of_others_are_not_kept(folder):
    card = folder / "README.md"
    card.write_text(THEIRS + "## Accuracy\n\n| theirs | 1 |\n")
    rewrite_card(folder)
    assert "model-index" not in front_matter(card)
    assert card.read_text().split(END)[0].count("Accuracy") == 0
    card.write_text(card.read_text().replace("tags:", "model-index: 5\ntags:"))
    rewrite_card(folder)  # a damaged one neither
    assert "model-index" not in front_matter(card)


@pytest.mark.parametrize(
    "theirs", ["no metadata", "---\n- a list\n---\nword", "---\na: [\n---\nword"]
)
def test_a_card_without_readable_metadata_is_text(theirs, copy_of, tmp_path):
    source, out = copy_of("llama"), tmp_path / "out"
    (source / "README.md").write_text(theirs)
    rw.quantize(source, out, rw.QuantizeConfig(method="rtn", group_size=32), windows())
    assert (out / "README.md").read_text().endswith(f"{END}\n{theirs}")
    assert front_matter(out / "README.md")["tags"] == ["gptq", "4-bit", "roundwise"]


def test_cards_are_for_our_checkpoints(folder):
    (folder / "roundwise.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no roundwise\.json"):
        rewrite_card(folder)
