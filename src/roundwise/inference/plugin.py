"""The hook into transformers: `from_pretrained` of any GPTQ checkpoint builds QuantLinear layers.

transformers' own class for the format needs two other packages. Ours takes its place in the mapping
that transformers looks quantizers up in, and decides by the tensors in the files, not by what the
config promises, which layers are quantized and how wide their codes are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from roundwise.errors import CheckpointError
from roundwise.inference import adapters
from roundwise.inference.qlinear import QuantLinear
from roundwise.models.checkpoint import TensorInfo, read_header
from roundwise.models.formats import infer_bits
from roundwise.models.skeleton import weight_of


class RoundwiseHfQuantizer(HfQuantizer):  # type: ignore[misc]  # untyped there
    """Loads `quant_method: gptq` without optimum or gptqmodel; quantizing is `roundwise.quantize`."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        files = kwargs.get("checkpoint_files")
        if not files:
            raise CheckpointError("a GPTQ checkpoint can only be loaded from safetensors files")
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            tensors |= read_header(Path(file))
        version = getattr(self.quantization_config, "format", "gptq")
        replace_linears(model, tensors, zero_offset=1 if version == "gptq" else 0)
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear) and module.g_idx is not None:
                low, high = int(module.g_idx.min()), int(module.g_idx.max())
                if low < 0 or high >= module.groups:
                    raise CheckpointError(
                        f"{name}.g_idx names groups {low} … {high}; there are {module.groups}"
                    )
            if isinstance(module, QuantLinear) and module.qweight.device.type != "meta":
                module.prepare()
        return model

    def is_serializable(self) -> bool:
        """A state dict of QuantLinear layers is a checkpoint in the same format."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients reach the input, so adapters can be trained; the codes stay."""
        return True


def register() -> None:
    """Makes transformers load GPTQ checkpoints with us, and PEFT train adapters on them.

    Calling it again does nothing.
    """
    AUTO_QUANTIZER_MAPPING["gptq"] = RoundwiseHfQuantizer
    adapters.register()


def replace_linears(
    model: PreTrainedModel, tensors: dict[str, TensorInfo], *, zero_offset: int
) -> None:
    """Puts a QuantLinear wherever the files hold a qweight.

    Raises:
        CheckpointError: a qweight that belongs to no module, or whose shape does not fit it.
    """
    prefix = f"{model.base_model_prefix}."
    for name in [t.removesuffix(".qweight") for t in tensors if t.endswith(".qweight")]:
        parts = {
            suffix: torch.empty(tensors[f"{name}.{suffix}"].shape, device="meta")
            for suffix in ("qweight", "qzeros", "scales")
            if f"{name}.{suffix}" in tensors
        }
        if len(parts) < 3:
            raise CheckpointError(f"{name} has a qweight, but qzeros or scales are missing")
        bits = infer_bits(parts, name)
        target = next(
            (n for n in (name, prefix + name, name.removeprefix(prefix)) if _has_module(model, n)),
            None,
        )
        if target is None:
            raise CheckpointError(f"the files hold {name}.qweight, but the model has no such layer")
        old = model.get_submodule(target)
        out_features, in_features = weight_of(old).shape
        if (in_features * bits, out_features) != (
            parts["qweight"].shape[0] * 32,
            parts["scales"].shape[1],
        ):
            raise CheckpointError(
                f"{name}.qweight {list(parts['qweight'].shape)} does not fit a layer of "
                f"{in_features} to {out_features} channels"
            )
        with torch.device("meta"):
            new = QuantLinear(
                in_features,
                out_features,
                bits=bits,
                groups=parts["scales"].shape[0],
                bias=f"{name}.bias" in tensors,
                stored_g_idx=f"{name}.g_idx" in tensors,
                zero_offset=zero_offset,
                dtype=weight_of(old).dtype,
            )
            new.scales = new.scales.to(_scales_dtype(tensors[f"{name}.scales"]))
        model.set_submodule(target, new.train(old.training))


def _scales_dtype(info: TensorInfo) -> torch.dtype:
    return {"BF16": torch.bfloat16, "F32": torch.float32}.get(info.dtype, torch.float16)


def _has_module(model: PreTrainedModel, name: str) -> bool:
    try:
        return hasattr(model.get_submodule(name), "weight")
    except AttributeError:
        return False
