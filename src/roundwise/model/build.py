"""Builds a transformers model without weights, and the arguments of its forward."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.untrusted import check_computed_buffers
from roundwise.errors import CheckpointError, ConfigError, RoundwiseError, first_line


def load_config(checkpoint: Checkpoint) -> Any:
    """Returns transformers' config of a checkpoint, without `quantization_config`; runs no custom code.

    Raises:
        CheckpointError: transformers does not know the model or cannot read its config.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.folder,
            trust_remote_code=False,
            _configuration_file=checkpoint.config_file,
            **checkpoint.overrides,
        )
    except Exception as error:  # transformers raises many types here; users need one
        kind = checkpoint.config.get("model_type", "no model_type")
        reason = first_line(error)
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot open {checkpoint.folder} ({kind}): {reason}"
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def config_dtype(config: dict[str, Any]) -> torch.dtype | None:
    """Returns the dtype that a model computes in according to its config.json; None if it has none."""
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return dtype if isinstance(dtype, torch.dtype) else None


def model_class(config: Any) -> type[transformers.PreTrainedModel]:
    """Returns the class that a config names, else the causal language model of its `model_type`.

    Args:
        config: transformers' config.

    Raises:
        ConfigError: transformers has neither.
    """
    for name in getattr(config, "architectures", None) or []:
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named
    try:
        causal = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise ConfigError(f"{config.model_type} is not a causal language model") from None
    assert isinstance(causal, type)
    return causal


def context_length(config: Any) -> int | None:
    """Returns the maximum number of tokens of a model's input; None if its config sets no limit.

    Args:
        config: transformers' config of the whole model.
    """
    text = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or 0) or None


def build(config: Any, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """Builds the model on the meta device; only its computed buffers (rotary tables, masks) have memory.

    Args:
        config: transformers' config.
        dtype: dtype of the parameters.

    Raises:
        CheckpointError: the config is invalid, or asks for very large computed buffers.
        ConfigError: transformers has no class for the model.
    """
    cls = model_class(config)
    try:
        with torch.device("meta"):
            model = cls._from_config(config, dtype=dtype)
    except RoundwiseError:
        raise
    except Exception as error:  # transformers raises many types for an invalid config
        reason = first_line(error)
        raise CheckpointError(
            f"transformers cannot build the {config.model_type} of config.json: {reason}"
        ) from error
    check_computed_buffers(model)
    computed = {name for name, _ in model.named_non_persistent_buffers()}
    uninitialized = {""}
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and f"{name}.{key}".lstrip(".") in computed:
                module._buffers[key] = torch.empty_like(buffer, device="cpu")
                parts = name.split(".")
                uninitialized |= {".".join(parts[:end]) for end in range(len(parts) + 1)}
    # transformers fills computed buffers when it initialises their module or one of its parents, so only
    # these are marked as uninitialised.
    for name, module in model.named_modules():
        module._is_hf_initialized = name not in uninitialized
    model.initialize_weights()
    return model.eval()


def forward_kwargs(
    model: transformers.PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor | None = None
) -> dict[str, Any]:
    """Returns the keyword arguments for a model's forward on some text.

    The decoder of an encoder-decoder gets the same text as the encoder.

    Args:
        model: a transformers model.
        input_ids: int64 [batch, length].
        mask: bool [batch, length], False on padding; None: no padding.

    Raises:
        ConfigError: the model's main input is not text.
    """
    if model.main_input_name != "input_ids":
        raise ConfigError(
            f"{type(model).__name__} takes {model.main_input_name} instead of text, so it cannot be "
            "calibrated: use --method rtn"
        )
    kwargs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if mask is not None:
        kwargs["attention_mask"] = mask.long()
    if getattr(model.config, "is_encoder_decoder", False):
        kwargs |= {
            f"decoder_{name}": value for name, value in kwargs.items() if name != "use_cache"
        }
    return kwargs
