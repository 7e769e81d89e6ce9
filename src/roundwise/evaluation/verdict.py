"""Verdict on a quantized model: how much it lost, by rules that are the same for every model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

#: Metrics of lm-eval that are scores from 0 to 1 (1 is best); a task's score is the first one it has.
SCORES = ("acc_norm", "acc", "exact_match", "f1", "mc2", "pass@1")
#: Most relative loss, in percent, of the verdicts "safe" and "acceptable".
SAFE, ACCEPTABLE = 1.0, 2.0
#: Loss of a single task, in points (hundredths of the score), above which the task is flagged.
TASK_POINTS = 2.0
#: Increase of perplexity above which the verdict is "failed".
PERPLEXITY_RISE = 1.5


@dataclass(frozen=True)
class TaskChange:
    """The score of a task for the original and the quantized model."""

    task: str
    metric: str
    base: float
    quantized: float

    @property
    def points(self) -> float:
        """Change of the score in points (hundredths); negative for a loss."""
        return 100 * (self.quantized - self.base)

    @property
    def flagged(self) -> bool:
        """True if the task lost more than TASK_POINTS."""
        return self.points < -TASK_POINTS


def task_changes(
    base: Mapping[str, Mapping[str, float]], quantized: Mapping[str, Mapping[str, float]]
) -> list[TaskChange]:
    """Returns the change of every task that has a score; tasks without one (perplexities) are skipped.

    Args:
        base: task -> metric -> value, of the original model (`TaskScores.scores`).
        quantized: the same of the quantized model.
    """
    changes = []
    for task, metrics in base.items():
        metric = next((name for name in SCORES if name in metrics), None)
        if metric is not None:
            changes.append(TaskChange(task, metric, metrics[metric], quantized[task][metric]))
    return changes


def degradation(perplexity: tuple[float, float] | None, tasks: Sequence[TaskChange]) -> float:
    """Returns the relative loss in percent: of the mean task score, or without tasks of perplexity.

    Args:
        perplexity: of the original and the quantized model; may be None if there are tasks.
        tasks: changes of tasks; those with a score of 0 for the original do not count.
    """
    counted = [change for change in tasks if change.base > 0]
    if counted:
        return 100 * (1 - fmean(c.quantized for c in counted) / fmean(c.base for c in counted))
    assert perplexity is not None, "a comparison has a text or tasks"
    base, quantized = perplexity
    return 100 * (quantized / base - 1)


def verdict(perplexity: tuple[float, float] | None, tasks: Sequence[TaskChange]) -> str:
    """Returns the verdict on a quantized model.

    Args:
        perplexity: of the original and the quantized model; may be None if there are tasks.
        tasks: changes of tasks.

    Returns:
        "failed" if perplexity rises by more than PERPLEXITY_RISE; otherwise "safe", "acceptable" or
        "investigate", by the relative loss (`degradation`).
    """
    if perplexity is not None and perplexity[1] - perplexity[0] > PERPLEXITY_RISE:
        return "failed"
    loss = degradation(perplexity, tasks)
    return "safe" if loss < SAFE else "acceptable" if loss <= ACCEPTABLE else "investigate"
