"""Opens a GGUF file as a dense checkpoint, with names and values as transformers reads them.

The config and the tokenizer are made once and kept in a folder of their own. A tensor is dequantized
when it is read, one at a time; transformers' own loader has all of them in memory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from roundwise.checkpoint.reader import Checkpoint, TensorInfo
from roundwise.checkpoint.side_files import find_side_files
from roundwise.checkpoint.transformed_view import ComputedInfo
from roundwise.checkpoint.untrusted import check_config, file_state, read_json
from roundwise.checkpoint.writer import write_json
from roundwise.errors import CheckpointError
from roundwise.model.build import build, config_dtype, load_config, model_class
from roundwise.model.foreign_errors import foreign_errors
from roundwise.model.tokenizer import TOKENIZER_FILES

SUFFIX = ".gguf"
#: Types of tensors that are not quantized.
DENSE_TYPES = ("F64", "F32", "F16", "BF16")
#: Type that the dense model has if no config says otherwise.
DTYPE = torch.bfloat16


class _Made(NamedTuple):
    """A tensor of the model, and how it is made of tensors of the file."""

    name: str
    sources: list[str]
    compute: Callable[[], torch.Tensor]


def open_source(source: str | os.PathLike[str]) -> Checkpoint:
    """Opens a model to be quantized: a folder with safetensors, a GGUF file, or a folder with one.

    Raises:
        CheckpointError: as `Checkpoint`; there are several GGUF files, or transformers cannot read it.
    """
    path = Path(source)
    if path.is_file() and path.suffix.lower() == SUFFIX:
        return GgufCheckpoint(path)
    files = sorted(file for file in path.glob("*") if file.suffix.lower() == SUFFIX)
    if not files or any(path.glob("*.safetensors")):
        return Checkpoint(path)
    if len(files) > 1:
        raise CheckpointError(
            f"{path} has {len(files)} GGUF files and no safetensors: give the path of the one to use "
            f"(such as {files[0]})"
        )
    return GgufCheckpoint(files[0])


class GgufCheckpoint(Checkpoint):
    """A GGUF file, seen as a folder with config, tokenizer and dense tensors.

    Args:
        file: the file. A config and a tokenizer beside it are used instead of those in the file.

    Raises:
        CheckpointError: transformers cannot read it.
    """

    def __init__(self, file: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"roundwise-{file.stem[:40]}-"))
        self.config_file = "config.json"
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.files = [file]
        self._states = {file: file_state(file)}
        self._identity = None
        self.overrides: dict[str, Any] = {}
        with foreign_errors(f"transformers {transformers.__version__} cannot read {file}"):
            self._write_side_files(file)
        self.config = read_json(self.folder / self.config_file)
        check_config(self.config)
        config = load_config(self)
        dtype = config_dtype(self.config) or DTYPE
        self.config |= {
            "dtype": str(dtype).removeprefix("torch."),
            "architectures": [model_class(config).__name__],
        }
        write_json(self.folder / self.config_file, self.config)
        model = build(config, dtype)
        with foreign_errors(f"transformers {transformers.__version__} cannot read {file}"):
            self.tensors = _tensors(file, model, dtype)

    def _write_side_files(self, file: Path) -> None:
        """Copies what is beside the file, and makes what is missing from the file itself."""
        beside = file.parent
        for path in find_side_files(beside, self.files).carried:
            target = self.folder / path.relative_to(beside)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        own = {"gguf_file": file.name, "trust_remote_code": False}
        if (beside / self.config_file).is_file():
            shutil.copy(beside / self.config_file, self.folder)
        else:
            transformers.AutoConfig.from_pretrained(beside, **own).save_pretrained(self.folder)
        if not any((self.folder / name).exists() for name in TOKENIZER_FILES):
            transformers.AutoTokenizer.from_pretrained(beside, **own).save_pretrained(self.folder)


def _tensors(
    file: Path, model: transformers.PreTrainedModel, dtype: torch.dtype
) -> dict[str, TensorInfo]:
    """Returns the dense tensors by their names in the model; nothing is read."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    locations = {
        tensor.name: TensorInfo(
            file, "U8", (int(tensor.n_bytes),), int(tensor.data_offset), int(tensor.n_bytes)
        )
        for tensor in reader.tensors
    }
    types = {tensor.name: str(tensor.tensor_type.name) for tensor in reader.tensors}
    architecture = str(reader.fields["general.architecture"].contents())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors: dict[str, TensorInfo] = {}
    made = _converted(file, architecture, model, dtype) or _processed(reader, architecture, model)
    for name, sources, compute in made:
        if name in shapes:
            stored = sorted({types[source] for source in sources} - {*DENSE_TYPES})
            tensors[name] = ComputedInfo.from_source(
                locations[sources[0]], shapes[name], dtype, compute, stored_as=" and ".join(stored)
            )
    return tensors


def _processed(
    reader: Any, architecture: str, model: transformers.PreTrainedModel
) -> Iterator[_Made]:
    """Yields the tensors as transformers' processors make them, which most architectures have."""
    from gguf import dequantize
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    kind = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = kind(config=model.config.to_dict())
    name_of = get_gguf_hf_weights_map(model, processor)
    sources: dict[str, list[Any]] = {}
    for tensor in reader.tensors:
        # Experts are named without `.weight`; gate and up go into one tensor.
        name = name_of.get(tensor.name) or name_of.get(tensor.name.removesuffix(".weight"))
        if name is not None:
            sources.setdefault(name, []).append(tensor)
    for name, tensors in sources.items():

        def compute(name: str = name, tensors: list[Any] = tensors) -> torch.Tensor:
            parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
            for tensor in tensors:
                made = processor.process(
                    weights=dequantize(tensor.data, tensor.tensor_type), name=tensor.name,
                    tensor_key_mapping=name_of, parsed_parameters=parsed,
                )  # fmt: skip
                if made.name is not None:
                    parsed["tensors"][name] = torch.from_numpy(made.weights.copy())
            return parsed["tensors"][name]

        yield _Made(name, [tensor.name for tensor in tensors], compute)


def _converted(
    file: Path, architecture: str, model: transformers.PreTrainedModel, dtype: torch.dtype
) -> list[_Made]:
    """Returns the tensors as transformers' converters make them; empty: it has none for this file."""
    try:
        from transformers.integrations.gguf import (
            GgufHeader,
            get_gguf_conversion_mapping,
            get_gguf_plan,
            is_gguf_arch_supported,
            load_gguf_state_dict,
        )
        from transformers.integrations.gguf.utils import add_gguf_load_ops
    except ImportError:  # older versions have processors only
        return []
    if not is_gguf_arch_supported(architecture):
        return []
    header = GgufHeader.from_file(str(file))
    mapping = get_gguf_conversion_mapping(architecture, model.config)
    quantized, _, _ = get_gguf_plan(header, mapping)
    mapping = add_gguf_load_ops(mapping, quantized, header, dtype)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    stored = load_gguf_state_dict(header)
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in stored:
        name, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, model.state_dict()
        )
        groups.setdefault(str(name), []).append((str(pattern), key))

    def compute(name: str, parts: list[tuple[str, str]]) -> torch.Tensor:
        converter = deepcopy(converter_of[parts[0][0]])
        for pattern, key in parts:
            converter.add_tensor(name, key, pattern, stored[key][...])
        made = converter.convert(name, model=model, config=model.config)[name]
        tensor: torch.Tensor = made[0] if isinstance(made, list) else made
        return tensor

    return [
        _Made(name, [key for _, key in parts], partial(compute, name, parts))
        for name, parts in groups.items()
    ]
