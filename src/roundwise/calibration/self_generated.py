"""Calibration text that the model generates itself, for when no other text is available.

After LLM-QAT (Liu et al. 2023): text sampled from the model's own distribution replaces its training
data. Whole windows are sampled at temperature 1, past the ends of documents.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import GenerationConfig

from roundwise.calibration.special_tokens import special_tokens
from roundwise.checkpoint.quantization_config import raw_quantization_config
from roundwise.checkpoint.reader import Checkpoint
from roundwise.config import CalibrationConfig
from roundwise.errors import CalibrationError
from roundwise.model.build import embedding_shape, load_config, model_class
from roundwise.system.device import HOST
from roundwise.system.half_matmul import cpu_half_matmul
from roundwise.system.memory import available_memory

#: Name of this source.
SELF = "self"


@torch.no_grad()
def generate_windows(
    checkpoint: Checkpoint,
    tokenizer: Any,
    config: CalibrationConfig,
    *,
    device: torch.device = HOST,
) -> list[list[int]]:
    """Samples windows of token ids [samples][seq_len] from the model; deterministic for a seed.

    Each window begins with what the tokenizer puts in front of a text, else with the beginning-of-text
    token, else with the end-of-text token, else with a random one. The whole model is in memory
    meanwhile.

    Args:
        checkpoint: the model, not quantized.
        tokenizer: its transformers tokenizer.
        config: number of windows, their length, batch size and seed.
        device: device that generates.

    Raises:
        CalibrationError: the model cannot generate text, is quantized, or does not fit into memory.
    """
    model_config = load_config(checkpoint)
    model = _load_model(checkpoint, model_config, device)
    begin = _first_tokens(tokenizer, config)
    generator = random.Random(config.seed)
    vocabulary = embedding_shape(model)[0]
    windows: list[list[int]] = []
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(config.seed)
        while len(windows) < config.samples:
            count = min(config.batch_size, config.samples - len(windows))
            first = begin or [generator.randrange(vocabulary)]
            settings = GenerationConfig(
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None,
                max_new_tokens=max(config.seq_len - len(first), 1), pad_token_id=first[0],
            )  # fmt: skip
            ids = torch.tensor([first] * count, device=device)
            with cpu_half_matmul():
                generated = model.generate(
                    ids, attention_mask=torch.ones_like(ids), generation_config=settings
                )
            windows += generated[:, : config.seq_len].tolist()
    return windows


def _first_tokens(tokenizer: Any, config: CalibrationConfig) -> list[int]:
    """Returns the tokens that every window begins with; empty: there is no such token."""
    prefix = special_tokens(tokenizer).prefix if config.special_tokens else ()
    begins = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return list(prefix) or [int(token) for token in begins if token is not None][:1]


def _load_model(checkpoint: Checkpoint, model_config: Any, device: torch.device) -> Any:
    """Loads the whole model to `device`; errors as for `generate_windows`."""
    kind = model_class(model_config)
    if not kind.can_generate() or getattr(model_config, "is_encoder_decoder", False):
        raise CalibrationError(f"{kind.__name__} cannot generate text: give a calibration file")
    dense = any(checkpoint.folder.glob("*.safetensors"))  # and not a GGUF file
    if not dense or raw_quantization_config(Checkpoint(checkpoint.folder)) is not None:
        raise CalibrationError(
            "a quantized model cannot generate its calibration text: give a calibration file"
        )
    needed, available = checkpoint.nbytes(), available_memory(device)
    if needed > available:
        raise CalibrationError(
            f"to generate calibration text, the whole model ({needed / 1e9:.1f} GB) must fit into "
            f"memory, of which {available / 1e9:.1f} GB are free: give a calibration file instead"
        )
    model = kind.from_pretrained(
        checkpoint.folder, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    model = model.to(device).eval()
    model.generation_config = GenerationConfig()  # ignore the settings in the model's files
    return model
