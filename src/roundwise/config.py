"""QuantizeConfig: every decision about how weights become codes, in one frozen object.

Knows the settings and which of them go together; knows nothing of models, files or tensors.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from roundwise.errors import ConfigError

Bits = Literal[2, 3, 4, 8]
Order = Literal["natural", "static", "group_aware"]
Method = Literal["gptq", "rtn", "awq"]
Prescale = Literal["none", "awq"]
Format = Literal["gptq", "gptq_v2"]
Experts = Literal["routed", "all"]
Mode = Literal["true_sequential", "block"]

Recipe = Literal["best", "textbook"]
GridSearch = Literal["minmax", "mse", "pivot"]

#: What a recipe sets; each setting can still be given.
RECIPES: dict[str, dict[str, Any]] = {
    "best": {},
    "textbook": {
        "order": "natural", "grid": "minmax", "grid_candidates": 1,
        "alpha": 0.0, "beta": 0.0, "refine": 0, "exchange": 1, "output_tokens": 0,
    },
}  # fmt: skip

#: What a per-module override may change; the keys are those of `quantization_config.dynamic`.
OVERRIDABLE = ("bits", "group_size", "sym", "desc_act")


class Settings(BaseModel):
    """Base of all settings: immutable, and `ConfigError` instead of pydantic's error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(_explain(error, type(self))) from None


class CalibrationConfig(Settings):
    """How calibration text becomes batches of token windows. Immutable."""

    samples: int = Field(128, description="Calibration windows.")
    seq_len: int = Field(2048, description="Tokens of a window.")
    batch_size: int = Field(8, description="Windows in one forward.")
    seed: int = Field(0, description="Random seed for choosing calibration windows.")
    only: str | None = Field(
        None,
        description="assistant: of chats, only what the assistant wrote counts; the rest is context.",
    )


class RunConfig(Settings):
    """How a run is carried out; nothing here but `mode` and `device` changes its result. Immutable."""

    mode: Mode | None = Field(
        None,
        description="true_sequential: each layer sees already quantized predecessors in its block; "
        "block: all layers of a block at once, in less memory. Chosen by memory if not given.",
    )
    max_memory: int | str | None = Field(
        None, description="Memory budget, such as 8GB; a run that needs more says so."
    )
    device: str = Field(
        "auto", description="Device to compute on: auto (the first GPU, or the CPU), cpu, cuda, cuda:1."
    )
    restart: bool = Field(False, description="Discard finished blocks and begin anew.")
    strict: bool = Field(False, description="Fail if any option cannot be honoured.")


class QuantizeConfig(Settings):
    """How to quantize. Immutable; equal configs give equal checkpoints.

    Raises `ConfigError` on construction when a value cannot be. References: GPTQ is Frantar et al.,
    2022 (arXiv 2210.17323); act-order and static groups come with its reference implementation.
    """

    bits: Bits = Field(4, description="Width of a code.")
    group_size: int = Field(
        128, description="Input channels that share a scale and a zero point; -1: all of them."
    )
    sym: bool = Field(True, description="Symmetric grid: the zero point is fixed in the middle.")
    desc_act: bool = Field(
        False,
        description="Act-order in the file: groups are formed in order of sensitivity (g_idx).",
    )
    order: Order = Field(
        "group_aware",
        description="Order of columns when desc_act is off: natural; static (grids fixed per group "
        "first, then most sensitive column first); group_aware (sorted inside each group, groups "
        "by their most sensitive column). All three leave g_idx trivial.",
    )
    damp_percent: float | Literal["auto"] = Field(
        0.01,
        description="Damping: this part of mean(diag H) is added to diag H. auto: whichever of a few "
        "loses least on calibration tokens that are held out, for each layer input.",
    )
    method: Method = Field(
        "gptq",
        description="gptq; awq: activation-aware scales, then round to nearest on searched grids; "
        "rtn: round to nearest, the baseline.",
    )
    prescale: Prescale = Field(
        "none",
        description="awq: before quantizing, input channels that carry much are scaled up and the "
        "gains of the norm in front as much down; the model's function stays as it is.",
    )
    format: Format = Field(
        "gptq",
        description="Zero points minus one (gptq) or as they are (gptq_v2, the default if not sym).",
    )
    recipe: Recipe = Field(
        "best",
        description="Where order, grid, grid_candidates, alpha, beta, refine, exchange and "
        "output_tokens start from: best, or textbook: GPTQ exactly as published.",
    )
    grid: GridSearch = Field(
        "pivot",
        description="Range of a group: minmax; mse (least squared error); pivot (errors weighed by what "
        "they cost after compensation).",
    )
    positive_scales: bool = Field(
        False,
        description="Symmetric ranges are never turned around by a negative scale, which would put the "
        "one code more on the other side of zero; for readers that take scales to be positive.",
    )
    grid_candidates: int = Field(
        8,
        ge=1,
        le=64,
        description="Grids per group that are rounded with to compare their true loss.",
    )
    alpha: float = Field(
        1.0,
        ge=0.0,
        le=1.0,
        description="Correction for the drift of a layer's input (GPTAQ, Qronos).",
    )
    beta: float = Field(
        1.0, ge=0.0, le=1.0, description="Correction for the drift of the residual stream added to."
    )
    refine: int = Field(
        1,
        ge=0,
        le=20,
        description="Rounds of scale refit and better codes after rounding (QuantEase, CDQuant).",
    )
    exchange: int = Field(
        8,
        ge=1,
        le=64,
        description="Codes of a row that may move together while refining; 1: coordinate descent.",
    )
    output_tokens: int = Field(
        4096,
        ge=0,
        description="Calibration tokens that go through the original model and back beforehand, so "
        "that errors are weighed by what they cost the model, and outputs make up for each other "
        "(YAQA). 0: all outputs alike, each by itself.",
    )
    experts: Experts = Field(
        "routed",
        description="Calibration tokens of an expert: routed, those its router sends there, or all of "
        "them if that is fewer than expert_tokens; all: every token passes every expert.",
    )
    expert_tokens: int = Field(
        256, ge=0, description="Fewest routed tokens that an expert's Hessian may be made from."
    )
    lm_head: bool = Field(
        False,
        description="Quantize the output head too; one that is tied to the embedding gets a weight of "
        "its own.",
    )
    target_bpw: float | None = Field(
        None,
        gt=0.0,
        le=16.0,
        description="Bits per weight, everything counted: each layer gets the width and group size that "
        "lose least together. bits and group_size are left to layers that nothing is chosen for.",
    )
    target_widths: tuple[Literal[2, 3, 4, 8], ...] = Field(
        (2, 3, 4, 8),
        min_length=1,
        description="Widths that target_bpw chooses from: 4 and 8 are what vLLM serves.",
    )
    rotate: bool = Field(
        False,
        description="Rotate the residual stream before quantizing, folded into the weights (QuaRot): "
        "outlier channels are spread over all others. The model's function stays as it is.",
    )
    rotation_seed: int = Field(0, ge=0, description="Which rotation.")
    dynamic: dict[str, dict[str, Any] | None] = Field(
        default_factory=dict,
        description="Overrides by module name: regex -> {bits, group_size, sym, desc_act}, or None "
        "to leave the module as it is. The first pattern found in the name wins.",
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
            if value == "auto" or 0.0 <= float(value) <= 10.0:
                return value
        except (TypeError, ValueError):
            pass
        raise ValueError("must be auto, or a number from 0 to 10")

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
    def _target_needs_activations(self) -> QuantizeConfig:
        if self.method == "rtn" and self.target_bpw is not None:
            raise ValueError("target_bpw looks at activations, which rtn does not: use method=gptq")
        return self

    @model_validator(mode="after")
    def _prescale_needs_activations(self) -> QuantizeConfig:
        if self.method == "rtn" and self.prescale != "none":
            raise ValueError(
                "prescale=awq looks at activations, which rtn does not: use method=awq"
            )
        return self

    @property
    def prescales(self) -> bool:
        """Activation-aware scales are folded into norms."""
        return self.prescale == "awq" or self.method == "awq"

    @property
    def maxq(self) -> int:
        """Largest code, 2^bits - 1."""
        return int(2**self.bits) - 1

    @property
    def min_zero(self) -> int:
        """Smallest zero point the file can hold: v1 stores zero - 1, so zero = 0 is avoided there."""
        return 1 if self.format == "gptq" else 0

    @property
    def needs_gradients(self) -> bool:
        """The original model must be run forward and backward beforehand."""
        return self.method == "gptq" and self.output_tokens > 0

    @property
    def needs_reference(self) -> bool:
        """The original model must be run beside the quantized one."""
        each = [self, *(self.merged(changes) for changes in self.dynamic.values() if changes)]
        return self.method == "gptq" and any(config.alpha > 0 or config.beta > 0 for config in each)

    def columns_per_group(self, in_features: int) -> int:
        """Input channels that share a grid."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        """Number of groups along `in_features` input channels."""
        return -(-in_features // self.columns_per_group(in_features))

    def merged(self, changes: dict[str, Any]) -> QuantizeConfig:
        """This config with some settings replaced and no overrides of its own."""
        return QuantizeConfig(**{**self.model_dump(exclude={"dynamic"}), **changes})

    def is_overridden(self, name: str) -> bool:
        """Whether a pattern of `dynamic` decides about the module `name`."""
        return any(re.search(pattern, name) for pattern in self.dynamic)

    def for_module(self, name: str) -> QuantizeConfig | None:
        """Settings for the module `name`; None: leave it as it is."""
        for pattern, changes in self.dynamic.items():
            if re.search(pattern, name):
                return None if changes is None else self.merged(changes)
        return self


def _defaults(data: dict[str, Any]) -> dict[str, Any]:
    """What follows from other settings, unless given."""
    # GPTQModel reads asymmetric v1 files only if it wrote them itself; v2 it reads from everyone.
    follows = {} if data.get("sym", True) else {"format": "gptq_v2"}
    return {**follows, **RECIPES.get(str(data.get("recipe", "best")), {})}


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """One sentence per wrong setting, in the user's words."""
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            lines.append(f"there is no setting {name!r}; settings are {known}")
        elif item["type"] == "literal_error":
            expected = item.get("ctx", {}).get("expected", "")
            lines.append(f"{name}={item['input']!r} is not supported: use {expected}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{name}={item['input']!r}: {message}" if name else message)
    return "; ".join(lines)
