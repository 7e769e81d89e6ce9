"""lm-eval's own command line with our model: slow, because it reads all the tasks it comes with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.conftest import Quantize

pytestmark = pytest.mark.clients

TASK = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
"""


def test_its_command_line(ours: Quantize, tmp_path: Path) -> None:
    data = tmp_path / "choice.jsonl"
    question = {"question": "import os\nos.path.", "choices": ["join", "zebra"], "answer": 0}
    data.write_text(json.dumps(question) + "\n")
    (tmp_path / "choice.yaml").write_text(TASK.format(data=data))
    ended = subprocess.run(
        [sys.executable, "-m", "roundwise.evaluation.lm_eval_model", "--model", "roundwise",
         "--model_args", f"pretrained={ours(bits=4, group_size=128)},dtype=float32",
         "--tasks", "own_choice", "--include_path", tmp_path, "--device", "cpu",
         "--output_path", tmp_path / "out"],
        capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "|own_choice|" in ended.stdout
    assert list((tmp_path / "out").rglob("results_*.json"))
