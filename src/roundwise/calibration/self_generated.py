"""Calibration text that the model writes itself, for when there is no other.

Liu et al. 2023 (LLM-QAT): text drawn from the model's own distribution stands in for what it was trained
on. Whole windows are drawn at temperature 1, across the ends of documents.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import GenerationConfig

from roundwise.checkpoint.reader import Checkpoint
from roundwise.config import CalibrationConfig
from roundwise.errors import CalibrationError
from roundwise.model.build import load_config, model_class
from roundwise.system.device import HOST
from roundwise.system.half_matmul import cpu_half_matmul
from roundwise.system.memory import available_memory

#: What names this source.
SELF = "self"


@torch.no_grad()
def generate_windows(
    checkpoint: Checkpoint,
    tokenizer: Any,
    wanted: CalibrationConfig,
    *,
    device: torch.device = HOST,
) -> list[list[int]]:
    """Windows [samples][seq_len] of tokens drawn from the model; the same for the same seed.

    Each begins with the token that begins a text, or ends the one before it; with any token if the
    tokenizer has neither. The whole model is in memory meanwhile.

    Raises:
        CalibrationError: the model writes no text, or does not fit into memory.
    """
    config = load_config(checkpoint)
    kind = model_class(config)
    if not kind.can_generate() or getattr(config, "is_encoder_decoder", False):
        raise CalibrationError(
            f"{kind.__name__} writes no text of its own: give a calibration file"
        )
    if "quantization_config" in Checkpoint(checkpoint.folder).config:
        raise CalibrationError("a model that is quantized already does not run here: give a text")
    if checkpoint.nbytes() > available_memory(device):
        raise CalibrationError(
            f"to write calibration text the whole model ({checkpoint.nbytes() / 1e9:.1f} GB) must be in "
            f"memory, of which {available_memory(device) / 1e9:.1f} GB are free: give a text instead"
        )
    model = kind.from_pretrained(
        checkpoint.folder, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    model = model.to(device).eval()
    model.generation_config = GenerationConfig()  # nothing of what the model's files prefer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    generator = random.Random(wanted.seed)
    vocabulary = int(config.get_text_config().vocab_size)
    windows: list[list[int]] = []
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type=device.type if others else "cuda"):
        torch.manual_seed(wanted.seed)
        while len(windows) < wanted.samples:
            count = min(wanted.batch_size, wanted.samples - len(windows))
            first = [generator.randrange(vocabulary) if start is None else start] * count
            settings = GenerationConfig(
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(wanted.seq_len - 1, 1),
                eos_token_id=None, pad_token_id=first[0],
            )  # fmt: skip
            ids = torch.tensor(first, device=device)[:, None]
            with cpu_half_matmul():
                drawn = model.generate(
                    ids, attention_mask=torch.ones_like(ids), generation_config=settings
                )
            windows += drawn[:, : wanted.seq_len].tolist()
    return windows
