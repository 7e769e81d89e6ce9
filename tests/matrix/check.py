"""Runs a class of models through everything, and says what came of it."""

from __future__ import annotations

import re
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
from roundwise.model.blocks import _search_roots, towers
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
        planned = plan(streamed, CONFIG, samples=SAMPLES, seq_len=LENGTH)
    except ConfigError as error:
        return Row(name, notes=(str(error),))
    layers = [module for module in planned.modules if module.bits]
    row = Row(name, len(layers), _share(streamed, planned), tuple(_notes(streamed, planned)))
    config, notes = CONFIG, row.notes
    ids = texts(vocabulary=embedding_shape(streamed.model)[0])
    try:
        result = rw.quantize(source, out, config, ids, samples=SAMPLES, seq_len=LENGTH)
    except VerificationError:
        raise
    except RoundwiseError as error:
        reason = str(error).removesuffix(": use --method rtn")
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
        Why there is none that transformers makes, writes and reads; None: there is one.
    """
    if find(name) is None:
        return "needs a package that is not installed"
    try:
        model = tiny_model(name)
    except ImportError as error:
        return f"needs {_package(error)}, which is not installed"
    except Exception as error:  # whatever it is, it is not ours
        return f"no small model can be made of its config's defaults: {last_line(error)}"
    try:
        model.save_pretrained(folder)
        _, info = type(model).from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        return f"transformers cannot read its own files: {last_line(error)}"
    missing = sorted(info["missing_keys"])
    return f"transformers misses {missing[0]} in its own files" if missing else None


def _package(error: ImportError) -> str:
    return str(error).split(" requires the ")[-1].split(" library")[0]


def last_line(error: Exception) -> str:
    """Class and last line of an error."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *(line.strip()[:150] for line in lines[-1:])])


def _matrices(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The matrices of a language model that are in lists of modules and are no embeddings."""
    roots = tuple(f"{root}." if root else "" for root in _search_roots(model))
    outside = tuple(f"{tower}." for tower in towers(model))
    others = [m for m in model.modules() if isinstance(m, torch.nn.Embedding | torch.nn.Conv1d)]
    kept = {id(weight) for module in others for weight in module.parameters()}
    for path, weight in model.named_parameters():
        in_list = re.search(r"\.\d+\.", f".{path}") and path.startswith(roots)
        if weight.ndim > 1 and in_list and id(weight) not in kept and not path.startswith(outside):
            yield path, weight


def _share(streamed: StreamedModel, planned: Plan) -> float:
    total = sum(weight.numel() for _, weight in _matrices(streamed.model))
    return sum(m.shape[0] * m.shape[1] for m in planned.modules if m.bits) / max(1, total)


def _notes(streamed: StreamedModel, planned: Plan) -> Iterator[str]:
    """What stays as it is, and why."""
    reasons: dict[str, list[str]] = {}
    for module in planned.modules:
        if not module.bits and module.reason:
            reasons.setdefault(module.reason, []).append(module.name)
    for reason, names in reasons.items():
        yield f"{_listed(names)}: {reason}"
    seen = {f"{module.name}.weight" for module in planned.modules}
    paths = [path for path, _ in _matrices(streamed.model) if path not in seen]
    blocks = tuple(f"{b.name}." for b in [*streamed.blocks, *streamed.skipped_blocks])
    inside = [path for path in paths if path.startswith(blocks)]
    outside = [path.removesuffix(".weight") for path in paths if not path.startswith(blocks)]
    if inside:
        yield f"{_listed(inside)}: not the weight of a linear layer"
    if outside:
        yield f"{_listed(outside)}: outside of the blocks"


def _listed(paths: list[str]) -> str:
    names = list(dict.fromkeys(p.removesuffix(".weight").rpartition(".")[2] for p in paths))
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"`{'`, `'.join(names[:6])}`{more}"


@torch.no_grad()
def _compare(out: Path, dense: Path) -> None:
    """Compares the outputs of a quantized checkpoint with those of its dequantized weights."""
    # In float64 weights are decoded; kernels for float32 are less exact. Some classes know only float32.
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.float32, 1e-3)):
        try:
            got, expected = (_output(path, dtype) for path in (out, dense))
        except RuntimeError:
            if dtype == torch.float32:
                raise
            continue
        if bool(torch.isfinite(expected).all()):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
            return
    raise AssertionError("the output of the model is not finite")


def _output(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    model, _ = rw.load(folder, dtype=dtype)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no float64
    ids = torch.tensor(texts(seed=9, vocabulary=embedding_shape(model)[0]))
    with torch.random.fork_rng():
        torch.manual_seed(0)  # a voice's length is drawn (VITS)
        answer = model(**forward_kwargs(model, ids))
    value: Any = getattr(answer, "logits", None)
    return answer[0] if value is None else value
