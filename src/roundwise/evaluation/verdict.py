"""From figures to a judgement, by rules that are the same for everyone."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

#: Metrics of lm-eval that are parts of a whole, 1 being best; the first that a task has is its score.
SCORES = ("acc_norm", "acc", "exact_match", "f1", "mc2", "pass@1")
#: Mean relative loss in percent, up to which a result is safe, and acceptable.
SAFE, ACCEPTABLE = 1.0, 2.0
#: Points that a single task may lose, and perplexity may rise, before it is pointed out.
TASK_POINTS, PERPLEXITY_RISE = 2.0, 1.5


@dataclass(frozen=True)
class TaskChange:
    """One task before and after."""

    task: str
    metric: str
    base: float
    quantized: float

    @property
    def points(self) -> float:
        """Hundredths of the score won (or, negative, lost)."""
        return 100 * (self.quantized - self.base)

    @property
    def flagged(self) -> bool:
        """It lost more than TASK_POINTS."""
        return self.points < -TASK_POINTS


def task_changes(
    base: dict[str, dict[str, float]], quantized: dict[str, dict[str, float]]
) -> list[TaskChange]:
    """Every task that has a score, before and after; others (perplexities) have no points."""
    found = []
    for task, metrics in base.items():
        metric = next((name for name in SCORES if name in metrics), None)
        if metric is not None:
            found.append(TaskChange(task, metric, metrics[metric], quantized[task][metric]))
    return found


def degradation(perplexity: tuple[float, float] | None, tasks: list[TaskChange]) -> float:
    """Percent lost: of the mean task score where there are tasks, else by how much perplexity rose."""
    scored = [change for change in tasks if change.base > 0]
    if scored:
        return 100 * (1 - fmean(c.quantized for c in scored) / fmean(c.base for c in scored))
    assert perplexity is not None, "a comparison has a text or tasks"
    return 100 * (perplexity[1] / perplexity[0] - 1)


def verdict(perplexity: tuple[float, float] | None, tasks: list[TaskChange]) -> str:
    """safe, acceptable, investigate, or failed."""
    if perplexity is not None and perplexity[1] - perplexity[0] > PERPLEXITY_RISE:
        return "failed"
    lost = degradation(perplexity, tasks)
    return "safe" if lost < SAFE else "acceptable" if lost <= ACCEPTABLE else "investigate"
