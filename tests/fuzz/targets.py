"""What is fuzzed: each target takes bytes for one file of a model folder and opens it as commands do.

A target ends in a `RoundwiseError` or well; any other exception is a finding. `run.py` feeds them from a
coverage-guided fuzzer, `test_corpus.py` with the inputs kept in `corpus/`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import roundwise as rw
from roundwise.calibration.dataset import load_calibration
from roundwise.checkpoint.reader import DTYPES, INDEX_FILE, SINGLE_FILE, Checkpoint
from roundwise.cli.commands.inspect import summarize
from roundwise.config import CalibrationConfig
from roundwise.convert import convert
from roundwise.errors import Interrupted, RoundwiseError
from roundwise.inference.quant_linear import QuantLinear
from roundwise.model.streamed import open_streamed_model
from roundwise.model.tokenizer import load_tokenizer
from roundwise.plan.plan import plan
from roundwise.run.reproduce import reproduce
from roundwise.system.hub import bundled_model
from roundwise.verify import audit
from tests.helpers import CHAT_TEMPLATE, random_model

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

#: A layer of the small model, whose tensors are changed.
LAYER = "model.layers.1.mlp.down_proj"
RTN = rw.QuantizeConfig(group_size=32, method="rtn")
SMALL = transformers.LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
)  # fmt: skip


class Targets:
    """The targets, on small models made once in a scratch folder."""

    def __init__(self, scratch: Path) -> None:
        self.out = scratch / "out"
        self.dense = scratch / "dense"
        self.speaker = load_tokenizer(Checkpoint(bundled_model()))
        self.speaker.chat_template = CHAT_TEMPLATE
        random_model(SMALL).save_pretrained(self.dense)
        self.sharded = Path(shutil.copytree(self.dense, scratch / "sharded"))
        tensors = load_file(self.sharded / SINGLE_FILE)
        (self.sharded / SINGLE_FILE).unlink()
        weight_map = {name: f"{int('layers.1' in name)}.safetensors" for name in tensors}
        for shard in set(weight_map.values()):
            part = {name: tensors[name] for name, file in weight_map.items() if file == shard}
            save_file(part, self.sharded / shard)
        (self.sharded / INDEX_FILE).write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
        self.quantized = scratch / "quantized"
        rw.quantize(self.dense, self.quantized, RTN)
        # Without hashes of its files, so that what is changed is looked at.
        self.foreign = scratch / "foreign"
        convert(self.quantized, self.foreign, "gptq_v2")
        self.old = Path(shutil.copytree(self.foreign, scratch / "old"))
        config = json.loads((self.old / "config.json").read_text())
        del config["quantization_config"]
        (self.old / "config.json").write_text(json.dumps(config))
        self.unfinished = scratch / "unfinished"
        self._stop_after_one_block()
        self.kept = {file: file.read_bytes() for file in self._files(scratch)}

    def _stop_after_one_block(self) -> None:
        def stop(step: Any) -> None:
            if step.layer is None:
                raise KeyboardInterrupt

        with suppress(Interrupted):
            rw.quantize(self.dense, self.unfinished, RTN, progress=stop)

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        return [file for file in folder.rglob("*") if file.is_file()]

    def all(self) -> dict[str, Callable[[bytes], None]]:
        """Name -> target; the name is that of its folder in the corpus."""
        return {
            "config": self.config,
            "quantized_config": self.quantized_config,
            "quantize_config": self.quantize_config,
            "index": self.index,
            "header": self.header,
            "file": self.file,
            "quantized_header": self.quantized_header,
            "config_and_tensors": self.config_and_tensors,
            "journal": self.journal,
            "manifest": self.manifest,
            "tokenizer": self.tokenizer,
            "texts": self.texts,
        }

    def seed(self, target: str) -> bytes:
        """A sound input to begin with."""
        files = {
            "config": self.dense / "config.json",
            "quantized_config": self.foreign / "config.json",
            "quantize_config": self.old / "quantize_config.json",
            "index": self.sharded / INDEX_FILE,
            "journal": self.unfinished / ".roundwise" / "journal.jsonl",
            "manifest": self.quantized / "roundwise.json",
        }
        if target in files:
            return self.kept[files[target]]
        folders = {"header": self.dense, "quantized_header": self.foreign}
        if target in folders:
            return _split(self.kept[folders[target] / SINGLE_FILE])[0]
        settings = json.loads(self.kept[self.foreign / "config.json"])["quantization_config"]
        layer = {
            name: [entry["dtype"], entry["shape"]]
            for name, entry in self._entries().items()
            if name.startswith(f"{LAYER}.")
        }
        texts = {
            "config_and_tensors": json.dumps({"config": settings, "tensors": layer}).encode(),
            "file": (2).to_bytes(8, "little") + b"{}",
            "tokenizer": b'{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", '
            b'"vocab": {"a": 0, "b": 1}, "unk_token": "a"}, "pre_tokenizer": {"type": "Whitespace"}}',
            "texts": b'{"text": "one"}\n{"messages": [{"role": "user", "content": "two"}]}\n',
        }
        return texts[target]

    def run(self, target: str, data: bytes) -> None:
        """Runs a target; what it changed is as before afterwards."""
        try:
            self.all()[target](data)
        except RoundwiseError as error:
            assert str(error).strip(), "an error without a word"
        finally:
            shutil.rmtree(self.out, ignore_errors=True)
            scratch = self.dense.parent
            for file in self._files(scratch):
                if file not in self.kept:
                    file.unlink()
            for file, before in self.kept.items():
                if not file.is_file() or file.read_bytes() != before:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(before)

    def config(self, data: bytes) -> None:
        (self.dense / "config.json").write_bytes(data)
        plan(open_streamed_model(self.dense), RTN)

    def index(self, data: bytes) -> None:
        (self.sharded / INDEX_FILE).write_bytes(data)
        checkpoint = Checkpoint(self.sharded)
        assert all(file.parent == self.sharded for file in checkpoint.files)
        open_streamed_model(checkpoint)

    def header(self, data: bytes) -> None:
        self._opened(self.dense, _joined(data, _split(self.kept[self.dense / SINGLE_FILE])[1]))

    def file(self, data: bytes) -> None:
        self._opened(self.dense, data)

    def _opened(self, folder: Path, data: bytes) -> None:
        (folder / SINGLE_FILE).write_bytes(data)
        checkpoint = Checkpoint(folder)
        for info in checkpoint.tensors.values():
            if len(b"".join(info.chunks())) != info.nbytes:
                raise AssertionError("a tensor's bytes are not those of its place")
            info.read()
        streamed = open_streamed_model(checkpoint)
        plan(streamed, RTN)
        for block in streamed.blocks:
            streamed.load(block.module, block.name)

    def quantized_config(self, data: bytes) -> None:
        (self.foreign / "config.json").write_bytes(data)
        self._all_of(self.foreign)

    def quantize_config(self, data: bytes) -> None:
        (self.old / "quantize_config.json").write_bytes(data)
        self._all_of(self.old)

    def quantized_header(self, data: bytes) -> None:
        path = self.foreign / SINGLE_FILE
        path.write_bytes(_joined(data, _split(self.kept[path])[1]))
        self._all_of(self.foreign)

    def config_and_tensors(self, data: bytes) -> None:
        """A quantization config, and types and shapes of tensors, which must fit together.

        Readers that accept them must find the same numbers, and `verify` accepts what they accept.
        """
        try:
            given = json.loads(data)
            changed = {
                str(name): (str(kind), [int(size) for size in shape])
                for name, (kind, shape) in dict(given["tensors"]).items()
            }
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return
        config = json.loads(self.kept[self.foreign / "config.json"])
        config["quantization_config"] = given.get("config")
        (self.foreign / "config.json").write_text(json.dumps(config))
        (self.foreign / SINGLE_FILE).write_bytes(self._file_with(changed))
        self._all_of(self.foreign)
        report = audit(self.foreign)
        with suppress(RoundwiseError):
            dense = load_file(
                convert(self.foreign, self.out / "same", "dense", dtype=torch.float32) / SINGLE_FILE
            )
            assert not report.failures, report.failures
            model, _ = rw.load(self.foreign)
            for name, module in model.named_modules():
                if isinstance(module, QuantLinear):
                    assert torch.equal(dense[f"{name}.weight"], module.dequantize().T), name

    def _entries(self) -> dict[str, Any]:
        """Tensors in the header of the foreign checkpoint."""
        header = json.loads(_split(self.kept[self.foreign / SINGLE_FILE])[0])
        header.pop("__metadata__", None)
        return dict(header)

    def _file_with(self, changed: dict[str, tuple[str, list[int]]]) -> bytes:
        """The file of the foreign checkpoint with tensors of other types and shapes.

        They begin with the bytes of the tensor they replace, and go on with those again.
        """
        kept = _split(self.kept[self.foreign / SINGLE_FILE])[1]
        header, data = dict[str, Any](), b""
        entries = {**self._entries(), **dict.fromkeys(changed)}
        for name in entries:
            old = self._entries().get(name)
            start, end = old["data_offsets"] if old else (0, 4)
            kind, shape = changed.get(name) or (old["dtype"], old["shape"])
            count = math.prod(shape) * DTYPES[kind].itemsize if kind in DTYPES else end - start
            part = kept[start:end]
            if 0 <= count <= 1 << 20 and part:
                part = (part * (count // len(part) + 1))[:count]
            header[name] = {
                "dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(part)],
            }  # fmt: skip
            data += part
        text = json.dumps(header).encode()
        return _joined(text + b" " * (-len(text) % 8), data)

    def _all_of(self, folder: Path) -> None:
        """What reads quantized checkpoints."""
        for read in (
            lambda: audit(folder, against=Checkpoint(self.dense)),
            lambda: summarize(str(folder)),
            lambda: convert(folder, self.out / "dense", "dense"),
            lambda: convert(folder, self.out / "gptq", "gptq"),
            lambda: rw.load(folder),
        ):
            try:
                read()
            except RoundwiseError as error:
                assert str(error).strip(), "an error without a word"

    def journal(self, data: bytes) -> None:
        (self.unfinished / ".roundwise" / "journal.jsonl").write_bytes(data)
        rw.quantize(self.dense, self.unfinished, RTN)

    def manifest(self, data: bytes) -> None:
        (self.quantized / "roundwise.json").write_bytes(data)
        audit(self.quantized, against=Checkpoint(self.dense))
        try:
            rw.quantize(self.dense, self.quantized, RTN)
        except RoundwiseError as error:
            assert str(error).strip(), "an error without a word"
        reproduce(self.quantized, self.out, model=str(self.dense))

    def tokenizer(self, data: bytes) -> None:
        (self.dense / "tokenizer.json").write_bytes(data)
        load_tokenizer(Checkpoint(self.dense))

    def texts(self, data: bytes) -> None:
        path = self.dense / "texts.jsonl"
        path.write_bytes(data)
        load_calibration(
            str(path), self.speaker, CalibrationConfig(samples=2, seq_len=8, batch_size=1, seed=0)
        )


def _split(data: bytes) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end].rstrip(), data[end:]


def _joined(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data
