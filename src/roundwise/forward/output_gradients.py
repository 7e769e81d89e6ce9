"""What errors of a layer's outputs cost the model: its gradients there, for a few calibration tokens.

Before a run the original model goes forward and backward once with some tokens. The gradients are
those of the log-likelihood of tokens drawn from the model's own predictions: their products g gᵀ are,
in the mean, the curvature of the KL divergence from the original (its Fisher information). The solver
weighs errors by them (core.coupling).

One block's weights are in memory at a time: a block is not kept for the way back but computed again
there (gradient checkpointing), and what was found in it is written when the way back leaves it.

    OUT/.roundwise/gradients-BLOCK-PART.safetensors    linear -> [tokens, out]
    OUT/.roundwise/gradients.json                      their hashes; last, so that it says all are there
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from roundwise.calibration.windows import Batch
from roundwise.checkpoint.manifest import WORK
from roundwise.checkpoint.reader import read_header
from roundwise.checkpoint.untrusted import file_digest
from roundwise.checkpoint.writer import write_json, write_safetensors
from roundwise.core.hessian import Hessian
from roundwise.model.blocks import Block, wrapped_forwards
from roundwise.model.build import arguments
from roundwise.model.streamed import StreamedModel
from roundwise.system.device import HOST
from roundwise.system.half_matmul import cpu_half_matmul
from roundwise.system.timer import timer

#: Logits held at a time, tokens by vocabulary; but at least so many tokens, as context.
LOGITS, CONTEXT = 1 << 25, 512
#: Tokens of the smallest part, and of those whose probabilities are computed together.
FEWEST = 64
#: Gradients in float16 are made larger by this; a factor cancels.
LARGER = 1024.0


class OutputGradients:
    """The gradients of a run, on disk.

    Args:
        out: output folder of the run.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out / WORK
        self.index = self.folder / "gradients.json"

    def measure(
        self, streamed: StreamedModel, batches: list[Batch], *, tokens: int, first: int
    ) -> str | None:
        """Writes the gradients unless they are there; why there are none, or None.

        Args:
            skeleton: the model; all outside its blocks is loaded, the head too when this returns.
            batches: calibration batches.
            tokens: how many of their first tokens are used, about.
            first: the first block that is not finished.
        """
        if self._there(first):
            return None
        parts = _parts(batches, tokens, streamed.model.config.get_text_config().vocab_size)
        digests: dict[str, str] = {}

        def write(part: int, index: int, found: dict[str, torch.Tensor]) -> None:
            name = f"gradients-{index:05d}-{part}.safetensors"
            with timer.phase("write"):
                digests[name] = write_safetensors(self.folder / name, found)

        generator = torch.Generator().manual_seed(0)
        with timer.phase("gradients"), _head(streamed):
            for part, batch in enumerate(parts):
                with _watched(streamed, partial(write, part)):
                    failed = _forth_and_back(streamed, batch.to(streamed.device), generator)
                if failed:
                    return failed
        if not digests:
            return "no gradient reaches its blocks"
        write_json(self.index, digests)
        return None

    def _there(self, first: int) -> bool:
        """An earlier process wrote all that the blocks from `first` on need, and it is unchanged."""
        if not self.index.exists():
            return False
        try:
            digests = json.loads(self.index.read_bytes())
            return all(
                file_digest(self.folder / name) == digest
                for name, digest in digests.items()
                if _block_of(name) >= first
            )
        except (OSError, ValueError, AttributeError, TypeError):
            return False  # measured again: the same gradients

    def weights_of_block(self, index: int) -> Callable[[str], tuple[torch.Tensor | None, int]]:
        """For a linear of a block, B = gᵀg / n [out, out] (None: it saw no gradient), and n."""
        files = sorted(self.folder.glob(f"gradients-{index:05d}-*.safetensors"))
        headers = [read_header(file) for file in files]

        def weights(name: str) -> tuple[torch.Tensor | None, int]:
            found = [header[name] for header in headers if name in header]
            if not found:
                return None, 0
            with timer.phase("gradients"):
                total = Hessian(found[0].shape[1])
                for info in found:
                    total.add(info.read())
                tokens, B = total.tokens, total.take_mean()
            return (B, tokens) if float(B.diagonal().sum()) > 0 else (None, 0)

        return weights

    def clear(self, index: int | None = None) -> None:
        """Removes the gradients of a finished block; None: all, left by another run."""
        if index is None:
            self.index.unlink(missing_ok=True)
        pattern = "gradients-*" if index is None else f"gradients-{index:05d}-*"
        for file in self.folder.glob(pattern):
            file.unlink()


def _block_of(name: str) -> int:
    return int(name.split("-")[1])


def tokens_at_a_time(vocabulary: int) -> int:
    """Of the largest part."""
    return max(CONTEXT, LOGITS // vocabulary)


def _parts(batches: list[Batch], tokens: int, vocabulary: int) -> list[Batch]:
    """The first windows, about `tokens` in all, in parts of which no logits are too many to hold."""
    most = tokens_at_a_time(vocabulary)
    parts: list[Batch] = []
    for batch in batches:
        length = min(batch.input_ids.shape[1], most, max(tokens, FEWEST))
        step = max(1, most // length)
        for start in range(0, len(batch.input_ids), step):
            if tokens <= 0:
                return parts
            stop = min(start + step, start + -(-tokens // length))
            cut = (slice(start, stop), slice(0, length))
            mask = None if batch.mask is None else batch.mask[cut]
            parts.append(Batch(batch.input_ids[cut], mask))
            tokens -= parts[-1].input_ids.numel()
    return parts


def _forth_and_back(
    streamed: StreamedModel, batch: Batch, generator: torch.Generator
) -> str | None:
    """One part through the model and back; why that does not work, or None."""
    model = streamed.model
    try:
        with torch.enable_grad():
            with cpu_half_matmul():
                output = model(**arguments(model, batch.input_ids, batch.mask))
            y = output["logits"] if "logits" in output else output[0]
            if not y.requires_grad:
                return "its output does not depend on its blocks"
            y.backward(_seed(y.detach(), batch.mask, generator, logits="logits" in output))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # operations that have no gradient, or cannot be computed again
        if "allocate memory" in str(error):
            raise
        return f"it cannot be differentiated ({str(error).strip().splitlines()[0][:120]})"
    return None


def _seed(
    y: torch.Tensor, mask: torch.Tensor | None, generator: torch.Generator, *, logits: bool
) -> torch.Tensor:
    """Gradient of the output: p - onehot(t), t drawn from p; random signs where there are no logits."""
    rows, seed = y.reshape(-1, y.shape[-1]), torch.empty_like(y)
    for part, into in zip(
        *(torch.split(t, FEWEST) for t in (rows, seed.view(rows.shape))), strict=True
    ):
        if logits:
            p = part.float().softmax(dim=-1).to(HOST)
            minus = torch.full_like(p[:, :1], -1.0)
            into.copy_(p.scatter_add_(1, draw(p, generator), minus))
        else:
            into.copy_(torch.randint(0, 2, part.shape, generator=generator) * 2 - 1)
    if mask is not None and mask.shape == y.shape[:-1]:
        seed *= mask[..., None]
    return seed.mul_(LARGER) if y.dtype == torch.float16 else seed


def draw(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token for each row of probabilities [rows, vocabulary]: where a number up to 1 falls."""
    below = p.cumsum(dim=-1)
    number = torch.rand(len(p), 1, generator=generator) * below[:, -1:]
    return torch.searchsorted(below, number).clamp_(max=p.shape[1] - 1)


@contextmanager
def _head(streamed: StreamedModel) -> Iterator[None]:
    """The head's weights, which a run without `--lm-head` never needs."""
    head = streamed.model.get_output_embeddings()
    names = [name for name, module in streamed.model.named_modules() if module is head]
    is_block = any(block.is_head for block in streamed.blocks)
    if head is None or is_block or not names:
        yield
        return
    streamed.load(head, names[0], aligned=False)
    try:
        yield
    finally:
        streamed.unload(head, names[0])


@contextmanager
def _watched(
    streamed: StreamedModel, write: Callable[[int, dict[str, torch.Tensor]], None]
) -> Iterator[None]:
    """Context manager: blocks load and drop their weights by themselves, and hand out their gradients."""
    handles: list[Any] = []
    gradients: list[dict[str, list[torch.Tensor]]] = []
    for block in streamed.blocks:
        kept: dict[str, list[torch.Tensor]] = {}
        gradients.append(kept)
        if not block.is_head:  # that of a head is as large as the vocabulary
            handles += [
                linear.register_forward_hook(_keep(kept.setdefault(name, [])))
                for name, linear in block.linears.items()
            ]

    def wrap(index: int, block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
        return _checkpointed(streamed, block, forward, gradients[index], partial(write, index))

    try:
        with wrapped_forwards(streamed.blocks, wrap):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for block in streamed.blocks:
            streamed.unload(block.module, block.prefix)


def _keep(found: list[torch.Tensor]) -> Callable[..., None]:
    """A hook behind a linear: keeps the gradient of its output."""

    def keep(g: torch.Tensor) -> None:
        found.append(g.detach().reshape(-1, g.shape[-1]).to(HOST))

    def hook(_: nn.Module, _args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(keep)  # type: ignore[no-untyped-call]

    return hook


def _checkpointed(
    streamed: StreamedModel,
    block: Block,
    original: Callable[..., Any],
    found: dict[str, list[torch.Tensor]],
    write: Callable[[dict[str, torch.Tensor]], None],
) -> Callable[..., Any]:
    """A block's forward that is computed again on the way back (gradient checkpointing)."""

    def run(*args: Any, **kwargs: Any) -> Any:
        streamed.load(block.module, block.prefix)
        try:
            with cpu_half_matmul():  # on the way back, no mode of the way forth is on
                return original(*args, **kwargs)
        finally:
            streamed.unload(block.module, block.prefix)

    def leave(_: torch.Tensor) -> None:
        kept = {name: torch.cat(parts) for name, parts in found.items() if parts}
        kept = {name: g for name, g in kept.items() if g.numel()}
        if not all(torch.isfinite(g.sum(dtype=torch.float32)) for g in kept.values()):
            raise RuntimeError("its gradients are not finite")
        if kept:
            write(kept)
        for parts in found.values():
            parts.clear()

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not args or not isinstance(args[0], torch.Tensor):
            raise RuntimeError(f"{block.name} is not given its input first")
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_() * 1
        x.register_hook(leave)  # type: ignore[no-untyped-call]
        return checkpoint(
            run, x, *args[1:], use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    return forward
