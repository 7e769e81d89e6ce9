"""Accuracy of a checkpoint, from the output of `roundwise compare --json`, for its model card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult

from roundwise.checkpoint.untrusted import read_json
from roundwise.errors import CheckpointError


@dataclass(frozen=True)
class Measurement:
    """Accuracy of a checkpoint, as `roundwise compare --json` measured it."""

    perplexity: tuple[float, float] | None
    """The original's and the checkpoint's; None, as the two below: there was no text."""
    kl_divergence: float | None
    top1_agreement: float | None
    tasks: tuple[tuple[str, str, float, float], ...] = ()
    """Task, metric, the original's value and the checkpoint's."""
    text: str = "held-out text"
    """Name of the text."""

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yields rows of metric, the original's value and the checkpoint's."""
        if self.perplexity is not None:
            yield "perplexity", *(f"{value:.4f}" for value in self.perplexity)
        if self.kl_divergence is not None:
            yield "KL divergence, nats per token", "0", f"{self.kl_divergence:.5f}"
        if self.top1_agreement is not None:
            yield "top-1 agreement", "100%", f"{self.top1_agreement:.2%}"
        for task, metric, base, quantized in self.tasks:
            yield f"{task}, {metric}", f"{base:.4f}", f"{quantized:.4f}"

    def results(self) -> Iterator[EvalResult]:
        """Yields what was measured as the hub has it."""
        values = (
            ("perplexity", "perplexity", self.perplexity and self.perplexity[1]),
            ("kl_divergence", "KL divergence to the original, nats per token", self.kl_divergence),
            ("top1_agreement", "top-1 agreement with the original", self.top1_agreement),
        )
        for metric, title, value in values:
            if value is not None:
                yield EvalResult(
                    task_type="text-generation", dataset_type="text", dataset_name=self.text,
                    metric_type=metric, metric_name=title, metric_value=value,
                )  # fmt: skip
        for task, metric, _, value in self.tasks:
            yield EvalResult(
                task_type="text-generation", dataset_type=task, dataset_name=task,
                metric_type=metric, metric_value=value,
            )  # fmt: skip


def read_measurement(file: Path, name: str) -> Measurement:
    """Reads the output of `roundwise compare --json`.

    Args:
        file: the output, saved.
        name: name of the checkpoint's folder; it tells which of several models is meant.

    Raises:
        CheckpointError: the file is something else, or has no model of this name.
    """
    value = read_json(file)
    try:
        models = [model for model in value["models"] if model["name"] == name]
        if not models:
            raise CheckpointError(
                f"{file} has no model {name}: it is of {', '.join(m['name'] for m in value['models'])}"
            )
        model = models[0]
        pair = model["perplexity"]
        return Measurement(
            perplexity=(float(pair["base"]), float(pair["quantized"])) if pair else None,
            kl_divergence=model["kl_divergence"],
            top1_agreement=model["top1_agreement"],
            tasks=tuple(
                (str(t["task"]), str(t["metric"]), float(t["base"]), float(t["quantized"]))
                for t in model["tasks"]
            ),
            text=str(value["text"] or "held-out text"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} is not what `roundwise compare --json` prints: {error!r} is missing or wrong"
        ) from None
