"""Records that a run writes: manifest, journal lines, timings. Each is made once, and checked when read.

    OUT/roundwise.json        `Manifest`: what was made, from what, how; equal runs write equal manifests
    OUT/roundwise-run.json    `RunRecord`: how long the run took, and its issues
    OUT/.roundwise/           work folder of an unfinished run (`run.journal`)

The files can be damaged, or somebody else's. Keys that are not named here are kept and not checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from roundwise.checkpoint.side_files import OWN_FILES
from roundwise.checkpoint.untrusted import read_json
from roundwise.errors import CheckpointError

MANIFEST, RUN = OWN_FILES[:2]

R = TypeVar("R", bound="Record")


def _relative_path(name: str) -> str:
    parts = name.split("/")
    if "\0" in name or any(Path(part).name != part or part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r} is not in the folder")
    return name


def _plain_file_name(name: str) -> str:
    if "/" in name:
        raise ValueError(f"{name!r} is not in the folder")
    return _relative_path(name)


FileName = Annotated[str, AfterValidator(_plain_file_name)]
#: Name of a file in the folder or in a folder of it.
RelativePath = Annotated[str, AfterValidator(_relative_path)]


class Record(BaseModel):
    """A JSON object of ours, frozen. It can also be read like one: `record["bits"]`, `dict(record)`."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; fields that were not set are left out."""
        return self.model_dump(exclude_unset=True)

    def __getitem__(self, key: str) -> Any:
        if key not in self.model_fields_set:
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.model_fields_set

    def keys(self) -> Iterator[str]:
        """Names of the fields that are set, in order."""
        return (name for name, _ in self if name in self.model_fields_set)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a field, or `default` if it is not set."""
        return getattr(self, key) if key in self.model_fields_set else default


class LayerRecord(Record):
    """One quantized linear layer."""

    name: str
    bits: int
    group_size: int
    relative_error: float | None
    """||(W - Q)X||² / ||WX||²; None: there was no Hessian."""
    weight_error: float
    """||W - Q||² / ||W||²."""
    damp_percent: float | None
    damp_tried: list[float]
    """Every damping tried, in order."""
    tokens: int
    """Calibration tokens in its Hessian."""
    fallback: str | None
    """Reason why it was rounded to nearest, or its Hessian is not that of its own tokens; None."""
    gradients: int = 0
    """Tokens whose gradients weigh its outputs."""
    confirmed_drift: float | None = None
    """Part, 0 to 1, of the correction for earlier layers that held-out calibration tokens confirm, and
    that was made. Set only where there was something to correct."""


class SavedActivations(Record):
    """Outputs of a block for every batch, saved in files of the work folder."""

    files: dict[FileName, str]
    """File -> SHA-256."""
    places: int | None
    """Length of the tuple that the block returned; None: a tensor."""


class BlockSummary(Record):
    """One block as a whole."""

    name: str
    depth_error: float | None
    """‖h - h̃‖² / ‖h̃‖² of the hidden states after it; None: the original model did not run."""


class BlockRecord(BlockSummary):
    """One finished block in the journal."""

    block: int
    """Its number."""
    sha256: str
    """Hash of its file in the work folder."""
    nbytes: int = Field(ge=0)
    """Bytes of its tensors."""
    activations: SavedActivations | None
    layers: list[LayerRecord]
    experts: dict[str, list[int]]
    """Module of experts -> tokens that its router sent to each."""
    seconds: dict[str, float]
    """Phase -> seconds."""

    def summary(self) -> BlockSummary:
        """The part of it that the manifest keeps."""
        return BlockSummary(name=self.name, depth_error=self.depth_error)


class Shard(Record):
    """A file of the checkpoint, and what is in it, in order."""

    name: FileName
    blocks: list[int]
    """Numbers of blocks."""
    others: list[str]
    """Tensors outside the blocks."""


class ShardRecord(Record):
    """One finished shard in the journal."""

    shard: Shard
    sha256: str


class ExpertCoverage(Record):
    """A module of experts, and how many calibration tokens its router sent to each."""

    name: str
    tokens: list[int]


class RunRecord(Record):
    """roundwise-run.json."""

    seconds: float
    phases: dict[str, float]
    """Phase -> seconds."""
    blocks: list[float]
    """Seconds of each block."""
    peak_rss_bytes: int
    warnings: list[str]
    not_as_asked: list[str]


class ModelIdentity(Record):
    """Hashes of a model's config.json and weights."""

    config: str = ""
    files: dict[str, str] = {}


class CalibrationRecord(Record):
    """Calibration windows: equal records mean equal windows."""

    samples: int
    tokens: int
    """Tokens that count."""
    sha256: str
    source: str
    texts: list[list[str]] = []
    """Name and SHA-256 of each text."""
    wanted: int
    """Windows asked for."""
    seq_len: int
    batch_size: int
    seed: int
    only: str | None = None
    special_tokens: bool = False
    """The tokenizer's special tokens stand around every window; missing in older manifests: no."""
    distinct: int = 0
    """Distinct tokens."""
    unique_share: float = 1.0
    """Part of the pieces of a few tokens that occur once."""
    sketch: list[int] = []
    """MinHash of the windows (`calibration.overlap`)."""


class Fingerprint(Record):
    """Everything that decides the bytes of a run's result."""

    config: dict[str, Any] = {}
    """`QuantizeConfig`, its `dynamic` as a list of pairs, because their order counts."""
    model: ModelIdentity = ModelIdentity()
    calibration: CalibrationRecord | None = None
    mode: Literal["true_sequential", "block", "none"] = "none"
    device: str = "cpu"
    threads: int = Field(1, ge=1, le=4096)
    """At most more than any machine has."""
    processor: str = ""
    solver: str = ""
    versions: dict[str, str] = {}


class GivenNames(Record):
    """Model and calibration text as the user named them."""

    model: str
    calibration: str | None


class Manifest(Record):
    """roundwise.json."""

    run: Fingerprint
    given: GivenNames | None = None
    platform: dict[str, Any] = {}
    """The machine; see `run.environment.platform_info`."""
    mode: str
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    layers: list[LayerRecord]
    blocks: list[BlockSummary] = []
    experts: list[ExpertCoverage] = []
    served_by: dict[str, str | None] = {}
    """Engine -> why it does not serve the result; None: it does. Missing in older manifests."""
    files: dict[RelativePath, str]
    """File -> SHA-256; not the model card, which is written again when something was measured."""


def find_record(records: Mapping[str, LayerRecord], layer: str) -> LayerRecord | None:
    """Returns the record of a layer as it is named in the files; names of records may have a prefix.

    Args:
        records: record of each layer by its name.
        layer: name of the layer in the files.
    """
    if layer in records:
        return records[layer]
    return next((r for name, r in records.items() if name.endswith(f".{layer}")), None)


def widths(layers: list[LayerRecord]) -> dict[str, str]:
    """Kind of layer -> its bits and group sizes from the first block on; empty if all layers agree."""
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kind = re.sub(r"\d+(?=\.)", "*", layer.name)
        kinds.setdefault(kind, []).append(f"{layer.bits}/{layer.group_size}")
    if len({width for each in kinds.values() for width in each}) < 2:
        return {}
    return {
        kind: ", ".join(f"{width} x{len([*same])}" for width, same in groupby(each))
        for kind, each in kinds.items()
    }


def validation_error(kind: Any, value: Any) -> str | None:
    """The first place where parsed JSON is not a record of some kind; None: it is one.

    Args:
        kind: a record, or a list of them: `Manifest`, `list[BlockRecord]` …
        value: parsed JSON.
    """
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        return explain(error)
    return None


def explain(error: ValidationError) -> str:
    """One line about the first thing that is wrong with a record."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"])) or "it"
    return f"{place}: {first['msg'].removeprefix('Value error, ')}"


def read_manifest(folder: Path) -> Manifest | None:
    """roundwise.json of a checkpoint; None when roundwise did not make it.

    Args:
        folder: the checkpoint, or the manifest itself.

    Raises:
        CheckpointError: it is damaged.
    """
    return _read(folder / MANIFEST if folder.is_dir() else folder, Manifest)


def read_run(folder: Path) -> RunRecord | None:
    """roundwise-run.json of a checkpoint, as `read_manifest`."""
    return _read(folder / RUN, RunRecord)


def _read(file: Path, kind: type[R]) -> R | None:
    if not file.exists():
        return None
    value = read_json(file)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: {explain(error)}") from None
