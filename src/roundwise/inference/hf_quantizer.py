"""The hook into transformers: `from_pretrained` of any GPTQ checkpoint builds QuantLinear layers.

transformers' own class for the format needs two other packages. Ours takes its place (autoload.py), and
decides by the tensors in the files, not by what the config promises, which layers are quantized and how
wide their codes are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from roundwise.checkpoint.reader import TensorInfo, read_header
from roundwise.errors import CheckpointError
from roundwise.inference.cpu.attention import use_grouped_attention
from roundwise.inference.cpu.mmap_embedding import MappedFiles, keep_embeddings_on_disk
from roundwise.inference.cpu.streamed_linear import stream_large
from roundwise.inference.quant_linear import QuantLinear
from roundwise.inference.replace_modules import replace_linears


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
        files = MappedFiles()
        for name, module in model.named_modules():
            if not isinstance(module, QuantLinear) or module.qweight.device.type == "meta":
                continue  # not ours, or left in its file until it is needed
            if module.g_idx is not None:
                low, high = int(module.g_idx.min()), int(module.g_idx.max())
                if low < 0 or high >= module.groups:
                    raise CheckpointError(
                        f"{name}.g_idx names groups {low} … {high}; there are {module.groups}"
                    )
            stored = [module.qweight, module.qzeros, module.scales]
            module.prepare()
            files.release(stored)
        keep_embeddings_on_disk(model, files)
        stream_large(model)
        use_grouped_attention(model)
        return model

    def is_serializable(self) -> bool:
        """A state dict of QuantLinear layers is a checkpoint in the same format."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients reach the input, so adapters can be trained; the codes stay."""
        return True
