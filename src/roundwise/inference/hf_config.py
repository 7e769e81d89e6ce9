"""Makes transformers read quantization configs as the rest of roundwise does.

transformers' own class for them checks how a file was made: it refuses good files that name another
dataset, a damping of 0, or an order of modules. It also does not know all spellings of GPTQ, and leaves
a model without weights if the config is in quantize_config.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers.utils.quantization_config as hf

from roundwise.checkpoint.compressed_tensors import METHOD, is_supported
from roundwise.checkpoint.quantization_config import (
    OLD_FILE,
    is_packed,
    parse_quantization_config,
    quantization_method,
)
from roundwise.checkpoint.reader import read_header
from roundwise.checkpoint.untrusted import read_json


class GPTQConfig(hf.GPTQConfig):  # type: ignore[misc]  # untyped there
    """Config of a GPTQ checkpoint that is loaded; transformers requires the name of its own class.

    Args:
        settings: a quantization config of any tool, as JSON.

    Raises:
        CheckpointError: a value that changes how tensors are read is not known.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = parse_quantization_config(settings, "the checkpoint").as_json()
        self.__dict__.update(self.settings)
        self.quant_method = hf.QuantizationMethod.GPTQ
        self.format = self.settings["checkpoint_format"]

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as JSON, for config.json."""
        return {**self.settings}


class PackedConfig(hf.QuantizationConfigMixin):  # type: ignore[misc]  # untyped there
    """Config of a compressed-tensors checkpoint of packed integers that is loaded.

    Args:
        settings: a quantization config, as JSON.

    Raises:
        CheckpointError: the config is damaged.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = parse_quantization_config(settings, "the checkpoint").as_json()
        self.quant_method = hf.QuantizationMethod.COMPRESSED_TENSORS

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as JSON, for config.json."""
        return {**self.settings}


def _packed_or_other(other: Any) -> type:
    """Returns a stand-in for transformers' class `other`, which makes `PackedConfig`s where it can."""

    class CompressedTensorsConfig(other):  # type: ignore[misc]
        makes_packed_configs = True

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            raw = config_dict.get("quantization_config", config_dict)
            kind = PackedConfig if is_supported(raw) else other
            return kind.from_dict(raw, **kwargs)

    return CompressedTensorsConfig


def patch_config_loading(module: Any) -> None:
    """Makes transformers use our configs for the formats that we load; may be called again.

    Args:
        module: `transformers.quantizers.auto`.
    """
    configs = module.AUTO_QUANTIZATION_CONFIG_MAPPING
    configs["gptq"] = GPTQConfig
    if not getattr(configs[METHOD], "makes_packed_configs", False):
        configs[METHOD] = _packed_or_other(configs[METHOD])
    if getattr(module.AutoQuantizationConfig.from_dict, "is_ours", False):
        return
    from_dict = module.AutoQuantizationConfig.from_dict
    supports = module.AutoHfQuantizer.supports_quant_method

    def read_config(raw: Any) -> Any:
        return from_dict(_standard_spelling(raw))

    read_config.is_ours = True  # type: ignore[attr-defined]
    module.AutoQuantizationConfig.from_dict = staticmethod(read_config)
    module.AutoHfQuantizer.supports_quant_method = staticmethod(
        lambda raw: supports(_standard_spelling(raw))
    )


def _standard_spelling(raw: Any) -> Any:
    """Returns the config of a GPTQ checkpoint as transformers spells it; others are unchanged."""
    if not isinstance(raw, dict) or not {"quant_method", "method", "bits"} & {*raw}:
        return raw
    if raw.get("load_in_4bit") or raw.get("load_in_8bit") or quantization_method(raw) != "gptq":
        return raw
    return parse_quantization_config(raw, "the checkpoint").as_json()


def read_old_files(kind: Any) -> None:
    """Makes a class of configs read quantize_config.json where config.json has no quantization config.

    May be called again.

    Args:
        kind: transformers' class of all configs.
    """
    read = kind.get_config_dict.__func__
    if getattr(read, "reads_old_files", False):
        return

    def get_config_dict(cls: Any, folder: Any, /, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        config, others = read(cls, folder, **kwargs)
        has_config = any(
            "quantization_config" in each for each in (config, config.get("text_config") or {})
        )
        if (
            config
            and not has_config
            and Path(folder).is_dir()
            and (Path(folder) / OLD_FILE).is_file()
        ):
            files = Path(folder).glob("*.safetensors")
            if any(is_packed(read_header(file)) for file in files):
                config["quantization_config"] = read_json(Path(folder) / OLD_FILE)
        return config, others

    get_config_dict.reads_old_files = True  # type: ignore[attr-defined]
    kind.get_config_dict = classmethod(get_config_dict)
