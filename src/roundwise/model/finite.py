"""Finds weights that are not finite before a run begins, with the row they are in."""

from __future__ import annotations

import torch

from roundwise.checkpoint.reader import CHUNK, DTYPES, TensorInfo
from roundwise.config import QuantizeConfig
from roundwise.errors import CheckpointError
from roundwise.model.streamed import StreamedModel


def check_finite(streamed: StreamedModel, config: QuantizeConfig) -> None:
    """Checks all parameters that are carried to the result as they are: head, norms, embeddings.

    The weights that are quantized are checked when they are solved, or here too if the run
    transforms them before.

    Args:
        streamed: the model, as in its files.
        config: settings of the run.

    Raises:
        CheckpointError: a parameter holds NaN or infinity.
    """
    solved = {
        f"{name}.weight"
        for block in streamed.blocks
        for name in block.linears
        if config.for_module(name) is not None and not config.rotate
    }
    parameters = {name for name, _ in streamed.model.named_parameters(remove_duplicate=False)}
    names = {
        key: name
        for name, key in streamed.checkpoint_name_of.items()
        if name in parameters and name not in solved
    }
    for key in names:
        info = streamed.checkpoint.tensors[key]
        position = first_not_finite(info)
        if position is not None:
            is_matrix = len(info.shape) > 1
            place = f"row {position // info.shape[-1]}" if is_matrix else f"entry {position}"
            raise CheckpointError(
                f"{key} holds NaN or infinity ({place}): the model is damaged, fetch it again or "
                "repair it"
            )


def first_not_finite(info: TensorInfo) -> int | None:
    """Returns the position of the first number that is NaN or infinite; None: all are finite.

    Reads a few megabytes at a time. Tensors of integers and of 8-bit numbers are not looked at.
    """
    dtype = DTYPES.get(info.dtype)
    if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
        return None
    begin = 0
    for chunk in info.chunks():
        values = torch.frombuffer(bytearray(chunk), dtype=dtype)
        # One pass: a sum is finite only if all terms are. It may overflow too, so that is looked at.
        if not bool(values.sum(dtype=torch.float32).isfinite()):
            wrong = ~values.isfinite()
            if bool(wrong.any()):
                return begin + int(wrong.int().argmax())
        begin += CHUNK // dtype.itemsize
    return None
