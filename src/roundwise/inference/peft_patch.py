"""PEFT: LoRA adapters on QuantLinear layers, with PEFT's own class for GPTQ layers.

PEFT looks up the class of a layer in a chain of functions, each of which knows one library's layers;
there is no place to enter others for good (`LoraConfig._register_custom_module` is for one config).
So the link of the chain that is for GPTQ learns about ours, when PEFT is imported (autoload.py).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from roundwise.inference.quant_linear import QuantLinear


def patch_peft(module: ModuleType) -> None:
    """The function for GPTQ layers in PEFT's chain takes ours too; doing it again does nothing.

    Args:
        module: where PEFT keeps the chain.
    """
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
