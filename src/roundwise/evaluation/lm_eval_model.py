"""Registers our models with lm-eval and runs its command line:

    python -m roundwise.evaluation.lm_eval_model --model roundwise --model_args pretrained=DIR --tasks …

lm-eval has no entry point through which an installed package could register a model, so this module adds
ours to lm-eval's registry and then runs lm-eval's command line unchanged. Its own `--model hf` also
reads our checkpoints then: importing roundwise is enough.
"""

from __future__ import annotations

from typing import Any

import lm_eval.models  # noqa: F401  # fills the registry with lm-eval's own models
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from roundwise.inference.load import load, parse_dtype
from roundwise.system.activity import logger
from roundwise.system.device import parse_device


@register_model("roundwise")
class RoundwiseLM(HFLM):  # type: ignore[misc]  # untyped there
    """lm-eval model: HFLM with a checkpoint loaded by `roundwise.load`.

    Args:
        pretrained: folder or hub id.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu or cuda; None: auto. lm-eval's own default is cuda: without a GPU the CPU is
            taken, as its HFLM does.
        options: other arguments of HFLM.
    """

    def __init__(
        self, pretrained: str, dtype: str = "auto", device: str | None = None, **options: Any
    ) -> None:
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            logger.warning("there is no GPU: the CPU is used instead of device %s", device)
            device = "cpu"
        model, tokenizer = load(
            pretrained, dtype=parse_dtype(dtype), device=parse_device(device or "auto")
        )
        super().__init__(pretrained=model, tokenizer=tokenizer, device=str(model.device), **options)


if __name__ == "__main__":
    cli_evaluate()
