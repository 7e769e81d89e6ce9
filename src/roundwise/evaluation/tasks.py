"""Benchmarks of the field through lm-eval, in this process, on a model that is loaded already."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from roundwise.errors import ConfigError, RunError


@dataclass(frozen=True)
class TaskScores:
    """What lm-eval has measured."""

    scores: dict[str, dict[str, float]]
    """Task (or group of tasks) to metric to value; `acc_stderr` is the standard error of `acc`."""
    samples: dict[str, int]
    """How many documents of each task were used."""
    shots: dict[str, int]
    """Examples before each question."""

    def as_dict(self) -> dict[str, Any]:
        """As `eval --json` prints it."""
        return asdict(self)


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    names: list[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 4,
    max_length: int | None = None,
    bootstrap: int = 0,
) -> TaskScores:
    """Runs lm-eval's tasks.

    Args:
        model: transformers causal language model, as `roundwise.load` gives it.
        tokenizer: its tokenizer.
        names: tasks, groups or patterns such as "arc_*".
        include_path: folder with task files (YAML) of one's own. Such files can name Python code
            beside them, which is run.
        shots: examples before each question; None: what each task says.
        limit: only the first documents of each task.
        batch_size: rows that go through the model together.
        max_length: tokens the model sees at once; None: the model's context.
        bootstrap: resamplings for standard errors that have no formula.

    Raises:
        ConfigError: lm-eval is not installed, there is no such task, or a task cannot be prepared.
        RunError: a task's data cannot be had.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("tasks need lm-eval: pip install 'roundwise[eval]'")
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"--include-path {include_path}: there is no such folder")

    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
        manager, found = _find(names, include_path)
        harness = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            device=str(model.device),
        )
        with _explained(found):
            result = lm_eval.simple_evaluate(
                model=harness,
                tasks=found,
                num_fewshot=shots,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=bootstrap,
                log_samples=False,
            )
    assert result is not None  # only other ranks of a distributed run get nothing
    return scores_of(result)


@contextlib.contextmanager
def _explained(names: list[str]) -> Iterator[None]:
    """lm-eval's errors as ours."""
    try:
        yield
    except OSError as error:  # data sets that are not here and cannot be downloaded
        reason = str(error).strip().split("\n", 1)[0]
        raise RunError(f"the data of {', '.join(names)} cannot be had: {reason}") from error
    except (ValueError, KeyError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ConfigError(f"{', '.join(names)} cannot be run: {reason}") from error


def scores_of(result: Mapping[str, Any]) -> TaskScores:
    """The figures in lm-eval's result."""
    scores = {
        task: {
            _metric(name): float(value)
            for name, value in found.items()
            if "," in name and isinstance(value, int | float)
        }
        for task, found in {**result["results"], **result.get("groups", {})}.items()
    }
    samples = {task: int(n["effective"]) for task, n in result.get("n-samples", {}).items()}
    shots = {task: int(n) for task, n in result.get("n-shot", {}).items()}
    return TaskScores(scores, samples, shots)


def _metric(name: str) -> str:
    """lm-eval's "acc,none" is acc; a filter that does something stays in the name."""
    metric, _, rule = name.partition(",")
    return metric if rule == "none" else name


def _find(names: list[str], include_path: str | os.PathLike[str] | None) -> tuple[Any, list[str]]:
    """lm-eval's task manager and the tasks that the names mean."""
    from lm_eval.tasks import TaskManager

    missing = names
    # Reading the thousands of tasks it comes with takes seconds: only if they are needed.
    for defaults in (False, True) if include_path is not None else (True,):
        folder = str(include_path) if include_path is not None else None
        manager = TaskManager(include_path=folder, include_defaults=defaults)
        found = {name: manager.match_tasks([name]) for name in names}
        missing = [name for name, matches in found.items() if not matches]
        if not missing:
            return manager, [task for matches in found.values() for task in matches]
    raise ConfigError(
        f"lm-eval has no task {', '.join(missing)}: `lm_eval ls tasks` lists what there is, "
        "--include-path adds a folder of your own"
    )
