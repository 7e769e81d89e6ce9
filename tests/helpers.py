"""Helpers of tests: small models of ten architectures, folders as hashes, commands as processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from roundwise.calibration.windows import Batch
from roundwise.checkpoint.side_files import OWN_FILES
from roundwise.forward.expert_tokens import ExpertCalibration
from roundwise.forward.input_groups import InputGroup
from roundwise.forward.scheduler import ForwardScheduler
from roundwise.model.blocks import weight_of
from roundwise.model.streamed import StreamedModel

VOCABULARY = 128
#: Sizes that every small model has, under the names that most architectures use.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
LLAMA = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA_GROUPS = [QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]


@dataclass(frozen=True)
class Architecture:
    """A model family: a small config, and the expected groups of its blocks."""

    config: Callable[[], transformers.PretrainedConfig]
    blocks: str
    """Name of the list of blocks."""
    groups: list[tuple[str, ...]]
    """Linears of a block that read the same input, in the order in which they are reached."""


def _mixed_gemma() -> transformers.PretrainedConfig:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    return transformers.Gemma3TextConfig(
        **{**LLAMA, "num_hidden_layers": 3, "pad_token_id": 2}, sliding_window=12, layer_types=kinds
    )


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True),
        "model.layers", LLAMA_GROUPS,
    ),
    "qwen3": Architecture(lambda: transformers.Qwen3Config(**LLAMA), "model.layers", LLAMA_GROUPS),
    "mistral": Architecture(
        lambda: transformers.MistralConfig(**LLAMA, sliding_window=12),
        "model.layers", LLAMA_GROUPS,
    ),
    "gemma3": Architecture(_mixed_gemma, "model.layers", LLAMA_GROUPS),
    "gpt2": Architecture(
        lambda: transformers.GPT2Config(**SIZES, n_positions=64, n_inner=96),
        "transformer.h",
        [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    ),
    "opt": Architecture(
        lambda: transformers.OPTConfig(
            **{**SIZES, "pad_token_id": 2}, ffn_dim=96, max_position_embeddings=64,
            word_embed_proj_dim=64,
        ),
        "model.decoder.layers",
        [QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)],
    ),
    "gpt_neox": Architecture(
        lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=96),
        "gpt_neox.layers",
        [
            ("attention.query_key_value",), ("attention.dense",),
            ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",),
        ],
    ),
    "phi3": Architecture(
        lambda: transformers.Phi3Config(**{k: v for k, v in LLAMA.items() if k != "head_dim"}),
        "model.layers",
        [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
    ),
    # Attention and MLP stand side by side and read the same normalised input.
    "falcon": Architecture(
        lambda: transformers.FalconConfig(
            **SIZES, multi_query=True, parallel_attn=True, bias=True, ffn_hidden_size=96
        ),
        "transformer.h",
        [
            ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
            ("self_attention.dense",), ("mlp.dense_4h_to_h",),
        ],
    ),
    "bloom": Architecture(
        lambda: transformers.BloomConfig(**SIZES),
        "transformer.h",
        [
            ("self_attention.query_key_value",), ("self_attention.dense",),
            ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",),
        ],
    ),
}  # fmt: skip


def random_model(config: transformers.PretrainedConfig, seed: int = 0) -> Any:
    """A model with random weights; biases are not zero and norms are not one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.08 * torch.randn(parameter.shape))
    return model.eval()


def windows(count: int = 4, length: int = 32, seed: int = 0) -> list[list[int]]:
    """Random token ids: calibration for models without a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()


def batches(rows: list[list[int]], size: int = 2) -> list[Batch]:
    """Windows of equal length in batches without padding."""
    return [Batch(torch.tensor(rows[i : i + size]), None) for i in range(0, len(rows), size)]


def inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """Arguments of a language model's forward."""
    given = {"input_ids": batch.input_ids}
    return given if batch.mask is None else {**given, "attention_mask": batch.mask.long()}


def run_blocks(
    streamed: StreamedModel,
    calibration: list[Batch],
    solve: Callable[[InputGroup], None] = lambda group: None,
    *,
    sequential: bool = True,
    reference: bool = False,
    held_out: frozenset[int] = frozenset(),
    policy: ExpertCalibration | None = None,
) -> Iterator[tuple[list[InputGroup], ForwardScheduler]]:
    """Runs batches through all blocks; yields the groups of each block, all batches paused after it."""
    streamed.load_outside_blocks()
    with ForwardScheduler(
        streamed.model,
        streamed.blocks,
        calibration,
        reference=reference,
        held_out=held_out,
        policy=policy,
    ) as scheduler:
        for block in streamed.blocks:
            scheduler.advance_to_block()
            streamed.load(block.module, block.name)
            groups = scheduler.discover_groups(block)
            scheduler.run_block(block, groups, solve, sequential=sequential)
            yield groups, scheduler


def hidden(output: Any) -> torch.Tensor:
    """The hidden states in the return value of a block."""
    return output[0] if isinstance(output, tuple) else output


def linear_names(model: Any, architecture: Architecture) -> list[str]:
    """Full names of all linears in the blocks."""
    blocks = model.get_submodule(architecture.blocks)
    return [
        f"{architecture.blocks}.{i}.{name}"
        for i in range(len(blocks))
        for group in architecture.groups
        for name in group
    ]


def assign(model: Any, name: str, W: torch.Tensor) -> None:
    """Replaces the weight of a linear or Conv1D by W [out, in]."""
    linear = model.get_submodule(name)
    with torch.no_grad():
        weight_of(linear).copy_(W)


def contents(folder: Path) -> dict[str, str]:
    """Every file in a folder -> hash of its bytes, without files that contain timings."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in OWN_FILES[1:]
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def journal_blocks(out: Path) -> list[int]:
    """Numbers of the finished blocks in the journal of an unfinished run, in the order of its lines."""
    path = out / ".roundwise" / "journal.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    lists = [json.loads(line) for line in whole.splitlines()[1:]]
    return [block["block"] for line in lists if isinstance(line, list) for block in line]


@dataclass(frozen=True)
class Ended:
    """A process that has ended; a negative code is the signal that ended it."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        return json.loads(self.stdout)

    @property
    def sentence(self) -> str:
        """The error message on stderr; it must be one line, without a traceback."""
        assert "Traceback" not in self.stderr + self.stdout, self.stderr
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.stderr
        return lines[0].removeprefix("error: ")


#: Runs in a process of its own: imports slow modules once, then forks a child for each command.
_SERVER = """
import itertools, json, os, runpy, resource, signal, sys, traceback
import roundwise.checkpoint.sharding
import roundwise.cli, roundwise.inference.load, roundwise.evaluation.perplexity
import matplotlib.figure, matplotlib.backends.backend_svg
from roundwise.model.streamed import open_streamed_model
from roundwise.model.tokenizer import load_tokenizer
warm = open_streamed_model(sys.argv[1])  # transformers imports some modules late
load_tokenizer(warm.checkpoint)

def kill_at(number, folder):
    operations = itertools.count(1)
    def watch(event, args):
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.truncate") or (
            event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if changes and folder in str(args[0]) and next(operations) == number:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)

for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        pid, status = os.waitpid(order["wait"], 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(json.dumps(pid), flush=True)
        continue
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, path in ((1, order["stdout"]), (2, order["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if order["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"],) * 2)
    if order["kill_at"]:
        kill_at(*order["kill_at"])
    if order["shard_bytes"]:
        roundwise.checkpoint.sharding.SHARD_BYTES = order["shard_bytes"]
    os.chdir(order["cwd"])
    os.environ.update(order["env"])
    sys.argv, code = ["roundwise", *order["arguments"]], 0
    try:
        runpy.run_module("roundwise", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # skips the cleanup of thousands of modules, which takes as long as the run
"""


class Commands:
    """`python -m roundwise ...` as processes of their own, without waiting for imports each time."""

    def __init__(self, scratch: Path, model: Path) -> None:
        self._scratch, self._count = scratch, 0
        settings = {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(model)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **settings},
        )  # fmt: skip

    def close(self) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def _ask(self, **order: Any) -> int:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return int(json.loads(self._server.stdout.readline()))

    def start(
        self,
        *arguments: object,
        largest_file: int = 0,
        env: dict[str, str] | None = None,
        shard_bytes: int = 0,
        kill_at: tuple[int, Path] | None = None,
    ) -> Running:
        """Starts a command.

        Args:
            arguments: of `roundwise`.
            largest_file: bytes after which writing to a file fails.
            env: environment variables that it gets besides.
            shard_bytes: bytes of a shard, instead of 2 GB.
            kill_at: SIGKILL comes right before the file operation of this number in this folder.
        """
        self._count += 1
        out, err = (self._scratch / f"{self._count}.{name}" for name in ("out", "err"))
        pid = self._ask(
            arguments=[str(a) for a in arguments], stdout=str(out), stderr=str(err),
            cwd=str(self._scratch), largest_file=largest_file, env=env or {},
            shard_bytes=shard_bytes, kill_at=kill_at and [kill_at[0], str(kill_at[1])],
        )  # fmt: skip
        return Running(self, pid, out, err)

    def run(self, *arguments: object, **options: Any) -> Ended:
        """Runs a command to its end; options as for `start`."""
        return self.start(*arguments, **options).wait()


@dataclass
class Running:
    """A running command."""

    commands: Commands
    pid: int
    out: Path
    err: Path

    def wait(self) -> Ended:
        code = self.commands._ask(wait=self.pid)
        return Ended(code, self.out.read_text(), self.err.read_text())

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self, number: signal.Signals = signal.SIGKILL) -> Ended:
        """Sends a signal and waits for the end; a no-op if the process has ended."""
        os.kill(self.pid, number)
        return self.wait()

    def reach(self, happened: Callable[[], bool], seconds: float = 60.0) -> None:
        """Waits until `happened` returns True."""
        limit = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < limit, self.err.read_text()
            time.sleep(0.005)


class Stop(Exception):
    """Raised by a test in the middle of a run, like a crash."""


def stop_after(count: int) -> Callable[[Any], None]:
    """A progress callback that raises at its `count`-th call."""
    calls = iter(range(1, count + 1))

    def progress(_: Any) -> None:
        if next(calls) == count:
            raise Stop

    return progress


@contextmanager
def edited_json(path: Path) -> Iterator[dict[str, Any]]:
    """Context manager: a JSON file as a dict; changes are written back."""
    value = json.loads(path.read_text())
    yield value
    path.write_text(json.dumps(value))


def flatten(rows: Sequence[Sequence[int]]) -> list[int]:
    """All tokens of some windows."""
    return [token for row in rows for token in row]


#: A minimal chat template; `examples/tiny-llama` has none.
CHAT_TEMPLATE = (
    "{% for message in messages %}# {{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:{% endif %}"
)
