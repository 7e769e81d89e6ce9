"""What `compare` measured is read, and has the form of the hub."""

import json

import pytest

from roundwise.errors import CheckpointError
from roundwise.publish.measurement import Measurement, read_measurement

ARC = ("arc", "acc", 0.5, 0.49)


def test_what_compare_measured_is_read(tmp_path):
    model = {
        "name": "tiny-4bit", "perplexity": {"base": 20.5, "quantized": 21.25},
        "kl_divergence": 0.0125, "top1_agreement": 0.975,
        "tasks": [{"task": "arc", "metric": "acc", "base": 0.5, "quantized": 0.49}],
    }  # fmt: skip
    file = tmp_path / "compare.json"
    both = [model, {**model, "name": "other"}]
    file.write_text(json.dumps({"text": "prose.txt", "models": both}))
    measured = read_measurement(file, "tiny-4bit")
    assert measured.text == "prose.txt"
    assert (measured.perplexity, measured.tasks) == ((20.5, 21.25), (ARC,))
    with pytest.raises(CheckpointError, match="has no model mine: it is of tiny-4bit, other"):
        read_measurement(file, "mine")
    del model["kl_divergence"]
    file.write_text(json.dumps({"text": None, "models": [model]}))
    with pytest.raises(CheckpointError, match="not what `roundwise compare --json` prints"):
        read_measurement(file, "tiny-4bit")


def test_what_was_not_measured_is_left_out():
    only_tasks = Measurement(None, None, None, (ARC,))
    assert [*only_tasks.rows()] == [("arc, acc", "0.5000", "0.4900")]
    assert [(r.dataset_name, r.metric_value) for r in only_tasks.results()] == [("arc", 0.49)]
