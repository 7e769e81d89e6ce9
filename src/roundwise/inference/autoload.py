"""Why `import roundwise` is enough for transformers to load GPTQ checkpoints, and costs nothing.

Transformers looks quantizers up in a mapping. Importing it takes seconds, so the entry is made when
transformers is imported, and the class behind it is loaded when a checkpoint is.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

AUTO = "transformers.quantizers.auto"


def register() -> None:
    """Makes transformers load GPTQ checkpoints with us, now or as soon as it is imported."""
    if AUTO in sys.modules:
        _enter(sys.modules[AUTO])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _enter(module: ModuleType) -> None:
    module.AUTO_QUANTIZER_MAPPING["gptq"] = _quantizer


def _quantizer(*args: Any, **kwargs: Any) -> Any:
    """Transformers' call for a quantizer of the format."""
    from roundwise.inference.plugin import RoundwiseHfQuantizer

    return RoundwiseHfQuantizer(*args, **kwargs)


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for one module, has the others find it, and stays behind its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _enter(module)
