"""AutoGPTQ's two classes, so that scripts written for it run after changing one import:

    from roundwise.compat.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

AutoGPTQ is archived, but hundreds of tutorials use it. Names, arguments and defaults are AutoGPTQ's; the
work is done by roundwise, with its default recipe, streamed from disk. Arguments that have no meaning
here are ignored with a warning that names them.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from roundwise.config import QuantizeConfig
from roundwise.errors import ConfigError, OutputError
from roundwise.inference.load import load
from roundwise.run.api import quantize
from roundwise.system.device import parse_device
from roundwise.system.hub import local_folder

__all__ = ["AutoGPTQForCausalLM", "BaseQuantizeConfig"]


@dataclass
class BaseQuantizeConfig:
    """AutoGPTQ's settings, with its defaults: one group per output channel, act-order."""

    bits: int = 4
    group_size: int = -1
    damp_percent: float = 0.01
    desc_act: bool = True
    static_groups: bool = False
    sym: bool = True
    true_sequential: bool = True
    model_seqlen: int | None = None
    """Maximum tokens of an example; None: the length of the longest example."""
    model_name_or_path: str | None = None
    model_file_base_name: str | None = None

    def config(self) -> QuantizeConfig:
        """Returns the equivalent settings of roundwise."""
        # With static groups, act-order needs no g_idx: only the order of solving changes, not the file.
        order: dict[str, Any] = {"order": "static"} if self.static_groups else {}
        return QuantizeConfig(
            bits=self.bits, group_size=self.group_size, damp_percent=self.damp_percent,
            desc_act=self.desc_act and not self.static_groups, sym=self.sym, **order,
        )  # fmt: skip


class AutoGPTQForCausalLM:
    """A model before or after quantization; create it with `from_pretrained` or `from_quantized`.

    Attributes that this class does not have are those of the transformers model (`model`).
    """

    def __init__(
        self, source: Path, quantize_config: BaseQuantizeConfig | None, **options: Any
    ) -> None:
        self.quantize_config = quantize_config
        self.quantized = quantize_config is None
        self._source, self._options = source, options
        self._model: Any = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        quantize_config: BaseQuantizeConfig,
        *,
        torch_dtype: torch.dtype | str = "auto",
        trust_remote_code: bool = False,
        **others: Any,
    ) -> AutoGPTQForCausalLM:
        """Returns a model to be quantized. It is not loaded: `quantize` streams it from disk.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            quantize_config: settings.
            torch_dtype: dtype of `model`.
            trust_remote_code: must be False.
            others: AutoGPTQ's other arguments; they are ignored with a warning.

        Raises:
            ConfigError: trust_remote_code=True, or an argument that AutoGPTQ does not have.
            CheckpointError: there is no such model.
        """
        _refuse_remote_code(trust_remote_code)
        _warn_ignored(others, {"max_memory", "low_cpu_mem_usage", "device_map", "use_safetensors"})
        return cls(local_folder(pretrained_model_name_or_path), quantize_config, dtype=torch_dtype)

    @classmethod
    def from_quantized(
        cls,
        model_name_or_path: str,
        *,
        device: str | int | torch.device | None = None,
        device_map: str | dict[str, Any] | None = None,
        torch_dtype: torch.dtype | str = "auto",
        use_safetensors: bool = True,
        trust_remote_code: bool = False,
        **others: Any,
    ) -> AutoGPTQForCausalLM:
        """Loads any GPTQ checkpoint.

        Args:
            model_name_or_path: folder or hub id.
            device: such as "cpu", "cuda:0" or 0; None: `device_map`.
            device_map: of a dict, the first device is used for the whole model.
            torch_dtype: dtype of activations and of unquantized weights.
            use_safetensors: must be True.
            trust_remote_code: must be False.
            others: AutoGPTQ's other arguments; they are ignored with a warning.

        Raises:
            ConfigError: an argument that is not supported, or that AutoGPTQ does not have.
            CheckpointError: no such model, damaged files, or another quantization format.
        """
        _refuse_remote_code(trust_remote_code)
        if not use_safetensors:
            raise ConfigError(
                "use_safetensors=False: pickled weights are not read; convert them to safetensors"
            )
        ignored = {
            "use_triton", "inject_fused_attention", "inject_fused_mlp", "use_cuda_fp16",
            "disable_exllama", "disable_exllamav2", "use_marlin", "use_tritonv2", "warmup_triton",
            "low_cpu_mem_usage", "model_basename", "quantize_config", "max_memory", "strict",
            "trainable",
        }  # fmt: skip
        _warn_ignored(others, ignored)
        target = device if device is not None else device_map
        if isinstance(target, dict):
            target = next(iter(target.values()))
        name = f"cuda:{target}" if isinstance(target, int) else str(target or "auto")
        quantized = cls(
            local_folder(model_name_or_path), None, dtype=torch_dtype, device=parse_device(name)
        )
        _ = quantized.model  # load it now, so that errors occur here
        return quantized

    def quantize(
        self, examples: Sequence[Any], batch_size: int = 1, **others: Any
    ) -> AutoGPTQForCausalLM:
        """Quantizes the model into a temporary folder; `save_quantized` copies it.

        Args:
            examples: dicts with `input_ids` and `attention_mask`, texts, or lists of token ids.
            batch_size: examples in one forward.
            others: AutoGPTQ's other arguments; they are ignored with a warning.

        Returns:
            This object, which now has the quantized model.

        Raises:
            ConfigError: the model is already quantized, or an argument that AutoGPTQ does not have.
        """
        _warn_ignored(
            others,
            {
                "use_triton",
                "use_cuda_fp16",
                "autotune_warmup_after_quantized",
                "cache_examples_on_gpu",
            },
        )
        if self.quantize_config is None:
            raise ConfigError("this model is already quantized")
        scratch = Path(tempfile.mkdtemp(prefix="roundwise-"))
        weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        length = self.quantize_config.model_seqlen or max(map(_token_count, examples), default=1)
        quantize(
            self._source, scratch, self.quantize_config.config(), list(examples),
            samples=max(1, len(examples)), seq_len=length, batch_size=batch_size,
        )  # fmt: skip
        self._source, self.quantized = scratch, True
        self._model = None
        return self

    def save_quantized(self, save_dir: str, use_safetensors: bool = True, **others: Any) -> None:
        """Writes the complete quantized checkpoint to a folder.

        Args:
            save_dir: folder; created if it does not exist.
            use_safetensors: must be True.
            others: AutoGPTQ's other arguments; they are ignored with a warning.

        Raises:
            ConfigError: nothing is quantized yet, or an argument that is not supported.
            OutputError: the folder already has a model.
        """
        _warn_ignored(others, {"safetensors_metadata", "model_base_name"})
        if not use_safetensors:
            raise ConfigError("use_safetensors=False: pickled weights are not written")
        if not self.quantized:
            raise ConfigError("nothing is quantized yet: call quantize(examples) first")
        if (Path(save_dir) / "config.json").exists():
            raise OutputError(f"{save_dir} already has a model: choose another folder")
        shutil.copytree(self._source, save_dir, dirs_exist_ok=True)

    save_pretrained = save_quantized

    @property
    def model(self) -> Any:
        """The transformers model, loaded at first access: the original, or the quantized one."""
        if self._model is None:
            self._model, _ = load(self._source, **self._options)
        return self._model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model's `generate`."""
        return self.model.generate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model's forward."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.model, name)


def _token_count(example: Any) -> int:
    """Returns the number of tokens of an example; for a text, its number of characters."""
    ids = example["input_ids"] if hasattr(example, "keys") else example
    return len(ids) if isinstance(ids, str) else int(torch.as_tensor(ids).numel())


def _refuse_remote_code(trust_remote_code: bool) -> None:
    if trust_remote_code:
        raise ConfigError("trust_remote_code=True: code that comes with a model is never run here")


def _warn_ignored(given: dict[str, Any], known: set[str]) -> None:
    """Warns about arguments that have no effect.

    Args:
        given: arguments of the caller.
        known: arguments of AutoGPTQ that have no effect here.

    Raises:
        ConfigError: AutoGPTQ has no such argument.
    """
    unknown = set(given) - known
    if unknown:
        raise ConfigError(f"there is no argument {', '.join(sorted(unknown))}")
    # None and False only switch something off, which is the case anyway.
    ignored = sorted(name for name, value in given.items() if value not in (None, False))
    if ignored:
        warnings.warn(
            f"{', '.join(ignored)}: not needed here, and ignored (roundwise.compat.auto_gptq)",
            UserWarning,
            stacklevel=3,
        )
