"""Lets PEFT put LoRA adapters on QuantLinear layers, with PEFT's own class for GPTQ layers.

PEFT chooses the adapter class of a layer by trying a list of dispatch functions, one for each library's
layers. It offers no permanent registration of others (`LoraConfig._register_custom_module` holds for one
config only), so we wrap its function for GPTQ layers when PEFT is imported (import_hooks.py).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from roundwise.inference.quant_linear import QuantLinear


def patch_peft(module: ModuleType) -> None:
    """Wraps PEFT's `dispatch_gptq` so that it accepts QuantLinear too; a second call does nothing.

    Args:
        module: PEFT's module that calls `dispatch_gptq` (`peft.tuners.lora.model`).
    """
    original = getattr(module, "dispatch_gptq", None)
    if original is None or hasattr(original, "accepts_quant_linear"):
        return

    def dispatch_gptq(target: Any, adapter_name: str, **settings: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if not isinstance(base, QuantLinear):
            return original(target, adapter_name, **settings)
        from peft.tuners.lora.gptq import GPTQLoraLinear

        # PEFT reads these old names of the sizes, and takes the device from qweight, so the kernel has
        # to return it. The next forward prepares the layer again.
        base.infeatures, base.outfeatures = base.in_features, base.out_features  # type: ignore[assignment]
        base.unprepare()
        return GPTQLoraLinear(target, adapter_name, **settings)

    dispatch_gptq.accepts_quant_linear = True  # type: ignore[attr-defined]
    module.dispatch_gptq = dispatch_gptq  # type: ignore[attr-defined]
