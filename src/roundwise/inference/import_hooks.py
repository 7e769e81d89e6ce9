"""Registers our classes with transformers and PEFT, without importing either.

Importing transformers or PEFT takes seconds, so `import roundwise` only adds import hooks: an entry in
`sys.meta_path` for each module that needs a change. The hook patches the module when it is imported:

    transformers.quantizers.auto    the quantizer of gptq and compressed-tensors is ours
                                    (hf_quantizer.py), and so is the reader of their configs
                                    (hf_config.py)
    transformers.configuration_utils
                                    settings in quantize_config.json are found (hf_config.py)
    peft.tuners.lora.model          LoRA adapters accept QuantLinear layers (peft_patch.py)

A module that is imported already is patched at once.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

TRANSFORMERS_MODULE = "transformers.quantizers.auto"
CONFIG_MODULE = "transformers.configuration_utils"
PEFT_MODULE = "peft.tuners.lora.model"

#: A function that patches a module after its import.
Patch = Callable[[ModuleType], None]


def register() -> None:
    """Makes transformers load packed checkpoints with our quantizer, and PEFT accept QuantLinear.

    Takes effect now for modules that are imported, otherwise at their import. May be called again.
    """
    _patch_after_import(TRANSFORMERS_MODULE, _register_quantizer)
    _patch_after_import(CONFIG_MODULE, _read_old_files)
    _patch_after_import(PEFT_MODULE, _patch_peft)


def _register_quantizer(module: ModuleType) -> None:
    from roundwise.inference import hf_config

    quantizers = module.AUTO_QUANTIZER_MAPPING
    for method in ("gptq", "compressed-tensors"):
        if not isinstance(quantizers[method], QuantizerFactory):
            quantizers[method] = QuantizerFactory(quantizers[method])
    hf_config.patch_config_loading(module)


def _read_old_files(module: ModuleType) -> None:
    from roundwise.inference import hf_config

    hf_config.read_old_files(module.PreTrainedConfig)


class QuantizerFactory:
    """Creates the quantizer of a config: stands in for the class, whose import takes seconds.

    Args:
        other: transformers' own class, for configs that are not ours.
    """

    def __init__(self, other: Any) -> None:
        self.other = other

    def __call__(self, config: Any, **settings: Any) -> Any:
        """Returns our quantizer, or that of transformers."""
        from transformers.utils.quantization_config import CompressedTensorsConfig

        from roundwise.inference.hf_quantizer import RoundwiseHfQuantizer

        is_other = isinstance(config, CompressedTensorsConfig)  # ours is a `PackedConfig`
        return (self.other if is_other else RoundwiseHfQuantizer)(config, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.other, name)


def _patch_peft(module: ModuleType) -> None:
    from roundwise.inference import peft_patch

    peft_patch.patch_peft(module)


def _patch_after_import(name: str, patch: Patch) -> None:
    """Patches a module now if it is imported, otherwise adds a finder that does so at its import."""
    if name in sys.modules:
        patch(sys.modules[name])
    elif not any(
        isinstance(finder, PatchFinder) and finder.name == name for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, PatchFinder(name, patch))


class PatchFinder(importlib.abc.MetaPathFinder):
    """Import finder for one module: lets the other finders find it, and wraps its loader.

    Removes itself from `sys.meta_path` when the module is looked up.
    """

    def __init__(self, name: str, patch: Patch) -> None:
        self.name, self.patch = name, patch

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns the module's spec with our loader; None for every other module."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = PatchLoader(spec.loader, self.patch)
        return spec


class PatchLoader(importlib.abc.Loader):
    """Import loader: executes a module with its own loader, then patches it."""

    def __init__(self, loader: importlib.abc.Loader, patch: Patch) -> None:
        self.loader, self.patch = loader, patch

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Creates the module as its own loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Executes the module, then patches it."""
        self.loader.exec_module(module)
        self.patch(module)
