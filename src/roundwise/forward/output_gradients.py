"""OutputGradients: gradients at the outputs of linear layers, which tell what errors there cost.

Before a run, the original model goes forward and backward once with a few calibration tokens. The loss
is the log-likelihood of tokens sampled from the model's own predictions. On average the products g gᵀ of
its gradients g are the curvature of the KL divergence from the original model (its Fisher information).
The solver weighs errors by them (`core.output_weighting`).

One block's weights are in memory at a time: blocks are computed again in the backward pass (gradient
checkpointing), and the gradients of a block are written as soon as they are complete.

    OUT/.roundwise/gradients-BLOCK-PART.safetensors    linear -> [tokens, out]
    OUT/.roundwise/gradients.json                      hashes of these files; written last
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
from roundwise.checkpoint.reader import read_header
from roundwise.checkpoint.side_files import WORK
from roundwise.checkpoint.untrusted import file_digest
from roundwise.checkpoint.writer import write_json, write_safetensors
from roundwise.errors import first_line
from roundwise.model.blocks import Block, wrapped_forwards
from roundwise.model.build import embedding_shape, forward_kwargs
from roundwise.model.streamed import StreamedModel
from roundwise.system.activity import announce
from roundwise.system.device import HOST
from roundwise.system.half_matmul import cpu_half_matmul
from roundwise.system.timer import timer

#: Maximum logits (tokens × vocabulary) in memory at a time, and tokens that run together in any case.
MAX_LOGITS, MIN_CONTEXT = 1 << 25, 512
#: Minimum tokens of a window; also the tokens whose probabilities are computed at a time.
MIN_TOKENS = 64
#: Factor of gradients in float16, against underflow; it cancels later.
FLOAT16_SCALE = 1024.0


class OutputGradients:
    """The gradients of a run, on disk in its work folder.

    Args:
        out: output folder of the run.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out / WORK
        self.index = self.folder / "gradients.json"

    def measure(
        self, streamed: StreamedModel, batches: list[Batch], *, tokens: int, first: int
    ) -> str | None:
        """Computes and writes the gradients, unless a stopped run already did.

        Args:
            streamed: the original model, with everything outside its blocks loaded.
            batches: calibration batches.
            tokens: approximate number of tokens to use, from the first batch on.
            first: number of the first block that is not finished.

        Returns:
            The reason why there are no gradients; None: they are written.
        """
        if self._is_complete(first):
            return None
        parts = _split_batches(batches, tokens, embedding_shape(streamed.model)[0])
        digests: dict[str, str] = {}

        def write(part: int, index: int, gradients: dict[str, torch.Tensor]) -> None:
            name = f"gradients-{index:05d}-{part}.safetensors"
            with timer.phase("write"):
                digests[name] = write_safetensors(self.folder / name, gradients)

        generator = torch.Generator().manual_seed(0)
        with timer.phase("gradients"), _head_loaded(streamed):
            for part, batch in enumerate(parts):
                announce("measuring what errors of outputs cost", part, len(parts))
                with _streamed_blocks(streamed, partial(write, part)):
                    failure = _forward_backward(streamed, batch.to(streamed.device), generator)
                if failure:
                    return failure
        if not digests:
            return "no gradient reaches its blocks"
        write_json(self.index, digests)
        return None

    def _is_complete(self, first: int) -> bool:
        """Returns True if the files of all blocks from number `first` on are there and unchanged."""
        if not self.index.exists():
            return False
        try:
            digests = json.loads(self.index.read_bytes())
            return all(
                file_digest(self.folder / name) == digest
                for name, digest in digests.items()
                if int(name.split("-")[1]) >= first
            )
        except (OSError, ValueError, AttributeError, TypeError):
            return False  # they are computed again, with the same result

    def of_block(self, index: int) -> dict[str, list[torch.Tensor]]:
        """Returns the gradients of block number `index`: linear -> parts [tokens, out], memory-mapped.

        Linears that no gradient reached are missing.
        """
        gradients: dict[str, list[torch.Tensor]] = {}
        for file in sorted(self.folder.glob(f"gradients-{index:05d}-*.safetensors")):
            for name, info in read_header(file).items():
                gradients.setdefault(name, []).append(info.read())
        return gradients

    def clear(self, index: int | None = None) -> None:
        """Removes the gradients of a finished block; None: all gradients, left by another run."""
        if index is None:
            self.index.unlink(missing_ok=True)
        pattern = "gradients-*" if index is None else f"gradients-{index:05d}-*"
        for file in self.folder.glob(pattern):
            file.unlink()


def tokens_at_a_time(vocabulary: int) -> int:
    """Returns the maximum number of tokens that run together, for a size of the vocabulary."""
    return max(MIN_CONTEXT, MAX_LOGITS // vocabulary)


def _split_batches(batches: list[Batch], tokens: int, vocabulary: int) -> list[Batch]:
    """Returns the first windows as parts whose logits fit into memory.

    Args:
        batches: calibration batches.
        tokens: approximate number of tokens of all parts together.
        vocabulary: size of the vocabulary.
    """
    limit = tokens_at_a_time(vocabulary)
    parts: list[Batch] = []
    for batch in batches:
        length = min(batch.input_ids.shape[1], limit, max(tokens, MIN_TOKENS))
        step = max(1, limit // length)
        for start in range(0, len(batch.input_ids), step):
            if tokens <= 0:
                return parts
            stop = min(start + step, start + -(-tokens // length))
            cut = (slice(start, stop), slice(0, length))
            mask = None if batch.mask is None else batch.mask[cut]
            ids = batch.input_ids[cut]
            if batch.inputs and ids.shape != batch.input_ids.shape:
                continue  # a picture cannot be cut
            parts.append(Batch(ids, mask, inputs=batch.inputs))
            tokens -= parts[-1].input_ids.numel()
    return parts


def _forward_backward(
    streamed: StreamedModel, batch: Batch, generator: torch.Generator
) -> str | None:
    """Runs one part forward and backward; returns the reason if that is impossible, else None."""
    model = streamed.model
    try:
        with torch.enable_grad():
            with cpu_half_matmul():
                output = model(**forward_kwargs(model, batch.input_ids, batch.mask, batch.inputs))
            y = output["logits"] if "logits" in output else output[0]
            if not y.requires_grad:
                return "its output does not depend on its blocks"
            is_logits = "logits" in output
            y.backward(_output_gradient(y.detach(), batch.mask, generator, is_logits=is_logits))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # an operation has no gradient, or cannot be computed again
        if "allocate memory" in str(error):
            raise
        return f"it cannot be differentiated ({first_line(error)[:120]})"
    return None


def _output_gradient(
    y: torch.Tensor, mask: torch.Tensor | None, generator: torch.Generator, *, is_logits: bool
) -> torch.Tensor:
    """Returns the gradient of the loss at the model's output y.

    For logits it is p - onehot(t), with p = softmax(y) and the token t sampled from p; for other outputs
    it is random signs, whose products g gᵀ are the identity on average.

    Args:
        y: output [..., vocabulary], or other hidden states [..., hidden].
        mask: bool [...], False for padding, whose gradient is zero; None: there is no padding.
        generator: source of random numbers.
        is_logits: y are logits.
    """
    rows, gradient = y.reshape(-1, y.shape[-1]), torch.empty_like(y)
    targets = torch.split(gradient.view(rows.shape), MIN_TOKENS)
    for part, target in zip(torch.split(rows, MIN_TOKENS), targets, strict=True):
        if is_logits:
            p = part.float().softmax(dim=-1).to(HOST)
            minus_one = torch.full_like(p[:, :1], -1.0)
            target.copy_(p.scatter_add_(1, sample_tokens(p, generator), minus_one))
        else:
            target.copy_(torch.randint(0, 2, part.shape, generator=generator) * 2 - 1)
    if mask is not None and mask.shape == y.shape[:-1]:
        gradient *= mask[..., None]
    return gradient.mul_(FLOAT16_SCALE) if y.dtype == torch.float16 else gradient


def sample_tokens(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Samples a token for each row of probabilities, by inverting the cumulative distribution.

    Args:
        p: probabilities [rows, vocabulary]; rows need not add up to exactly 1.
        generator: source of random numbers.

    Returns:
        int64 [rows, 1].
    """
    cumulative = p.cumsum(dim=-1)
    number = torch.rand(len(p), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, number).clamp_(max=p.shape[1] - 1)


@contextmanager
def _head_loaded(streamed: StreamedModel) -> Iterator[None]:
    """Context manager: the output head is loaded, which a run without `--lm-head` does not need."""
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
def _streamed_blocks(
    streamed: StreamedModel, write: Callable[[int, dict[str, torch.Tensor]], None]
) -> Iterator[None]:
    """Context manager: every block loads its weights when it runs, drops them, and writes its gradients.

    Args:
        streamed: the model.
        write: called with the number of a block and linear -> gradients [tokens, out].
    """
    handles: list[Any] = []
    gradients: list[dict[str, list[torch.Tensor]]] = []
    for block in streamed.blocks:
        kept: dict[str, list[torch.Tensor]] = {}
        gradients.append(kept)
        if not block.is_head:  # the head's B would be as large as the vocabulary squared
            handles += [
                linear.register_forward_hook(_keep_gradient(kept.setdefault(name, [])))
                for name, linear in block.linears.items()
            ]

    def wrap(index: int, block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
        return _checkpointed_forward(
            streamed, block, forward, gradients[index], partial(write, index)
        )

    try:
        with wrapped_forwards(streamed.blocks, wrap):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for block in streamed.blocks:
            streamed.unload(block.module, block.prefix)


def _keep_gradient(parts: list[torch.Tensor]) -> Callable[..., None]:
    """Forward hook of a linear: appends the gradient [tokens, out] of its output to `parts`."""

    def keep(g: torch.Tensor) -> None:
        parts.append(g.detach().reshape(-1, g.shape[-1]).to(HOST))

    def hook(_: nn.Module, _args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(keep)  # type: ignore[no-untyped-call]

    return hook


def _checkpointed_forward(
    streamed: StreamedModel,
    block: Block,
    original: Callable[..., Any],
    gradients: dict[str, list[torch.Tensor]],
    write: Callable[[dict[str, torch.Tensor]], None],
) -> Callable[..., Any]:
    """Returns a block's forward with gradient checkpointing, which loads and drops the block's weights.

    Args:
        streamed: the model.
        block: the block.
        original: its forward.
        gradients: linear -> parts of its gradients; emptied once they are written.
        write: called with linear -> gradients [tokens, out] when the backward pass leaves the block.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        streamed.load(block.module, block.prefix)
        try:
            with cpu_half_matmul():  # in the backward pass the mode of the forward pass is off
                return original(*args, **kwargs)
        finally:
            streamed.unload(block.module, block.prefix)

    def write_gradients(_: torch.Tensor) -> None:
        complete = {name: torch.cat(parts) for name, parts in gradients.items() if parts}
        complete = {name: g for name, g in complete.items() if g.numel()}
        if not all(torch.isfinite(g.sum(dtype=torch.float32)) for g in complete.values()):
            raise RuntimeError("its gradients are not finite")
        if complete:
            write(complete)
        for parts in gradients.values():
            parts.clear()

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not args or not isinstance(args[0], torch.Tensor):
            raise RuntimeError(f"the first argument of {block.name} is not its input")
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_() * 1
        x.register_hook(write_gradients)  # type: ignore[no-untyped-call]
        return checkpoint(
            run, x, *args[1:], use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    return forward
