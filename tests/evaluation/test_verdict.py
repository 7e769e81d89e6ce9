"""The verdict: rules on perplexity and task scores."""

import pytest

from roundwise.evaluation.verdict import TaskChange, degradation, task_changes, verdict


@pytest.mark.parametrize(
    ("perplexity", "expected"),
    [
        ((10.0, 9.9), "safe"),
        ((10.0, 10.09), "safe"),
        ((10.0, 10.15), "acceptable"),
        ((10.0, 10.3), "investigate"),
        ((100.0, 101.6), "failed"),
    ],
)
def test_without_tasks_the_relative_rise_of_perplexity_decides(perplexity, expected):
    assert verdict(perplexity, []) == expected


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([0.5, 0.5], "safe"), ([0.49, 0.495], "acceptable"), ([0.45, 0.5], "investigate")],
)
def test_with_tasks_their_mean_decides(scores, expected):
    tasks = [TaskChange(str(i), "acc", 0.5, score) for i, score in enumerate(scores)]
    assert verdict((10.0, 10.5), tasks) == expected
    assert verdict(None, tasks) == expected
    assert degradation(None, tasks) == pytest.approx(100 * (1 - sum(scores)))


def test_a_large_rise_of_perplexity_fails_whatever_the_tasks_say():
    assert verdict((10.0, 11.6), [TaskChange("a", "acc", 0.5, 0.6)]) == "failed"


def test_a_task_is_flagged_beyond_two_points():
    assert not TaskChange("a", "acc", 0.50, 0.481).flagged
    assert TaskChange("a", "acc", 0.50, 0.479).flagged


def test_the_normalized_score_comes_first_and_perplexities_have_none():
    base = {"a": {"acc": 0.5, "acc_norm": 0.6, "acc_stderr": 0.1}, "b": {"word_perplexity": 9.0}}
    after = {"a": {"acc": 0.4, "acc_norm": 0.55, "acc_stderr": 0.1}, "b": {"word_perplexity": 9.5}}
    assert task_changes(base, after) == [TaskChange("a", "acc_norm", 0.6, 0.55)]
