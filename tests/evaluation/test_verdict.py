"""The verdict: rules on perplexity, KL and task scores, and the reasons that it gives."""

import pytest

from roundwise.evaluation.verdict import TaskChange, advice, degradation, task_changes, verdict


@pytest.mark.parametrize(
    ("perplexity", "expected"),
    [
        ((10.0, 9.9), "safe"),
        ((10.0, 10.09), "safe"),
        ((10.0, 10.15), "acceptable: perplexity rose by 1.5% (limit 1%)"),
        ((10.0, 10.3), "investigate: perplexity rose by 3.0% (limit 2%)"),
        ((5.0, 5.6), "failed: perplexity rose by 12.0% (limit 10%)"),
        ((25.0, 26.8), "failed: perplexity rose by 1.80 (limit 1.5)"),
        # 1.6 more is little for a model that had 100.
        ((100.0, 101.6), "acceptable: perplexity rose by 1.6% (limit 1%)"),
    ],
)
def test_of_perplexity(perplexity, expected):
    assert str(verdict(perplexity, None, [])) == expected


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.02, "safe"),
        (0.03, "acceptable: KL per token is 0.03 (limit 0.02)"),
        (0.1234, "investigate: KL per token is 0.123 (limit 0.05)"),
        (0.5, "failed: KL per token is 0.5 (limit 0.2)"),
    ],
)
def test_of_kl(kl, expected):
    assert str(verdict((10.0, 10.0), kl, [])) == expected


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.5, 0.5], "safe"),
        ([0.49, 0.482], "acceptable: tasks lost 1.4 points on average (limit 1)"),
        ([0.475, 0.505], "investigate: 0 lost 2.5 points (limit 2)"),
        ([0.45, 0.482], "investigate: tasks lost 3.4 points on average (limit 2); 0 lost 5.0 points "
         "(limit 2)"),
        ([0.4, 0.48], "failed: tasks lost 6.0 points on average (limit 5)"),
    ],
)  # fmt: skip
def test_of_tasks(scores, expected):
    tasks = [TaskChange(str(i), "acc", 0.5, score) for i, score in enumerate(scores)]
    assert str(verdict(None, None, tasks)) == expected
    assert degradation(None, tasks) == pytest.approx(100 * (1 - sum(scores)))


def test_the_worst_rule_decides_and_only_its_reasons_are_given():
    tasks = [TaskChange("a", "acc", 0.5, 0.6)]
    found = verdict((10.0, 11.6), 0.03, tasks)
    assert str(found) == "failed: perplexity rose by 1.60 (limit 1.5)"
    assert found.lost_too_much
    found = verdict((10.0, 10.15), 0.03, tasks)
    assert found.name == "acceptable" and len(found.reasons) == 2
    assert not found.lost_too_much


def test_advice_names_options_that_exist():
    assert advice(4, 128) == (
        "try --group-size 64; --target-bpw 4.75 (more bits where they matter most); --bits 8; "
        "--samples 256, or calibration text that is closer to your use"
    )
    assert "--group-size 32;" in advice(3, 64) and "--bits 4;" in advice(3, 64)
    assert "--group-size" not in advice(3, 32) and "--bits" not in advice(8, 32)
    assert "--group-size 32" in advice(4, -1)


def test_a_task_is_flagged_beyond_two_points():
    assert not TaskChange("a", "acc", 0.50, 0.481).flagged
    assert TaskChange("a", "acc", 0.50, 0.479).flagged


def test_the_normalized_score_comes_first_and_perplexities_have_none():
    base = {"a": {"acc": 0.5, "acc_norm": 0.6, "acc_stderr": 0.1}, "b": {"word_perplexity": 9.0}}
    after = {"a": {"acc": 0.4, "acc_norm": 0.55, "acc_stderr": 0.1}, "b": {"word_perplexity": 9.5}}
    assert task_changes(base, after) == [TaskChange("a", "acc_norm", 0.6, 0.55)]
