"""Two tasks of our own for lm-eval, with their data, that need no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

#: lm-eval and its dependencies are not free of warnings.
WARNINGS = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "FutureWarning", "UserWarning", "ResourceWarning")
]

QUESTIONS = [
    {"question": "import os\nos.path.", "choices": ["join", "zebra"], "answer": 0},
    {"question": "def f(self", "choices": ["?!", "):"], "answer": 1},
    {"question": "for i in", "choices": [" while", " range"], "answer": 1},
]
TEXTS = ["def read_file(path):\n    return open(path).read()\n", "import os\nimport sys\n"]


def write_tasks(folder: Path) -> None:
    """Writes the tasks own_choice and own_rolling."""
    (folder / "choice.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (folder / "rolling.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    (folder / "choice.yaml").write_text(
        f"""
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "choice.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    (folder / "rolling.yaml").write_text(
        f"""
task: own_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "rolling.jsonl"}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
    )
