"""Why `import roundwise` is enough for transformers and PEFT to know GPTQ layers, and costs nothing.

Transformers looks quantizers up in a mapping, PEFT the classes of its adapters in a chain of functions.
Importing either takes seconds, so the entries are made when they are imported, and what is behind them
is loaded when a checkpoint is.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

AUTO = "transformers.quantizers.auto"
LORA = "peft.tuners.lora.model"

#: What is done with a module once it is imported.
Then = Callable[[ModuleType], None]


def register() -> None:
    """Makes transformers load GPTQ checkpoints with us, and PEFT adapt them, now or once imported."""
    _when_imported(AUTO, _enter)
    _when_imported(LORA, _teach)


def _enter(module: ModuleType) -> None:
    module.AUTO_QUANTIZER_MAPPING["gptq"] = _quantizer


def _quantizer(*args: Any, **kwargs: Any) -> Any:
    """Transformers' call for a quantizer of the format."""
    from roundwise.inference.hf_quantizer import RoundwiseHfQuantizer

    return RoundwiseHfQuantizer(*args, **kwargs)


def _teach(module: ModuleType) -> None:
    from roundwise.inference import peft_patch

    peft_patch.patch_peft(module)


def _when_imported(name: str, then: Then) -> None:
    if name in sys.modules:
        then(sys.modules[name])
    elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, then))


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for one module, has the others find it, and stays behind its loader."""

    def __init__(self, name: str, then: Then) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.then)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, then: Then) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.then(module)
