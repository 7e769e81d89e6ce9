"""AutoGPTQ's two classes, for scripts written for it: change one import.

    from roundwise.compat.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

AutoGPTQ is archived; hundreds of tutorials use it. Names, arguments and defaults are its own, the work
is ours: the default recipe, streamed from disk. What has no meaning here is named in a warning.
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

from roundwise.checkpoint.hub import local_folder
from roundwise.config import QuantizeConfig
from roundwise.errors import ConfigError, OutputError
from roundwise.inference.load import load
from roundwise.run.api import quantize
from roundwise.system.device import parse_device

__all__ = ["AutoGPTQForCausalLM", "BaseQuantizeConfig"]


@dataclass
class BaseQuantizeConfig:
    """AutoGPTQ's settings with its defaults: per channel, act-order."""

    bits: int = 4
    group_size: int = -1
    damp_percent: float = 0.01
    desc_act: bool = True
    static_groups: bool = False
    sym: bool = True
    true_sequential: bool = True
    model_seqlen: int | None = None
    """Tokens of an example, at most; None: as long as the examples are."""
    model_name_or_path: str | None = None
    model_file_base_name: str | None = None

    def config(self) -> QuantizeConfig:
        """Our settings."""
        # Over static groups act-order needs no g_idx: it is an order here, not a kind of file.
        order: dict[str, Any] = {"order": "static"} if self.static_groups else {}
        return QuantizeConfig(
            bits=self.bits, group_size=self.group_size, damp_percent=self.damp_percent,
            desc_act=self.desc_act and not self.static_groups, sym=self.sym, **order,
        )  # fmt: skip


class AutoGPTQForCausalLM:
    """A model before or after quantization; made by `from_pretrained` or `from_quantized`.

    Anything that is not here is looked up on the transformers model, `model`.
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
        """A model to be quantized. Nothing is loaded: quantizing streams it from the disk."""
        _no_remote_code(trust_remote_code)
        _pointless(others, {"max_memory", "low_cpu_mem_usage", "device_map", "use_safetensors"})
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
        """Any GPTQ checkpoint, ready to run."""
        _no_remote_code(trust_remote_code)
        if not use_safetensors:
            raise ConfigError("use_safetensors=False: pickled weights are not read; convert them")
        pointless = {
            "use_triton", "inject_fused_attention", "inject_fused_mlp", "use_cuda_fp16",
            "disable_exllama", "disable_exllamav2", "use_marlin", "use_tritonv2", "warmup_triton",
            "low_cpu_mem_usage", "model_basename", "quantize_config", "max_memory", "strict",
            "trainable",
        }  # fmt: skip
        _pointless(others, pointless)
        where = device if device is not None else device_map
        if isinstance(where, dict):
            where = next(iter(where.values()))
        name = f"cuda:{where}" if isinstance(where, int) else str(where or "auto")
        found = cls(local_folder(model_name_or_path), None, dtype=torch_dtype)
        found._options["device"] = parse_device(name)
        _ = found.model  # errors now, not at the first token
        return found

    def quantize(
        self, examples: Sequence[Any], batch_size: int = 1, **others: Any
    ) -> AutoGPTQForCausalLM:
        """Quantizes into a temporary folder, which `save_quantized` copies.

        Args:
            examples: dicts with `input_ids` and `attention_mask`, texts, or lists of token ids.
            batch_size: examples that go through the model together.
            others: AutoGPTQ's `use_triton`, `cache_examples_on_gpu` and the like.
        """
        _pointless(
            others,
            {
                "use_triton",
                "use_cuda_fp16",
                "autotune_warmup_after_quantized",
                "cache_examples_on_gpu",
            },
        )
        if self.quantize_config is None:
            raise ConfigError("this model is quantized already")
        scratch = Path(tempfile.mkdtemp(prefix="roundwise-"))
        weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        length = self.quantize_config.model_seqlen or max(map(_length, examples), default=1)
        quantize(
            self._source, scratch, self.quantize_config.config(), list(examples),
            samples=max(1, len(examples)), seq_len=length, batch_size=batch_size,
        )  # fmt: skip
        self._source, self.quantized = scratch, True
        self._model = None
        return self

    def save_quantized(self, save_dir: str, use_safetensors: bool = True, **others: Any) -> None:
        """Writes the quantized checkpoint, complete, to a folder."""
        _pointless(others, {"safetensors_metadata", "model_base_name"})
        if not use_safetensors:
            raise ConfigError("use_safetensors=False: pickled weights are not written")
        if not self.quantized:
            raise ConfigError("nothing is quantized yet: call quantize(examples) first")
        if (Path(save_dir) / "config.json").exists():
            raise OutputError(f"{save_dir} already holds a model: give another folder")
        shutil.copytree(self._source, save_dir, dirs_exist_ok=True)

    save_pretrained = save_quantized

    @property
    def model(self) -> Any:
        """The transformers model: the original before `quantize`, the packed one after it."""
        if self._model is None:
            self._model, _ = load(self._source, **self._options)
        return self._model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`."""
        return self.model.generate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.model, name)


def _length(example: Any) -> int:
    """Tokens of an example; of a text, at most its characters."""
    ids = example["input_ids"] if hasattr(example, "keys") else example
    return len(ids) if isinstance(ids, str) else int(torch.as_tensor(ids).numel())


def _no_remote_code(trusted: bool) -> None:
    if trusted:
        raise ConfigError("trust_remote_code=True: code that comes with a model is never run here")


def _pointless(given: dict[str, Any], known: set[str]) -> None:
    """Names what is passed over; refuses what AutoGPTQ does not have either."""
    unknown = set(given) - known
    if unknown:
        raise ConfigError(f"there is no argument {', '.join(sorted(unknown))}")
    # What merely switches something off is as it wishes.
    said = sorted(name for name, value in given.items() if value not in (None, False))
    if said:
        warnings.warn(
            f"{', '.join(said)}: not needed here, and passed over (roundwise.compat.auto_gptq)",
            UserWarning,
            stacklevel=3,
        )
