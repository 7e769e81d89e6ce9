"""Runs tasks of lm-eval (the Language Model Evaluation Harness) on a loaded model."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from roundwise.errors import ConfigError, RunError, first_line
from roundwise.version import install_command


@dataclass(frozen=True)
class TaskScores:
    """Results of lm-eval."""

    scores: dict[str, dict[str, float]]
    """Task or group of tasks -> metric -> value; `acc_stderr` is the standard error of `acc`."""
    samples: dict[str, int]
    """Task -> number of documents used."""
    shots: dict[str, int]
    """Task -> examples before each question."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the JSON of `eval --json`."""
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
    """Runs tasks of lm-eval on a model.

    Args:
        model: transformers causal language model, as `roundwise.load` returns it.
        tokenizer: its tokenizer.
        names: tasks, groups of tasks, or patterns such as "arc_*".
        include_path: folder with more task files (YAML). They can name Python code beside them, which is
            executed.
        shots: examples before each question; None: the default of each task.
        limit: number of documents of each task; None: all.
        batch_size: rows in one forward.
        max_length: tokens the model sees at once; None: the model's context.
        bootstrap: resamplings for standard errors that have no formula.

    Raises:
        ConfigError: lm-eval is not installed, there is no such task, or a task cannot be prepared.
        RunError: the data of a task is unavailable.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(f"tasks need lm-eval: {install_command('eval')}")
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"--include-path {include_path}: this folder does not exist")

    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with contextlib.redirect_stdout(sys.stderr):  # standard output is for our results
        manager, tasks = _find_tasks(names, include_path)
        harness = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            device=str(model.device),
        )
        with _converted_errors(tasks):
            result = lm_eval.simple_evaluate(
                model=harness,
                tasks=tasks,
                num_fewshot=shots,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=bootstrap,
                log_samples=False,
            )
    assert result is not None  # it is None only on other ranks of a distributed run
    return scores_of(result)


@contextlib.contextmanager
def _converted_errors(names: list[str]) -> Iterator[None]:
    """Context manager: raises lm-eval's errors as roundwise's."""
    try:
        yield
    except OSError as error:  # a data set is neither cached nor downloadable
        raise RunError(
            f"the data of {', '.join(names)} is unavailable: {first_line(error)}"
        ) from error
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{', '.join(names)} cannot be run: {first_line(error)}") from error


def scores_of(result: Mapping[str, Any]) -> TaskScores:
    """Extracts the numbers from what `lm_eval.simple_evaluate` returns."""
    scores = {
        task: {
            _metric(name): float(value)
            for name, value in metrics.items()
            if "," in name and isinstance(value, int | float)
        }
        for task, metrics in {**result["results"], **result.get("groups", {})}.items()
    }
    samples = {task: int(n["effective"]) for task, n in result.get("n-samples", {}).items()}
    shots = {task: int(n) for task, n in result.get("n-shot", {}).items()}
    return TaskScores(scores, samples, shots)


def _metric(name: str) -> str:
    """Returns the name of a metric without the filter "none": "acc,none" -> "acc"."""
    metric, _, filter_name = name.partition(",")
    return metric if filter_name == "none" else name


def _find_tasks(
    names: list[str], include_path: str | os.PathLike[str] | None
) -> tuple[Any, list[str]]:
    """Returns lm-eval's task manager, and the tasks that match the names."""
    from lm_eval.tasks import TaskManager

    missing = names
    # lm-eval's own tasks are thousands of files, which take seconds to read: only if they are needed.
    for defaults in (False, True) if include_path is not None else (True,):
        folder = str(include_path) if include_path is not None else None
        manager = TaskManager(include_path=folder, include_defaults=defaults)
        matches = {name: manager.match_tasks([name]) for name in names}
        missing = [name for name, tasks in matches.items() if not tasks]
        if not missing:
            return manager, [task for tasks in matches.values() for task in tasks]
    raise ConfigError(
        f"lm-eval has no task {', '.join(missing)}: `lm_eval ls tasks` lists all tasks, --include-path "
        "adds a folder of your own"
    )
