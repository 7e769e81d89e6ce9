"""`roundwise card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from roundwise.cli.options import JsonOption
from roundwise.cli.output import print_json, print_line


def command(
    checkpoint: Annotated[Path, typer.Argument(help="Output folder of `roundwise quantize`.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Output of `roundwise compare --json`, whose figures the card states."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="Hub id of the original; default: as in the card, or as it was given."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            help="Push the checkpoint to this repository of the Hugging Face hub, owner/name; a new "
            "one is private."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the model card of a checkpoint, README.md, with measured figures; push the checkpoint.

    `quantize` writes the card too; what others wrote in it is kept.
    """
    from roundwise.publish.card import rewrite_card
    from roundwise.publish.measurement import read_measurement
    from roundwise.publish.push import check_push
    from roundwise.publish.push import push as push_folder

    if push is not None:
        check_push(push)
    measurement = None
    if evaluation is not None:
        measurement = read_measurement(evaluation, checkpoint.resolve().name)
    card = rewrite_card(checkpoint, base_model=base_model, name=push, measurement=measurement)
    address = None if push is None else push_folder(checkpoint, push)
    if as_json:
        print_json({"card": str(card), **({} if address is None else {"pushed_to": address})})
    else:
        print_line(str(card) if address is None else f"{card}, pushed to {address}")
