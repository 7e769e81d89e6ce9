"""Tasks of lm-eval: own task files, offline, against log-likelihoods computed here."""

from __future__ import annotations

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
from tests.evaluation.own_tasks import QUESTIONS, TEXTS, WARNINGS, write_tasks
from tests.helpers import Commands

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")
pytestmark = WARNINGS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
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


def test_scores_equal_a_direct_computation(loaded: tuple[Any, Any], folder: Path) -> None:
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
    result = ended.json
    assert result.keys() == {"perplexity", "tokens", "window", "stride", "tasks"}
    assert result["tasks"]["samples"] == {"own_choice": 2}
    assert 0 <= result["tasks"]["scores"]["own_choice"]["acc"] <= 1


def test_the_commands_table(capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"own": {"acc": 0.5, "acc_stderr": 0.25}}
    evaluate.print_scores(TaskScores(scores, samples={"own": 4}, shots={"own": 2}))
    row = next(line for line in capsys.readouterr().out.splitlines() if "own" in line)
    assert row.replace("│", " ").split() == ["own", "4", "2", "acc", "0.5000", "±", "0.2500"]


def test_an_unknown_task(
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


def test_a_missing_folder(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this folder does not exist"):
        evaluate_tasks(*loaded, ["own_choice"], include_path=tmp_path / "nowhere")


def test_missing_data(loaded: tuple[Any, Any], folder: Path, tmp_path: Path) -> None:
    broken = (folder / "choice.yaml").read_text().replace("choice.jsonl", "nowhere.jsonl")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "choice.yaml").write_text(broken)
    with pytest.raises(RunError, match="the data of own_choice is unavailable"):
        evaluate_tasks(*loaded, ["own_choice"], include_path=tmp_path / "own")


def test_scores_of_tasks_and_groups() -> None:
    result = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A", "em,strict": 1, "name": "a"}
        },
        "groups": {"g": {"acc,none": 0.25}},
        "n-samples": {"a": {"original": 9, "effective": 4}},
        "n-shot": {"a": 5},
    }  # fmt: skip
    scores = scores_of(result)
    assert scores.scores == {"a": {"acc": 0.5, "em,strict": 1.0}, "g": {"acc": 0.25}}
    assert (scores.samples, scores.shots) == ({"a": 4}, {"a": 5})


def test_nothing_to_do(commands: Commands, tiny: Path) -> None:
    ended = commands.run("eval", tiny)
    assert ended.code == 2
    assert "nothing to evaluate: give --text FILE" in ended.sentence


def test_without_lm_eval(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundwise.evaluation.tasks.find_spec", lambda _: None)
    with warnings.catch_warnings(), pytest.raises(ConfigError, match=r"pip install '\.\[ev"):
        evaluate_tasks(*loaded, ["own_choice"])


def test_compare_reports_the_change_of_each_task(
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
        result = evaluate_tasks(loaded, tokenizer, ["own_choice"], include_path=folder)
        scores.append(result.scores["own_choice"]["acc"])
    assert [change["base"], change["quantized"]] == scores
    assert change["points"] == pytest.approx(100 * (scores[1] - scores[0]))
    assert ended.json["perplexity"] is None
