"""Quantizer plug-in for transformers: `from_pretrained` builds QuantLinear layers for packed weights.

transformers' own quantizer for GPTQ needs two other packages (optimum and gptqmodel), that for
compressed-tensors decodes the weights; import_hooks.py registers ours in their place. Which layers are
quantized, and how wide their codes are, is read from the tensors in the files, not from the config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from roundwise.checkpoint.quantization_config import parse_quantization_config
from roundwise.checkpoint.quantized_layers import find_layers
from roundwise.checkpoint.reader import TensorInfo, read_header
from roundwise.errors import CheckpointError
from roundwise.inference.cpu.attention import use_grouped_attention
from roundwise.inference.cpu.mmap_embedding import MappedFiles, use_mmap_embeddings
from roundwise.inference.cpu.streamed_linear import use_streamed_linears
from roundwise.inference.quant_linear import QuantLinear
from roundwise.inference.replace_modules import replace_linears


class RoundwiseHfQuantizer(HfQuantizer):  # type: ignore[misc]  # untyped there
    """Loads `quant_method` gptq and compressed-tensors (pack-quantized) without other packages.

    It only loads checkpoints; `roundwise.quantize` makes them.
    """

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        files = kwargs.get("checkpoint_files")
        if not files:
            raise CheckpointError(
                "a quantized checkpoint can only be loaded from safetensors files"
            )
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            tensors |= read_header(Path(file))
        config = parse_quantization_config(self.quantization_config.to_dict(), "the checkpoint")
        with torch.device("cpu"):  # transformers builds models on the meta device
            layers = find_layers(tensors, config)
            for layer in layers:
                layer.check()
        replace_linears(model, layers)
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        mapped = MappedFiles()
        for module in model.modules():
            if not isinstance(module, QuantLinear) or module.file_codes.device.type == "meta":
                continue  # on the meta device: offloaded to disk, loaded for each forward
            *tensors, g_idx = module.FILE_TENSORS
            if getattr(module, g_idx) is not None:
                setattr(module, g_idx, getattr(module, g_idx).to(torch.int32))
            stored = [getattr(module, name) for name in tensors]
            module.prepare()
            mapped.release([tensor for tensor in stored if tensor is not None])
        use_mmap_embeddings(model, mapped)
        use_streamed_linears(model)
        use_grouped_attention(model)
        return model

    def is_serializable(self) -> bool:
        """Returns True: a state dict of QuantLinear layers is a checkpoint in the same format."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: gradients reach the inputs, so adapters can be trained; the codes never change."""
        return True
