"""The model of a config: its class, built without weights, and what its forward is given."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.untrusted import check_computed_buffers
from roundwise.errors import CheckpointError, ConfigError, RoundwiseError


def load_config(checkpoint: Checkpoint) -> Any:
    """Transformers' config of a checkpoint as it is without quantization; no code of its own is run."""
    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=False, **checkpoint.overrides
        )
    except Exception as error:  # transformers raises many kinds here; all mean the same to a user
        kind = checkpoint.config.get("model_type", "no model_type")
        reason = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot open {checkpoint.folder} ({kind}): {reason}"
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def dtype_of(config: dict[str, Any]) -> torch.dtype | None:
    """What the config.json of a model says that it computes in; None: nothing."""
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else None


def model_class(config: Any) -> type[transformers.PreTrainedModel]:
    """The class that a checkpoint names, else the causal language model of its kind.

    Raises:
        ConfigError: transformers has neither.
    """
    for name in getattr(config, "architectures", None) or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    try:
        found = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise ConfigError(f"{config.model_type} is no causal language model") from None
    assert isinstance(found, type)
    return found


def context_length(config: Any) -> int | None:
    """The longest text that a model takes, in tokens; None: its config sets no limit.

    Args:
        config: transformers' config of the whole model.
    """
    text = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or 0) or None


def build(config: Any, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model on the meta device, only its computed buffers (rotary tables, masks) real.

    Raises:
        CheckpointError: the config makes no sense.
    """
    kind = model_class(config)
    try:
        with torch.device("meta"):
            model = kind._from_config(config, dtype=dtype)
    except RoundwiseError:
        raise
    except Exception as error:  # many kinds for one reason: a config that makes no sense
        reason = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(
            f"transformers cannot build the {config.model_type} of config.json: {reason}"
        ) from error
    check_computed_buffers(model)
    computed = {name for name, _ in model.named_non_persistent_buffers()}
    fresh = {""}
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and f"{name}.{key}".lstrip(".") in computed:
                module._buffers[key] = torch.empty_like(buffer, device="cpu")
                parts = name.split(".")
                fresh |= {".".join(parts[:end]) for end in range(len(parts) + 1)}
    # transformers fills computed buffers in its own initialisation, at times that of a module around:
    # let it see only these.
    for name, module in model.named_modules():
        module._is_hf_initialized = name not in fresh
    model.initialize_weights()
    return model.eval()


def arguments(
    model: transformers.PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor | None = None
) -> dict[str, Any]:
    """What the model's forward is called with for some text.

    A decoder behind an encoder is given the same text as the encoder.

    Args:
        model: any of transformers'.
        input_ids: [windows, length].
        mask: bool, False on padding.

    Raises:
        ConfigError: the model does not begin with text.
    """
    if model.main_input_name != "input_ids":
        raise ConfigError(
            f"{type(model).__name__} begins with {model.main_input_name}, which calibration text does "
            "not give: use --method rtn"
        )
    given: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if mask is not None:
        given["attention_mask"] = mask.long()
    if getattr(model.config, "is_encoder_decoder", False):
        given |= {f"decoder_{name}": value for name, value in given.items() if name != "use_cache"}
    return given
