"""`roundwise quantize`.

`roundwise quantize --from-manifest`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from roundwise.cli.commands import report
from roundwise.cli.progress import JsonOption, Steps, print_json, stdout, steps
from roundwise.errors import ConfigError
from roundwise.system.memory import format_size

if TYPE_CHECKING:
    from roundwise.run.api import Progress, QuantizeResult


def command(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Model folder, or id on the Hugging Face hub.")
    ] = None,
    out: Annotated[Path | None, typer.Argument(help="Folder for the quantized checkpoint.")] = None,
    bits: Annotated[int, typer.Option(help="Width of a weight: 2, 3, 4 or 8.")] = 4,
    group_size: Annotated[
        int, typer.Option(help="Input channels that share a scale; -1: all of them.")
    ] = 128,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Fixed or searched zero point.")] = True,
    desc_act: Annotated[
        bool, typer.Option("--desc-act", help="Act-order in the file (few servers take it).")
    ] = False,
    recipe: Annotated[str, typer.Option(help="best, or textbook: GPTQ as published.")] = "best",
    order: Annotated[
        str | None,
        typer.Option(help="Order of columns without --desc-act: natural, static, group_aware."),
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="How ranges are chosen: minmax, mse, pivot.")
    ] = None,
    positive_scales: Annotated[
        bool,
        typer.Option("--positive-scales", help="No symmetric range turned by a negative scale."),
    ] = False,
    grid_candidates: Annotated[
        int | None, typer.Option(help="Ranges per group that are compared by their true loss.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Correction for the input's drift, 0 … 1.")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="Correction for the residual stream's drift, 0 … 1.")
    ] = None,
    refine: Annotated[
        int | None, typer.Option(help="Rounds of scale refit and better codes after rounding.")
    ] = None,
    exchange: Annotated[
        int | None, typer.Option(help="Codes of a row that may move together while refining.")
    ] = None,
    output_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a backward pass that tells which outputs matter; 0: none."),
    ] = None,
    damp_percent: Annotated[
        str, typer.Option(help="Damping, part of mean(diag H); auto: chosen on held-out tokens.")
    ] = "0.01",
    rotate: Annotated[
        bool,
        typer.Option("--rotate", help="Rotate the residual stream first, folded into the weights."),
    ] = False,
    rotation_seed: Annotated[int, typer.Option(help="Which rotation.")] = 0,
    target_bpw: Annotated[
        float | None,
        typer.Option(help="Bits per weight of the result: each layer gets what loses least."),
    ] = None,
    target_widths: Annotated[
        str, typer.Option(help="Widths that --target-bpw chooses from; vLLM serves 4,8.")
    ] = "2,3,4,8",
    method: Annotated[
        str,
        typer.Option(
            help="gptq; awq: activation-aware scales and rounding; rtn: round to nearest."
        ),
    ] = "gptq",
    prescale: Annotated[
        str, typer.Option(help="awq: activation-aware scales folded into the norms first.")
    ] = "none",
    format: Annotated[
        str | None,
        typer.Option(help="gptq (v1) or gptq_v2; the default is v1 with --sym, else v2."),
    ] = None,
    lm_head: Annotated[
        bool,
        typer.Option("--lm-head", help="Quantize the output head too; a tied one is untied first."),
    ] = False,
    experts: Annotated[
        str,
        typer.Option(help="Calibration tokens of an expert: routed, those sent to it; all: every."),
    ] = "routed",
    expert_tokens: Annotated[
        int, typer.Option(help="An expert that is sent fewer is given all tokens, and named.")
    ] = 256,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text or JSONL file, folder, pattern, python-stdlib, wikitext2, c4, github-code, or "
            "NAME:SPLIT:COLUMN; several with weights: code.txt:0.7,chat.jsonl:0.3; self: what the "
            "model writes."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the choice of windows.")] = 0,
    only: Annotated[
        str | None, typer.Option(help="assistant: of chats, only the assistant's turns count.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="'REGEX=bits:8,group_size:32' for some modules.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Regex of modules to leave as they are.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="true_sequential or block; chosen by memory if not given.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Budget, such as 8GB; a run that needs more says so.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:1; auto: the first GPU, or the CPU.")
    ] = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew in this folder.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="What does not go as asked is an error.")
    ] = False,
    from_manifest: Annotated[
        Path | None,
        typer.Option(help="Do the run of this checkpoint (or roundwise.json) again, and compare."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="OUT by name, with --from-manifest.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model into a checkpoint in the standard GPTQ format.

    A run that was stopped goes on where it was when the same command is given again. Several processes,
    on one machine or many, share a run: torchrun --nproc-per-node N -m roundwise quantize …
    """
    out = _one_folder(out, output)
    if from_manifest is not None:
        repeat_run(
            context, from_manifest, out, model=model, calibration=calibration,
            max_memory=max_memory, restart=restart, strict=strict, as_json=as_json,
        )  # fmt: skip
        return
    if model is None:
        raise ConfigError("which model? roundwise quantize MODEL OUT")
    from roundwise.config import QuantizeConfig
    from roundwise.run.api import quantize
    from roundwise.system.distributed import join_process_group
    from roundwise.system.memory import parse_mode

    given = {
        "order": order, "grid": grid, "grid_candidates": grid_candidates, "alpha": alpha,
        "beta": beta, "refine": refine, "exchange": exchange, "output_tokens": output_tokens,
        "format": format,
    }  # fmt: skip
    config = QuantizeConfig(
        bits=bits, group_size=group_size, sym=sym, desc_act=desc_act, recipe=recipe,
        damp_percent=number(damp_percent), method=method, prescale=prescale,
        positive_scales=positive_scales,
        lm_head=lm_head, experts=experts, expert_tokens=expert_tokens,
        rotate=rotate, rotation_seed=rotation_seed, target_bpw=target_bpw,
        target_widths=tuple(number(bits) for bits in target_widths.split(",")),
        dynamic=parse_dynamic(override or [], skip or []),
        **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip
    with join_process_group() as ranks, steps("quantizing", shown=ranks.first) as shown:
        result = quantize(
            model, out, config, calibration,
            samples=samples, seq_len=seq_len, batch_size=batch_size, seed=seed, only=only,
            mode=parse_mode(mode), max_memory=max_memory, device=device, restart=restart, strict=strict,
            progress=Reporter(shown),
        )  # fmt: skip
    if not ranks.first:
        return
    page = report.after_run(result.output)
    if as_json:
        print_json({**result.as_dict(), "report": str(page) if page else None})
    else:
        print_result(result, page)


def _one_folder(out: Path | None, output: Path | None) -> Path:
    found = [path for path in (out, output) if path is not None]
    if len(found) != 1:
        raise ConfigError("which folder for the result? roundwise quantize MODEL OUT")
    return found[0]


def parse_dynamic(overrides: list[str], skips: list[str]) -> dict[str, dict[str, Any] | None]:
    """`QuantizeConfig.dynamic` from --override and --skip."""
    dynamic: dict[str, dict[str, Any] | None] = dict.fromkeys(skips)
    for text in overrides:
        pattern, equals, changes = text.rpartition("=")
        found = [re.fullmatch(r"\s*(\w+)\s*:\s*([\w-]+)\s*", part) for part in changes.split(",")]
        if not equals or not all(found):
            raise ConfigError(f"--override {text!r}: write it as 'REGEX=bits:8,group_size:32'")
        dynamic[pattern] = {m[1]: _value(m[2]) for m in found if m}
    return dynamic


def number(text: str) -> int | float | str:
    """The number that `text` is; other text stays as it is, for the config to judge."""
    try:
        value = float(text)
        return int(value) if value.is_integer() else value
    except ValueError:
        return text


def _value(text: str) -> int | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else text


class Reporter:
    """Turns progress of a run into a bar or lines."""

    def __init__(self, shown: Steps) -> None:
        self._shown, self._errors = shown, list[str]()

    def __call__(self, step: Progress) -> None:
        """Takes one step of the run."""
        if step.layer is not None:
            error = step.layer["relative_error"]
            short = step.layer["name"].rsplit(".", 1)[-1]
            self._errors.append(f"{short} {error:.2e}" if error is not None else short)
            self._shown.update(self._part(step, 0), f"{step.layer['name']}")
            return
        part = self._part(step, 1)
        self._shown.update(part)
        self._shown.line(
            f"block {step.block + 1}/{step.blocks}  {'  '.join(self._errors)}  {self._shown.eta(part)}"
        )
        self._errors = []

    @staticmethod
    def _part(step: Progress, more: int) -> float:
        """Finished part of what this run has to do; blocks of earlier runs do not count."""
        return (step.block + more - step.resumed) / (step.blocks - step.resumed)


def print_result(result: QuantizeResult, page: Path | None = None) -> None:
    """What a run did, in words; last, what did not go as asked."""
    from roundwise.run.block_solver import widths

    solved = [layer for layer in result.layers if layer["fallback"] is None]
    stdout.print(
        f"{len(result.layers)} layers in {result.seconds:.1f} s, {result.bits_per_weight:.2f} bits per "
        f"weight, {format_size(result.bytes_before)} -> {format_size(result.bytes_after)}, "
        f"peak memory {_peak(result)}, mode {result.mode}",
        highlight=False,
    )
    for kind, found in widths(result.layers).items():
        stdout.print(f"{kind}: {found}", highlight=False, soft_wrap=True)
    if result.experts:
        stdout.print(coverage(result.experts), highlight=False)
    errors = [layer["relative_error"] for layer in solved if layer["relative_error"] is not None]
    if errors:
        worst = max(solved, key=lambda layer: layer["relative_error"] or 0.0)
        stdout.print(
            f"relative output error: mean {sum(errors) / len(errors):.2e}, "
            f"largest {max(errors):.2e} ({worst['name']})",
            highlight=False,
        )
    for text in result.warnings:
        stdout.print(f"[yellow]note:[/] {text}", highlight=False, soft_wrap=True)
    if page is not None:
        stdout.print(f"report: {page}", highlight=False, soft_wrap=True)
    stdout.print(f"verified, saved in {result.output}", highlight=False, soft_wrap=True)
    for text in result.not_as_asked:
        stdout.print(f"[red]not as asked:[/] {text}", highlight=False, soft_wrap=True)


def _peak(result: QuantizeResult) -> str:
    host = format_size(result.peak_rss_bytes)
    if result.peak_device_bytes is None:
        return host
    return f"{format_size(result.peak_device_bytes)} on {result.device} and {host}"


def coverage(experts: list[dict[str, Any]]) -> str:
    """One line on how many tokens the experts were sent."""
    counts = sorted(tokens for line in experts for tokens in line["tokens"])
    return (
        f"{len(counts)} experts in {len(experts)} layers: {counts[0]} to {counts[-1]} calibration "
        f"tokens each, half of them {counts[len(counts) // 2]} or more"
    )


#: What may be given beside --from-manifest; all else is in the manifest.
ALLOWED = {
    "model", "out", "output", "from_manifest", "calibration", "max_memory", "restart", "strict",
    "as_json",
}  # fmt: skip


def repeat_run(
    context: typer.Context,
    manifest: Path,
    out: Path,
    *,
    model: str | None,
    calibration: str | None,
    max_memory: str | None,
    restart: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Does a run again and compares; exit code 1 if a file differs."""
    from roundwise.run.reproduce import reproduce

    others = sorted(
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in ALLOWED and _given(context, name)
    )
    if others:
        raise ConfigError(
            f"{', '.join(others)}: the settings are those of the manifest, leave them out"
        )
    with steps("quantizing") as shown:
        found = reproduce(
            manifest, out, model=model, calibration=calibration, max_memory=max_memory,
            restart=restart, strict=strict, progress=Reporter(shown),
        )  # fmt: skip
    if as_json:
        print_json(found.as_dict())
    else:
        print_result(found.result)
        for name, same in found.files.items():
            stdout.print(
                f"{name}: {'equal' if same else 'different'}", highlight=False, soft_wrap=True
            )
        verdict = "the same bytes" if found.same else "not the same bytes"
        differs = f"; the machines differ in {found.platform}" if found.platform else ""
        stdout.print(f"{verdict} as {manifest}{differs}", highlight=False, soft_wrap=True)
    if not found.same:
        raise typer.Exit(1)


def _given(context: typer.Context, name: str) -> bool:
    """The option stands on the repeat_run line."""
    source = context.get_parameter_source(name)
    # By name: newer versions of typer bring a click of their own.
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")
