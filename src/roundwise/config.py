"""All settings, as frozen pydantic models: `QuantizeConfig`, `CalibrationConfig`, `RunConfig`.

The command line makes its options from their fields: the description is the help text, `Panel` the
place in `--help`. This module knows which settings go together; it does not know models, files or
tensors.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from roundwise.settings import Flags, Panel, Settings

Bits = Literal[2, 3, 4, 5, 6, 7, 8]
Order = Literal["natural", "static", "group_aware"]
Method = Literal["gptq", "rtn"]
Format = Literal["gptq", "gptq_v2", "compressed-tensors"]
Experts = Literal["routed", "all"]
Mode = Literal["true_sequential", "block"]

Recipe = Literal["best", "textbook"]
GridSearch = Literal["minmax", "mse", "pivot"]

#: Defaults that a recipe changes; a setting that is given explicitly wins.
RECIPES: dict[str, dict[str, Any]] = {
    "best": {},
    "textbook": {
        "order": "natural", "grid": "minmax", "grid_candidates": 1,
        "alpha": 0.0, "beta": 0.0, "refine": 0, "exchange": 1, "output_tokens": 0,
    },
}  # fmt: skip

#: Settings whose default depends on another one, on `recipe` or `sym`, or on the model.
DEPENDENT_DEFAULTS = frozenset({"format", "group_size", "target_widths"}.union(*RECIPES.values()))

#: Settings that a per-module override may change; the keys are those of `quantization_config.dynamic`.
OVERRIDABLE = ("bits", "group_size", "sym", "desc_act")


class CalibrationConfig(Settings):
    """Settings for turning calibration text into batches of token windows. Immutable."""

    samples: Annotated[int, Panel.CALIBRATION] = Field(
        128, description="Number of calibration windows."
    )
    seq_len: Annotated[int, Panel.CALIBRATION] = Field(
        2048, description="Tokens per calibration window."
    )
    batch_size: Annotated[int, Panel.CALIBRATION] = Field(
        8,
        description="Calibration windows per forward pass; fewer if there would be less than 8 batches, "
        "of which the default recipe holds one out.",
    )
    seed: Annotated[int, Panel.CALIBRATION] = Field(
        0, description="Random seed for choosing calibration windows."
    )
    only: Annotated[str | None, Panel.CALIBRATION] = Field(
        None,
        description="Part of chats to fit to: assistant (only what the assistant wrote; the rest is "
        "context); default: all of it.",
    )
    special_tokens: Annotated[
        bool, Panel.CALIBRATION, Flags({"--special-tokens/--no-special-tokens": ""})
    ] = Field(
        True,
        description="Put the special tokens that the tokenizer adds to a text, such as <bos>, around "
        "every window.",
    )


class RunConfig(Settings):
    """Settings of carrying out a run; only `mode` and `device` change its result. Immutable."""

    mode: Annotated[Mode | None, Panel.MEMORY] = Field(
        None,
        description="Order of work in a block: true_sequential (each layer sees already quantized "
        "predecessors) or block (all layers at once, in less memory); default: chosen by memory.",
    )
    max_memory: Annotated[int | str | None, Panel.MEMORY] = Field(
        None, description="Memory budget, such as 8GB; a run that needs more reports it."
    )
    device: Annotated[str, Panel.MEMORY] = Field(
        "auto",
        description="Device to compute on: auto (the first GPU, else the CPU), cpu, cuda, cuda:1.",
    )
    restart: Annotated[bool, Panel.RUN] = Field(
        False, description="Discard finished blocks and start again."
    )
    strict: Annotated[bool, Panel.RUN] = Field(
        False, description="Fail if any option cannot be honoured."
    )


class QuantizeConfig(Settings):
    """Settings of quantization. Immutable; equal configs give equal checkpoints.

    Raises `ConfigError` on construction when a value is invalid. References: GPTQ is Frantar et al.,
    2022 (arXiv 2210.17323); act-order and static groups come with its reference implementation.
    """

    bits: Annotated[Bits, Panel.FORMAT] = Field(4, description="Bits per weight: 2 to 8.")
    group_size: Annotated[int, Panel.FORMAT] = Field(
        128,
        description="Input channels that share a scale and a zero point; -1: all of them; not given: "
        "the largest of 128, 64 and 32 that divides the input channels of all layers.",
    )
    sym: Annotated[bool, Panel.FORMAT, Flags({"--sym/--asym": ""})] = Field(
        True,
        description="Symmetric grid (fixed zero point) or asymmetric grid (searched zero point).",
    )
    desc_act: Annotated[bool, Panel.FORMAT] = Field(
        False,
        description="Act-order in the file: groups are formed in order of sensitivity and g_idx is "
        "stored (few engines support it).",
    )
    order: Annotated[Order, Panel.RECIPE] = Field(
        "group_aware",
        description="Column order without --desc-act: natural; static (grids fixed per group first, "
        "then most sensitive column first); group_aware (sorted inside each group, groups by their "
        "most sensitive column). All three leave g_idx trivial.",
    )
    damp_percent: Annotated[float, Panel.RECIPE] = Field(
        0.01, description="Damping: fraction of mean(diag H) that is added to diag H."
    )
    method: Annotated[Method, Panel.RECIPE] = Field(
        "gptq",
        description="Quantization method: gptq, or rtn (round to nearest, the baseline).",
    )
    format: Annotated[Format, Panel.FORMAT] = Field(
        "gptq",
        description="File format: gptq (v1, zero points stored minus one; default with --sym), gptq_v2 "
        "(zero points unchanged; default with --asym) or compressed-tensors (pack-quantized).",
    )
    recipe: Annotated[Recipe, Panel.RECIPE] = Field(
        "best",
        description="Defaults of --order, --grid, --grid-candidates, --alpha, --beta, --refine, "
        "--exchange and --output-tokens: best, or textbook (GPTQ exactly as published).",
    )
    grid: Annotated[GridSearch, Panel.RECIPE] = Field(
        "pivot",
        description="Range of each group: minmax; mse (least squared error); pivot (errors weighted by "
        "their cost after compensation).",
    )
    positive_scales: Annotated[bool, Panel.FORMAT] = Field(
        False, description="Use positive scales only (some readers need it)."
    )
    grid_candidates: Annotated[int, Panel.RECIPE] = Field(
        8,
        ge=1,
        le=64,
        description="Candidate grids per group, compared by their true loss after rounding.",
    )
    alpha: Annotated[float, Panel.RECIPE] = Field(
        1.0,
        ge=0.0,
        le=1.0,
        description="Correction for the drift of a layer's input, 0 to 1 (GPTAQ, Qronos).",
    )
    beta: Annotated[float, Panel.RECIPE] = Field(
        1.0,
        ge=0.0,
        le=1.0,
        description="Correction for the drift of the residual stream, 0 to 1.",
    )
    refine: Annotated[int, Panel.RECIPE] = Field(
        1,
        ge=0,
        le=20,
        description="Rounds of scale and code improvement after rounding (QuantEase, CDQuant).",
    )
    exchange: Annotated[int, Panel.RECIPE] = Field(
        8,
        ge=1,
        le=64,
        description="Codes of a row that may change together in --refine; 1: coordinate descent.",
    )
    output_tokens: Annotated[int, Panel.RECIPE] = Field(
        4096,
        ge=0,
        description="Calibration tokens of a forward and backward pass through the original model, "
        "which tells how much the error of each output costs the model and lets outputs compensate "
        "for each other (YAQA); 0: every output counts the same and stands alone.",
    )
    experts: Annotated[Experts, Panel.CALIBRATION] = Field(
        "routed",
        description="Calibration tokens of an expert: routed (those its router sends to it; all of them "
        "if that is fewer than --expert-tokens) or all (every token).",
    )
    expert_tokens: Annotated[int, Panel.CALIBRATION] = Field(
        256,
        ge=0,
        description="Fewest routed tokens for the Hessian of an expert; one with fewer gets all tokens "
        "and is reported.",
    )
    lm_head: Annotated[bool, Panel.FORMAT] = Field(
        False,
        description="Quantize the output head too; if it is tied to the embedding, it is untied first.",
    )
    towers: Annotated[bool, Panel.FORMAT] = Field(
        False,
        description="Quantize the vision and audio towers too, calibrated with records that have "
        "pictures or sounds; rtn needs none.",
    )
    target_bpw: Annotated[float | None, Panel.FORMAT] = Field(
        None,
        gt=0.0,
        le=16.0,
        description="Bits per weight of the result, scales and zero points included: each layer gets "
        "the width and group size that together lose least. Other layers use --bits and --group-size.",
    )
    target_widths: Annotated[tuple[Bits, ...], Panel.FORMAT] = Field(
        (2, 3, 4, 8),
        min_length=1,
        description="Widths that --target-bpw chooses from; default: 2,3,4,8, in compressed-tensors 5,6 "
        "too (vLLM serves 4,8 from GPTQ files).",
    )
    rotate: Annotated[bool, Panel.RECIPE] = Field(
        False,
        description="Rotate the residual stream before quantizing, folded into the weights (QuaRot), to "
        "spread outlier channels over all channels; the model computes the same function.",
    )
    rotation_seed: Annotated[int, Panel.RECIPE] = Field(
        0, ge=0, description="Seed of the random rotation."
    )
    dynamic: Annotated[
        dict[str, dict[str, Any] | None],
        Panel.FORMAT,
        Flags(
            {
                "--override": "Settings of modules whose name matches, such as "
                "'REGEX=bits:8,group_size:32'; can be repeated.",
                "--skip": "Regular expression of modules that are not quantized; can be repeated.",
            }
        ),
    ] = Field(
        default_factory=dict,
        description="Overrides by module name: regex -> {bits, group_size, sym, desc_act}, or None "
        "to leave the module unquantized. The first pattern found in the name wins.",
    )

    def __init__(self, **data: Any) -> None:
        super().__init__(**{**_defaults(data), **data})

    @field_validator("group_size")
    @classmethod
    def _group_size(cls, value: int) -> int:
        if value != -1 and (value < 8 or value % 8):
            raise ValueError("must be -1 (one group for all input channels) or a multiple of 8")
        return value

    @field_validator("damp_percent", mode="before")
    @classmethod
    def _damp_percent(cls, value: Any) -> Any:
        try:
            if 0.0 <= float(value) <= 10.0:
                return float(value)
        except (TypeError, ValueError):
            pass
        raise ValueError("must be a number from 0 to 10")

    @field_validator("dynamic")
    @classmethod
    def _dynamic(cls, value: dict[str, dict[str, Any] | None]) -> dict[str, dict[str, Any] | None]:
        for pattern, changes in value.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
            unknown = set(changes or {}) - set(OVERRIDABLE)
            if unknown:
                raise ValueError(
                    f"{pattern!r} changes {', '.join(sorted(unknown))}; "
                    f"an override may change {', '.join(OVERRIDABLE)}"
                )
        return value

    @model_validator(mode="after")
    def _overrides_are_configs(self) -> QuantizeConfig:
        for changes in self.dynamic.values():
            if changes:
                self.merged(changes)
        return self

    @model_validator(mode="after")
    def _settings_go_together(self) -> QuantizeConfig:
        if self.format == "compressed-tensors" and self.desc_act:
            raise ValueError(
                "desc_act=True cannot be stored in compressed-tensors, whose readers have dropped "
                "act-order: use desc_act=False (--order keeps most of its gain) or format=gptq"
            )
        needs = "needs activations, which rtn does not use: use method="
        if self.method == "rtn" and self.target_bpw is not None:
            raise ValueError(f"target_bpw {needs}gptq")
        return self

    @property
    def chooses_group_size(self) -> bool:
        """True if no group size was given: the model decides (`plan.layer_formats`)."""
        return "group_size" not in self.model_fields_set

    @property
    def maxq(self) -> int:
        """Largest code, 2^bits - 1."""
        return int(2**self.bits) - 1

    @property
    def needs_gradients(self) -> bool:
        """True if the original model must be run forward and backward before quantizing."""
        return self.method == "gptq" and self.output_tokens > 0

    @property
    def needs_reference(self) -> bool:
        """True if the original model must be run next to the quantized one."""
        each = [self, *(self.merged(changes) for changes in self.dynamic.values() if changes)]
        return self.method == "gptq" and any(config.alpha > 0 or config.beta > 0 for config in each)

    def columns_per_group(self, in_features: int) -> int:
        """Number of input channels that share a grid."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        """Number of groups along `in_features` input channels."""
        return -(-in_features // self.columns_per_group(in_features))

    def merged(self, changes: dict[str, Any]) -> QuantizeConfig:
        """Returns this config with some settings replaced, and without `dynamic`."""
        return QuantizeConfig(**{**self.model_dump(exclude={"dynamic"}), **changes})

    def is_overridden(self, name: str) -> bool:
        """Returns True if a pattern of `dynamic` matches the module `name`."""
        return any(re.search(pattern, name) for pattern in self.dynamic)

    def for_module(self, name: str) -> QuantizeConfig | None:
        """Returns the settings of the module `name`; None: it is not quantized."""
        for pattern, changes in self.dynamic.items():
            if re.search(pattern, name):
                return None if changes is None else self.merged(changes)
        return self


def _defaults(data: dict[str, Any]) -> dict[str, Any]:
    """Returns defaults that depend on other settings."""
    # GPTQModel reads asymmetric v1 files only if it wrote them itself, but v2 files of any tool.
    file_format: dict[str, Any] = {} if data.get("sym", True) else {"format": "gptq_v2"}
    if data.get("format") == "compressed-tensors":  # GPTQModel has no 5 and 6 bits
        file_format["target_widths"] = (2, 3, 4, 5, 6, 8)
    return {**file_format, **RECIPES.get(str(data.get("recipe", "best")), {})}
