"""Runs roundwise; settings are fields of QuantizeConfig, `max_memory` and `mode`."""

from typing import Any

from measure import run

import roundwise


def quantize(
    model: str, out: str, windows: list[list[int]], settings: dict[str, Any]
) -> dict[str, Any]:
    """Quantizes a model; returns phases, mode and bits per weight. See `measure.Quantize`."""
    budget, mode = settings.pop("max_memory", None), settings.pop("mode", None)
    result = roundwise.quantize(
        model, out, roundwise.QuantizeConfig(**settings), windows,
        samples=len(windows), seq_len=len(windows[0]), max_memory=budget, mode=mode,
    )  # fmt: skip
    return {"phases": result.phases, "mode": result.mode, "bits_per_weight": result.bits_per_weight}


if __name__ == "__main__":
    run("roundwise", quantize)
