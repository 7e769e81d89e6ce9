"""Builds a transformers model without weights, and the arguments of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.untrusted import check_computed_buffers
from roundwise.errors import CheckpointError, ConfigError, quoted
from roundwise.model.foreign_errors import foreign_errors


def load_config(checkpoint: Checkpoint) -> Any:
    """Returns transformers' config of a checkpoint, without `quantization_config`; runs no custom code.

    Raises:
        CheckpointError: transformers does not know the model or cannot read its config.
    """
    kind = quoted(str(checkpoint.config.get("model_type", "no model_type")))[1:-1]
    with foreign_errors(
        f"transformers {transformers.__version__} cannot open {checkpoint.folder} ({kind})"
    ):
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=False, _configuration_file=checkpoint.config_file,
            **checkpoint.overrides,
        )  # fmt: skip
        config.return_dict = True  # all code here reads outputs by name
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def config_dtype(config: dict[str, Any]) -> torch.dtype | None:
    """Returns the dtype that a model computes in according to its config.json; None if it has none."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        dtype = getattr(torch, str(part.get("dtype") or part.get("torch_dtype")), None)
        if isinstance(dtype, torch.dtype):
            return dtype
    return None


def model_class(config: Any) -> type[transformers.PreTrainedModel]:
    """Returns the class that a config names, else the causal language model of its `model_type`.

    Args:
        config: transformers' config.

    Raises:
        ConfigError: transformers has neither.
    """
    found = next(_named_classes(config), None)
    if found is None:
        try:
            found = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        except KeyError:
            kind = quoted(str(config.model_type))[1:-1]
            raise ConfigError(f"{kind} is not a causal language model") from None
    assert isinstance(found, type)
    is_default = bool(getattr(type(config), "is_encoder_decoder", False))
    takes_both = is_default or "decoder_input_ids" in inspect.signature(found.forward).parameters
    if getattr(config, "is_encoder_decoder", False) and not takes_both:
        raise CheckpointError(
            f"config.json says is_encoder_decoder=true, but {found.__name__} is not an encoder-decoder: "
            "set it to false"
        )
    return found


def _named_classes(config: Any) -> Iterator[type[transformers.PreTrainedModel]]:
    """Yields the classes of transformers that a config names as its architectures."""
    names = getattr(config, "architectures", None)
    for name in names if isinstance(names, list) else []:
        named = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            yield named


def text_config(config: Any) -> Any:
    """Returns the part of a transformers config that is about the language model."""
    try:
        return config.get_text_config()
    except ValueError:  # there are several, such as an encoder's and a decoder's
        return config.get_text_config(decoder=True)


def config_size(model: Any, name: str) -> int | None:
    """Returns a size from the config of a model's text part; None: it has none, or one per layer.

    Args:
        model: a model.
        name: such as hidden_size; transformers knows other spellings of it.
    """
    try:
        value = getattr(text_config(model.config), name, None)
    except RuntimeError:  # transformers raises it if layers differ
        return None
    return int(value) if isinstance(value, int) else None


def embedding_shape(model: Any) -> tuple[int, int]:
    """Returns (vocabulary, hidden size) of a model; 0: neither its config nor its embedding has it."""
    try:
        weight = model.get_input_embeddings().weight
        rows, width = (int(size) for size in weight.shape)
    except (AttributeError, NotImplementedError, ValueError):  # such as hashed characters
        rows = width = 0
    return config_size(model, "vocab_size") or rows, config_size(model, "hidden_size") or width


def context_length(model: Any) -> int | None:
    """Returns the maximum number of tokens of a model's input; None if its config sets no limit.

    Args:
        model: a model; or transformers' config of it, whose limit may be a few tokens too large.
    """
    config = text_config(getattr(model, "config", model))
    limit = int(getattr(config, "max_position_embeddings", None) or 0)
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        # RoBERTa and its kin count positions from the one after padding.
        if not isinstance(module, nn.Embedding) or module.num_embeddings != limit:
            continue
        if module.padding_idx is not None and "position" in name.rpartition(".")[2]:
            return limit - module.padding_idx - 1
    return limit if limit > 0 else None


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
    kind = quoted(str(config.model_type))[1:-1]
    what = f"transformers cannot build the {kind} of config.json"
    with foreign_errors(what), torch.device("meta"):
        model = cls._from_config(config, dtype=dtype)
    for module in model.modules():
        for key, weight in module._parameters.items():
            if (
                weight is not None and not weight.is_meta
            ):  # XLNet makes some regardless of the device
                module._parameters[key] = nn.Parameter(weight.to("meta"), requires_grad=False)
    check_computed_buffers(model)
    initialize_tensors(model, {name for name, _ in model.named_non_persistent_buffers()})
    return model.eval()


def initialize_tensors(model: transformers.PreTrainedModel, names: set[str]) -> None:
    """Computes parameters and buffers that are not in the files, as transformers initializes them.

    Args:
        model: a model whose other parameters are on the meta device.
        names: full names of the tensors.
    """
    uninitialized = {""} if names else set()
    for path, module in model.named_modules():
        for tensors in (module._buffers, module._parameters):
            for key, tensor in tensors.items():
                if tensor is not None and f"{path}.{key}".lstrip(".") in names:
                    empty = torch.empty_like(tensor, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[key] = nn.Parameter(empty, False) if is_parameter else empty
                    parts = path.split(".")
                    uninitialized |= {".".join(parts[:end]) for end in range(len(parts) + 1)}
    # transformers fills computed buffers when it initialises their module or one of its parents, so only
    # these are marked as uninitialised.
    for path, module in model.named_modules():
        module._is_hf_initialized = path not in uninitialized
    model.initialize_weights()


def forward_kwargs(
    model: transformers.PreTrainedModel,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Returns the keyword arguments for a model's forward on some text.

    The decoder of an encoder-decoder gets the same text as the encoder.

    Args:
        model: a transformers model.
        input_ids: int64 [batch, length].
        mask: bool [batch, length], False on padding; None: no padding.
        inputs: further inputs by name, such as pixel values.

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
    for name, value in (inputs or {}).items():
        kwargs[name] = value.to(model.dtype) if value.is_floating_point() else value
    return kwargs
