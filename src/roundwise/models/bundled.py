"""The small trained model that comes with roundwise, for demos, tests and first steps offline."""

from __future__ import annotations

from pathlib import Path

from roundwise.errors import CheckpointError


def bundled_model() -> Path:
    """Folder of the tiny Llama: inside an installed package, or in examples/ of a source checkout.

    Raises:
        CheckpointError: it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "tiny-llama", package.parents[1] / "examples" / "tiny-llama"):
        if (folder / "config.json").exists():
            return folder
    raise CheckpointError(
        "the bundled model is missing from this installation: install roundwise again"
    )
