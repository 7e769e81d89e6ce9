"""Trains a second model, different from the bundled one, for `benchmarks/accuracy.py`.

    python benchmarks/second_model.py OUT                  ten minutes
    python benchmarks/second_model.py OUT --minutes 30
    python benchmarks/accuracy.py --model OUT --text OUT/text.txt --only roundwise

A GPT-2: biases everywhere, learned positions, LayerNorm, fused q/k/v as Conv1D, a plain two-layer
MLP; 3.9M parameters. The text is English prose about code: the language reference that `help()`
shows, and the docstrings of torch and numpy, which are always installed. The first nine tenths are
used for training and calibration, the last tenth is held out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peers.prose import docstrings
from peers.texts import split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from roundwise import perplexity

PACKAGES = ("torch", "numpy")
SHORTEST = 200  # characters; shorter docstrings are rarely prose
WINDOW, BATCH, VOCABULARY = 256, 8, 2048


def package_docstrings(package: str) -> Iterator[str]:
    """Yields the docstrings of a package's modules, classes and functions, in file order."""
    folder = Path(str(importlib.metadata.distribution(package).locate_file(package)))
    for file in sorted(folder.rglob("*.py")):
        yield from docstrings(file)


def collect() -> str:
    """Returns all documents without duplicates, shuffled with a fixed seed."""
    documents = [
        *topics.values(),
        *(text for name in PACKAGES for text in package_docstrings(name)),
    ]
    documents = list(dict.fromkeys(text for text in documents if len(text) >= SHORTEST))
    random.Random(0).shuffle(documents)
    return "\n\n".join(documents) + "\n"


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)


def build() -> GPT2LMHeadModel:
    """Returns a model of 4 blocks, 4 heads and hidden size 256, a multiple of the group sizes."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=1024, n_embd=256, n_layer=4, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def train(model: GPT2LMHeadModel, stream: torch.Tensor, minutes: float, rate: float) -> None:
    """Trains with AdamW on random windows until the time is over; the learning rate falls with time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    begun = time.monotonic()
    step, progress = 0, 0.0
    while progress < 1:
        starts = torch.randint(len(stream) - WINDOW, (BATCH,), generator=generator).tolist()
        batch = torch.stack([stream[start : start + WINDOW] for start in starts])
        # Every other batch starts at a random position, so that all positions are trained.
        shift = int(torch.randint(model.config.n_positions - WINDOW, (1,), generator=generator))
        positions = torch.arange(shift if step % 2 else 0, model.config.n_positions)[:WINDOW]
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50, max(0.05, 1.0 - progress))
        loss = model(input_ids=batch, position_ids=positions[None], labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress = (time.monotonic() - begun) / (60 * minutes)
        if step % 50 == 0 or progress >= 1:
            print(f"step {step}: loss {loss.item():.3f}, {progress:.0%} of the time", flush=True)
        step += 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()
    text = collect()
    training, held_out = split(text)
    tokenizer = train_tokenizer(training)
    ids = tokenizer(training, verbose=False)["input_ids"]
    model = build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(text) / 1e6:.1f}M characters, {len(ids) / 1e6:.1f}M tokens")
    print(f"{parameters / 1e6:.2f}M parameters")
    train(model.train(), torch.tensor(ids), args.minutes, args.rate)
    model.eval().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "text.txt").write_text(text, encoding="utf-8")
    result = perplexity(model, tokenizer, held_out, window=512, max_tokens=20_000)
    print(f"held-out perplexity {result.perplexity:.2f}; saved in {args.out}")


if __name__ == "__main__":
    main()
