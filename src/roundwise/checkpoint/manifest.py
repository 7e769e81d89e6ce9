"""What a run writes down, as it must look when it is read again: files can be damaged, or another's.

Keys that are not named here are kept and not looked at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

#: Folder in the output folder that holds what an unfinished run needs.
WORK = ".roundwise"


def _plain_file_name(name: str) -> str:
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise ValueError(f"{name!r} is not in the folder")
    return name


FileName = Annotated[str, AfterValidator(_plain_file_name)]


class Record(BaseModel):
    """A JSON object of ours."""

    model_config = ConfigDict(extra="allow", strict=True)


class LayerRecord(Record):
    """A quantized layer."""

    name: str
    bits: int
    group_size: int
    relative_error: float | None
    weight_error: float
    damp_percent: float | None
    damp_tried: list[float]
    tokens: int
    fallback: str | None


class SavedActivations(Record):
    """What a block returned to every batch."""

    files: dict[FileName, str]
    places: int | None


class CurvePoint(Record):
    """How well codes from so many tokens do on others."""

    tokens: int
    relative_error: float


class LearningCurveRecord(Record):
    """Whether more calibration text would help a layer."""

    name: str
    held_out_tokens: int
    rtn: float
    points: list[CurvePoint]


class BlockSummary(Record):
    """What is known of a block as a whole."""

    name: str
    depth_error: float | None
    saturation: LearningCurveRecord | None


class BlockRecord(BlockSummary):
    """One of the journal."""

    block: int
    shard: FileName
    sha256: str
    activations: SavedActivations | None
    layers: list[LayerRecord]
    experts: dict[str, list[int]]
    seconds: dict[str, float]


class ExpertCoverage(Record):
    """A module of experts, and how many calibration tokens its router sent to each."""

    name: str
    tokens: list[int]


class RunRecord(Record):
    """roundwise-run.json."""

    seconds: float
    phases: dict[str, float]
    blocks: list[float]
    peak_rss_bytes: int
    warnings: list[str]
    not_as_asked: list[str]


class Fingerprint(Record):
    """What a run was made with: only what is taken over from it is looked at, the rest is compared."""

    mode: Literal["true_sequential", "block", "none"] = "none"
    threads: int = Field(1, ge=1, le=4096)
    """At most more than any machine has."""
    config: dict[str, Any] = {}
    model: dict[str, Any] = {}


class Manifest(Record):
    """roundwise.json."""

    run: Fingerprint
    mode: str
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    layers: list[LayerRecord]
    blocks: list[BlockSummary] = []
    experts: list[ExpertCoverage] = []
    files: dict[FileName, str]


def validation_error(kind: Any, value: Any) -> str | None:
    """Where a value does not look like a record, or a list of them; None: it does.

    Args:
        kind: `Manifest`, `list[BlockRecord]` …
        value: parsed JSON.
    """
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        return f"{place}: {first['msg'].removeprefix('Value error, ')}"
    return None
