"""Verdict on a quantized model: how much it lost, by rules that are the same for every model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

#: Metrics of lm-eval that are scores from 0 to 1 (1 is best); a task's score is the first one it has.
SCORES = ("acc_norm", "acc", "exact_match", "f1", "mc2", "pass@1")
#: Verdicts, from the best to the worst.
VERDICTS = ("safe", "acceptable", "investigate", "failed")
#: Most that a model may lose for the verdicts "safe", "acceptable" and "investigate": rise of perplexity
#: in percent, KL divergence per token in nats, mean task score in points (hundredths).
PERPLEXITY_PERCENT, KL, MEAN_POINTS = (1.0, 2.0, 10.0), (0.02, 0.05, 0.2), (1.0, 2.0, 5.0)
#: Rise of perplexity above which the verdict is "failed" if it is also more than 5%.
PERPLEXITY_RISE, RISE_PERCENT = 1.5, 5.0
#: Loss of a single task, in points, above which the task is flagged, and is to be investigated.
TASK_POINTS = 2.0


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


@dataclass(frozen=True)
class Verdict:
    """The worst verdict of all rules, and why it is no better."""

    name: str
    """One of `VERDICTS`."""
    reasons: tuple[str, ...]
    """One for each rule with this verdict: what was lost, and the limit that it broke; empty if safe."""

    @property
    def lost_too_much(self) -> bool:
        """True if something else should be tried."""
        return self.name in VERDICTS[2:]

    def __str__(self) -> str:
        return ": ".join([self.name, *(["; ".join(self.reasons)] if self.reasons else [])])


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


def verdict(
    perplexity: tuple[float, float] | None, kl: float | None, tasks: Sequence[TaskChange]
) -> Verdict:
    """Returns the verdict on a quantized model.

    Args:
        perplexity: of the original and the quantized model; None: there was no text.
        kl: KL divergence per token in nats; None: there was no text.
        tasks: changes of tasks.
    """
    found = [*_perplexity_rules(perplexity), *_kl_rule(kl), *_task_rules(tasks)]
    worst = max((level for level, _ in found), default=0)
    reasons = tuple(reason for level, reason in found if level == worst) if worst else ()
    return Verdict(VERDICTS[worst], reasons)


def _perplexity_rules(perplexity: tuple[float, float] | None) -> Iterator[tuple[int, str]]:
    """Yields the index of a verdict, and what broke the limit of the one before."""
    if perplexity is None:
        return
    rise = perplexity[1] - perplexity[0]
    percent = 100 * rise / perplexity[0]
    if rise > PERPLEXITY_RISE and percent > RISE_PERCENT:
        yield 3, f"perplexity rose by {rise:.2f} (limit {PERPLEXITY_RISE:g})"
    else:
        level = _level(percent, PERPLEXITY_PERCENT)
        yield level, f"perplexity rose by {percent:.1f}% ({_limit(level, PERPLEXITY_PERCENT, '%')})"


def _kl_rule(kl: float | None) -> Iterator[tuple[int, str]]:
    if kl is not None:
        level = _level(kl, KL)
        yield level, f"KL per token is {kl:.3g} ({_limit(level, KL, '')})"


def _task_rules(tasks: Sequence[TaskChange]) -> Iterator[tuple[int, str]]:
    if not tasks:
        return
    lost = -fmean(change.points for change in tasks)
    level = _level(lost, MEAN_POINTS)
    yield level, f"tasks lost {lost:.1f} points on average ({_limit(level, MEAN_POINTS, '')})"
    for change in tasks:
        if change.flagged:
            yield 2, f"{change.task} lost {-change.points:.1f} points (limit {TASK_POINTS:g})"


def _level(value: float, limits: tuple[float, float, float]) -> int:
    """Returns the index of the verdict on a loss: the number of limits that it is above."""
    return sum(value > limit for limit in limits)


def _limit(level: int, limits: tuple[float, float, float], unit: str) -> str:
    """Returns the limit of the next better verdict in words."""
    return f"limit {limits[max(level - 1, 0)]:g}{unit}"


def advice(bits: int, group_size: int) -> str:
    """Returns what to try next for a model that lost too much, with the options to copy.

    Args:
        bits: bits per weight of most of its layers.
        group_size: input channels per group; -1: all.
    """
    options = []
    if group_size == -1 or group_size > 32:
        options.append(f"--group-size {32 if group_size in (-1, 64) else 64}")
    if bits < 8:
        options.append(f"--target-bpw {bits + 0.75:g} (more bits where they matter most)")
        options.append(f"--bits {min(other for other in (3, 4, 8) if other > bits)}")
    options.append("--samples 256, or calibration text that is closer to your use")
    return "try " + "; ".join(options)
