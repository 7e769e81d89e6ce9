"""roundwise: settings are those of QuantizeConfig, and max_memory."""

from typing import Any

from measure import run

import roundwise


def quantize(
    model: str, out: str, windows: list[list[int]], settings: dict[str, Any]
) -> dict[str, Any]:
    """As `measure.Quantize`, with the seconds of each phase and the stored bits per weight."""
    budget = settings.pop("max_memory", None)
    done = roundwise.quantize(
        model, out, roundwise.QuantizeConfig(**settings), windows,
        samples=len(windows), seq_len=len(windows[0]), max_memory=budget,
    )  # fmt: skip
    return {"phases": done.phases, "mode": done.mode, "bits_per_weight": done.bits_per_weight}


if __name__ == "__main__":
    run("roundwise", quantize)
