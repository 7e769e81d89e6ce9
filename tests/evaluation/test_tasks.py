"""Tasks through lm-eval: a task file of one's own, offline, against sums by hand."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.cli.commands import evaluate
from roundwise.errors import ConfigError, RunError
from roundwise.evaluation.tasks import TaskScores, evaluate_tasks, scores_of
from tests.helpers import Commands

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'roundwise[eval]'")
pytestmark = [
    # lm-eval and what it brings along are not warning-free.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

QUESTIONS = [
    {"question": "import os\nos.path.", "choices": ["join", "zebra"], "answer": 0},
    {"question": "def f(self", "choices": ["?!", "):"], "answer": 1},
    {"question": "for i in", "choices": [" while", " range"], "answer": 1},
]
TEXTS = ["def read_file(path):\n    return open(path).read()\n", "import os\nimport sys\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of our own, with their data beside them."""
    folder = tmp_path_factory.mktemp("tasks")
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
    return folder


@pytest.fixture(autouse=True)
def _offline_and_clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Any]:
    return rw.load(tiny, dtype=torch.float32)


def log_likelihood(loaded: tuple[Any, Any], context: list[int], target: list[int]) -> float:
    model, _ = loaded
    ids = torch.tensor([context + target])
    with torch.no_grad():
        logs = torch.log_softmax(model(ids).logits.double(), dim=-1)[0, len(context) - 1 : -1]
    return float(logs.gather(1, torch.tensor(target)[:, None]).sum())


def test_both_kinds_are_what_sums_by_hand_say(loaded: tuple[Any, Any], folder: Path) -> None:
    result = evaluate_tasks(*loaded, ["own_choice", "own_rolling"], include_path=folder)
    tokenizer = loaded[1]
    right = 0
    for question in QUESTIONS:
        likelihoods = []
        for choice in question["choices"]:
            context = tokenizer(question["question"])["input_ids"]
            whole = tokenizer(question["question"] + choice)["input_ids"]
            likelihoods.append(log_likelihood(loaded, context, whole[len(context) :]))
        right += likelihoods.index(max(likelihoods)) == question["answer"]
    assert result.scores["own_choice"]["acc"] == pytest.approx(right / len(QUESTIONS))
    begin = [tokenizer.bos_token_id]
    total = sum(log_likelihood(loaded, begin, tokenizer(text)["input_ids"]) for text in TEXTS)
    count = sum(len(text.encode()) for text in TEXTS)
    assert result.scores["own_rolling"]["byte_perplexity"] == pytest.approx(
        math.exp(-total / count), rel=1e-4
    )
    assert result.samples == {"own_choice": 3, "own_rolling": 2}
    assert result.shots["own_choice"] == 0


def test_the_command(commands: Commands, tiny: Path, folder: Path, text: Path) -> None:
    ended = commands.run(
        "eval", tiny, "--tasks", "own_choice", "--include-path", folder, "--limit", 2,
        "--text", text, "--max-tokens", 100, "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.stderr
    found = ended.json
    assert found.keys() == {"perplexity", "tokens", "window", "stride", "tasks"}
    assert found["tasks"]["samples"] == {"own_choice": 2}
    assert 0 <= found["tasks"]["scores"]["own_choice"]["acc"] <= 1


def test_the_commands_table(capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"own": {"acc": 0.5, "acc_stderr": 0.25}}
    evaluate.print_scores(TaskScores(scores, samples={"own": 4}, shots={"own": 2}))
    row = next(line for line in capsys.readouterr().out.splitlines() if "own" in line)
    assert row.replace("│", " ").split() == ["own", "4", "2", "acc", "0.5000", "±", "0.2500"]


def test_lm_eval_knows_us_by_name(tiny: Path, folder: Path) -> None:
    """As its command line does it; tests/clients runs that."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import roundwise.evaluation.lm_eval_model  # noqa: F401  # registers

    found = lm_eval.simple_evaluate(
        model="roundwise", model_args=f"pretrained={tiny},dtype=float32", tasks=["own_choice"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False), limit=1,
    )  # fmt: skip
    assert scores_of(found).samples == {"own_choice": 1}


def test_a_task_that_is_not_there(
    loaded: tuple[Any, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import tasks

    def few(include_path: str, include_defaults: bool) -> Any:
        seen.append(include_defaults)
        return manager(include_path=include_path, include_defaults=False)  # thousands: 10 s

    seen: list[bool] = []
    manager = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", few)
    with pytest.raises(ConfigError, match="lm-eval has no task own_chioce: `lm_eval ls tasks`"):
        evaluate_tasks(*loaded, ["own_choice", "own_chioce"], include_path=folder)
    assert seen == [False, True]


def test_a_folder_that_is_not_there(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        evaluate_tasks(*loaded, ["own_choice"], include_path=tmp_path / "nowhere")


def test_data_that_are_not_there(loaded: tuple[Any, Any], folder: Path, tmp_path: Path) -> None:
    broken = (folder / "choice.yaml").read_text().replace("choice.jsonl", "nowhere.jsonl")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "choice.yaml").write_text(broken)
    with pytest.raises(RunError, match="the data of own_choice cannot be had"):
        evaluate_tasks(*loaded, ["own_choice"], include_path=tmp_path / "own")


def test_figures_of_a_group() -> None:
    result = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A", "em,strict": 1, "name": "a"}
        },
        "groups": {"g": {"acc,none": 0.25}},
        "n-samples": {"a": {"original": 9, "effective": 4}},
        "n-shot": {"a": 5},
    }  # fmt: skip
    found = scores_of(result)
    assert found.scores == {"a": {"acc": 0.5, "em,strict": 1.0}, "g": {"acc": 0.25}}
    assert (found.samples, found.shots) == ({"a": 4}, {"a": 5})


def test_nothing_to_do(commands: Commands, tiny: Path) -> None:
    ended = commands.run("eval", tiny)
    assert ended.code == 2
    assert "nothing to evaluate: give --text FILE" in ended.sentence


def test_without_lm_eval(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundwise.evaluation.tasks.find_spec", lambda _: None)
    with warnings.catch_warnings(), pytest.raises(ConfigError, match=r"pip install 'roundwise\[ev"):
        evaluate_tasks(*loaded, ["own_choice"])


def test_compare_tells_what_each_task_has_lost(
    text_model: Path, folder: Path, tmp_path: Path, commands: Commands
) -> None:
    rw.quantize(text_model, tmp_path / "q", rw.QuantizeConfig(method="rtn", bits=2, group_size=32))
    ended = commands.run(
        "compare", text_model, tmp_path / "q", "--tasks", "own_choice", "--include-path", folder,
        "--no-speed", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.stderr
    [change] = ended.json["tasks"]
    scores = []
    for model in (text_model, tmp_path / "q"):
        loaded, tokenizer = rw.load(model)
        found = evaluate_tasks(loaded, tokenizer, ["own_choice"], include_path=folder)
        scores.append(found.scores["own_choice"]["acc"])
    assert [change["base"], change["quantized"]] == scores
    assert change["points"] == pytest.approx(100 * (scores[1] - scores[0]))
    assert ended.json["perplexity"] is None
