"""Encodes chats with pictures or sounds, by the model's own processor.

It turns a chat into tokens and pixel values, so that the language model sees what it will see.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from roundwise.calibration.media import kind_of, parts_of
from roundwise.calibration.records import Chat
from roundwise.calibration.windows import Window
from roundwise.errors import CalibrationError, first_line


def encode_chat(
    chat: Chat, processor: Any, accepted: Callable[[str], bool] = lambda _: True
) -> Window:
    """Returns the window of a chat with pictures or sounds, as the model's processor encodes it.

    Args:
        chat: the chat; its media are read now.
        processor: transformers processor of the model.
        accepted: tells whether the model's forward takes an input of this name.

    Raises:
        CalibrationError: a file cannot be read, or the processor cannot encode the chat.
    """
    with _named_place(chat):
        rate = getattr(getattr(processor, "feature_extractor", None), "sampling_rate", None)
        messages = [dict(message) for message in chat.messages]
        for message in messages:
            if isinstance(message.get("content"), list):
                message["content"] = [_loaded(part, rate) for part in parts_of(message)]
        encoded = processor.apply_chat_template(
            messages, tools=chat.tools, tokenize=True, return_dict=True, return_tensors="pt"
        )
        tokens = encoded["input_ids"][0].tolist()
        inputs = {
            name: value
            for name, value in encoded.items()
            if name not in ("input_ids", "attention_mask") and accepted(name)
            if isinstance(value, torch.Tensor)
        }
    return Window(tokens, inputs=inputs)


@contextmanager
def _named_place(chat: Chat) -> Iterator[None]:
    """Context manager: any error says which chat it is about."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # of Pillow, wave, numpy, templates and processors
        place = chat.place or "a chat of the calibration"
        raise CalibrationError(f"{place} cannot be encoded: {first_line(error)}") from error


def _loaded(part: Any, rate: int | None) -> Any:
    """Returns a part with its medium read."""
    kind = kind_of(part)
    if kind is None:
        return part
    return {"type": kind, kind: {"image": _image, "audio": _audio}[kind](part[kind], rate)}


def _image(source: Any, _: int | None) -> Any:
    """Returns a picture in RGB."""
    from PIL import Image

    if isinstance(source, bytes | Path):
        source = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    return source.convert("RGB")


def _audio(source: Any, rate: int | None) -> Any:
    """Returns the samples of a WAV file of 16 bits, one channel, between -1 and 1.

    Raises:
        CalibrationError: it is another kind of file, or its rate is not that of the model.
    """
    if not isinstance(source, bytes | Path):
        return source
    with wave.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as file:
        if file.getsampwidth() != 2:
            raise CalibrationError("a WAV file must have samples of 16 bits")
        if rate is not None and file.getframerate() != rate:
            raise CalibrationError(
                f"a WAV file has {file.getframerate()} samples per second, but the model takes {rate}"
            )
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
        return samples.reshape(-1, file.getnchannels()).mean(1).astype(np.float32) / 32768
