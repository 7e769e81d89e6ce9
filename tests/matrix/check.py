"""Runs a class of models through everything, and says what came of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

import roundwise as rw
from roundwise.checkpoint.reader import Checkpoint
from roundwise.convert import convert
from roundwise.errors import ConfigError, RoundwiseError, VerificationError
from roundwise.model.blocks import _search_roots, _towers
from roundwise.model.build import embedding_shape, forward_kwargs
from roundwise.model.streamed import StreamedModel, open_streamed_model
from roundwise.plan.plan import Plan, plan
from roundwise.verify import audit
from tests.matrix.tiny import FIRST_TEXT_TOKEN, VOCABULARY, find, tiny_model

CONFIG = rw.QuantizeConfig(group_size=32, recipe="textbook", expert_tokens=1)
SAMPLES, LENGTH = 2, 32


@dataclass(frozen=True)
class Row:
    """One class of models in the table."""

    name: str
    linears: int = 0
    """Quantized linear layers."""
    share: float = 0.0
    """Quantized share of the weights inside the blocks."""
    notes: tuple[str, ...] = ()
    """What stays and why; what cannot work and why."""
    method: str = ""
    """Method that it was quantized with; empty: it cannot be quantized."""


def texts(seed: int = 0, *, vocabulary: int = 0) -> list[list[int]]:
    """Random text without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    end = min(vocabulary or VOCABULARY, VOCABULARY)
    ids = torch.randint(FIRST_TEXT_TOKEN, end, (SAMPLES, LENGTH), generator=generator)
    return cast(list[list[int]], ids.tolist())


def run(name: str, folder: Path) -> Row:
    """Quantizes a model of a class, verifies and loads the result, and compares its output.

    Args:
        name: a class of transformers.
        folder: an empty folder to work in.

    Raises:
        AssertionError: something did not do what it should.
        Exception: likewise.
    """
    source, out, dense = folder / "model", folder / "out", folder / "dense"
    reason = save(name, source)
    if reason is not None:
        return Row(name, notes=(reason,))
    try:
        streamed = open_streamed_model(source)
    except ConfigError as error:
        return Row(name, notes=(str(error),))
    planned = plan(streamed, CONFIG, samples=SAMPLES, seq_len=LENGTH)
    layers = [module for module in planned.modules if module.bits]
    row = Row(name, len(layers), _share(streamed, planned), tuple(_notes(streamed, planned)))
    config, notes = CONFIG, row.notes
    ids = texts(vocabulary=embedding_shape(streamed.model)[0])
    try:
        result = rw.quantize(source, out, config, ids, samples=SAMPLES, seq_len=LENGTH)
    except VerificationError:
        raise
    except RoundwiseError as error:
        reason = str(error).removesuffix(": use --method rtn").replace(str(source), "the folder")
        notes, config = (*notes, f"with calibration: {reason}"), CONFIG.merged({"method": "rtn"})
        shutil.rmtree(out, ignore_errors=True)
        result = rw.quantize(source, out, config)
    assert {layer["name"] for layer in result.layers} == {layer.name for layer in layers}
    assert result.bytes_after == planned.bytes_after
    failures = audit(out, against=Checkpoint(source)).failures
    assert failures == [], failures
    convert(out, dense, "dense", dtype=torch.float32)
    if config.method == "gptq":
        _compare(out, dense)
    else:
        rw.load(out)
    return replace(row, notes=notes, method=config.method)


def save(name: str, folder: Path) -> str | None:
    """Saves a small model of a class.

    Returns:
        Why transformers cannot make or read one; None: it can.
    """
    if find(name) is None:
        return "needs a package that is not installed"
    try:
        model = tiny_model(name)
    except ImportError as error:
        return f"needs {str(error).split(' requires the ')[-1].split(' library')[0]}, not installed"
    model.save_pretrained(folder)
    try:
        _, info = type(model).from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # whatever it is, it is not ours
        return f"transformers cannot read its own files: {str(error).splitlines()[0]}"
    missing = sorted(info["missing_keys"])
    return f"transformers misses {missing[0]} in its own files" if missing else None


def _share(streamed: StreamedModel, planned: Plan) -> float:
    """The quantized share of all matrices of the language model but embeddings and the head."""
    model = streamed.model
    roots = [f"{root}." if root else "" for root in _search_roots(model)]
    head = model.get_output_embeddings()
    kept = {
        id(w)
        for m in model.modules()
        if m is head or isinstance(m, torch.nn.Embedding)
        for w in m.parameters()
    }
    total = sum(
        weight.numel()
        for path, weight in model.named_parameters()
        if weight.ndim > 1
        and id(weight) not in kept
        and path.startswith(tuple(roots))
        and not path.startswith(tuple(f"{tower}." for tower in _towers(model)))
    )
    return sum(m.shape[0] * m.shape[1] for m in planned.modules if m.bits) / total


def _notes(streamed: StreamedModel, planned: Plan) -> Iterator[str]:
    """What stays as it is, and why."""
    reasons: dict[str, list[str]] = {}
    for module in planned.modules:
        if not module.bits and module.reason:
            reasons.setdefault(module.reason, []).append(module.name.rpartition(".")[2])
    for reason, names in reasons.items():
        yield f"`{'`, `'.join(dict.fromkeys(names))}`: {reason}"
    for block in streamed.blocks[:1]:
        if any(weight.ndim == 3 and "expert" in n for n, weight in block.module.named_parameters()):
            yield "experts: their class computes them in a way of its own"


@torch.no_grad()
def _compare(out: Path, dense: Path) -> None:
    """Compares the outputs of a quantized checkpoint with those of its dequantized weights."""
    try:  # weights are decoded in float64; kernels for float32 are less exact
        tolerance, (got, expected) = 1e-4, [_output(path, torch.float64) for path in (out, dense)]
    except RuntimeError:  # the class computes parts in float32
        tolerance, (got, expected) = 1e-3, [_output(path, torch.float32) for path in (out, dense)]
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def _output(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    model, _ = rw.load(folder, dtype=dtype)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no float64
    ids = torch.tensor(texts(seed=9, vocabulary=embedding_shape(model)[0]))
    answer = model(**forward_kwargs(model, ids))
    value: Any = getattr(answer, "logits", None)
    return answer[0] if value is None else value
