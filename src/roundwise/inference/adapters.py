"""PEFT: LoRA adapters on QuantLinear layers, with PEFT's own class for GPTQ layers.

PEFT looks up the class of a layer in a chain of functions, each of which knows one library's layers;
there is no place to enter others for good (`LoraConfig._register_custom_module` is for one config).
So the link of the chain that is for GPTQ learns about ours: at once where PEFT is imported already, and
otherwise when it is. `import roundwise` and loading a model never import PEFT.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from roundwise.inference.qlinear import QuantLinear

#: Where PEFT keeps the chain.
HOME = "peft.tuners.lora.model"


def register() -> None:
    """Makes `get_peft_model` and `PeftModel.from_pretrained` work; calling it again does nothing."""
    module = sys.modules.get(HOME)
    if module is not None:
        _teach(module)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(MetaPathFinder):
    """Waits for one import, adds to it, and is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != HOME:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _teach(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _teach(module: ModuleType) -> None:
    """The function for GPTQ layers in PEFT's chain takes ours too."""
    theirs = getattr(module, "dispatch_gptq", None)
    if theirs is None or hasattr(theirs, "knows_roundwise"):
        return

    def dispatch_gptq(target: Any, adapter_name: str, **settings: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if not isinstance(base, QuantLinear):
            return theirs(target, adapter_name, **settings)
        from peft.tuners.lora.gptq import GPTQLoraLinear

        # What PEFT asks a GPTQ layer for: sizes by their old names, and a device by its qweight. The
        # next product prepares the layer again.
        base.infeatures, base.outfeatures = base.in_features, base.out_features  # type: ignore[assignment]
        base.unprepare()
        return GPTQLoraLinear(target, adapter_name, **settings)

    dispatch_gptq.knows_roundwise = True  # type: ignore[attr-defined]
    module.dispatch_gptq = dispatch_gptq  # type: ignore[attr-defined]
