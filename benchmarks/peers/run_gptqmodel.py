"""Runs GPTQModel; settings are fields of its GPTQConfig."""

import os
from typing import Any

os.environ.update(  # before it is imported
    CUDA_VISIBLE_DEVICES="",
    GPTQMODEL_CPU_WORKERS="2",  # its default on two cores is too few for its loader
    HF_HUB_OFFLINE="1",
    TORCHDYNAMO_DISABLE="1",
)

from gptqmodel import GPTQModel
from gptqmodel.quantization import GPTQConfig
from measure import run


def quantize(model: str, out: str, windows: list[list[int]], settings: dict[str, Any]) -> None:
    """Quantizes a model; see `measure.Quantize`."""
    loaded = GPTQModel.load(model, GPTQConfig(**settings))
    loaded.quantize(windows, batch_size=4)
    loaded.save(out)


if __name__ == "__main__":
    run("gptqmodel", quantize)
