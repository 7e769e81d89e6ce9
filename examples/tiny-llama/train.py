"""Trains a small Llama on the sources of the Python standard library, as the one in this folder was.

    python examples/tiny-llama/train.py OUT                       the recipe of the model card
    python examples/tiny-llama/train.py OUT --steps 9000          ten times as long: a better model
    python examples/tiny-llama/train.py OUT --steps 20 --eval-tokens 2000   a quick look

Needs only what roundwise needs: the text is read from the running interpreter. On a GPU it is used.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from roundwise import perplexity
from roundwise.calibration.sources import read_documents, read_text

BEGIN, END = "<s>", "</s>"


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training text; `<s>` is token 0, `</s>` token 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, model_max_length=2048
    )


def build(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """5.8M parameters: 6 blocks, hidden 256, intermediate 768, 4 heads of which 2 for keys."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def learning_rate(step: int, steps: int, peak: float) -> float:
    """100 steps of warm-up (a tenth of shorter runs), then a cosine down to a tenth of the peak."""
    warmup = min(100, max(1, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def train(model: LlamaForCausalLM, stream: torch.Tensor, args: argparse.Namespace) -> None:
    """AdamW on random windows of the stream, bf16 where the device has it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    generator = torch.Generator().manual_seed(args.seed)
    begun = time.monotonic()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        starts = torch.randint(len(stream) - args.seq_len, (args.batch_size,), generator=generator)
        batch = torch.stack([stream[s : s + args.seq_len] for s in starts.tolist()]).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == args.steps - 1:
            print(
                f"step {step}: loss {loss.item():.3f}, {time.monotonic() - begun:.0f} s", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-tokens", type=int, default=60_000)
    args = parser.parse_args()

    texts = [text for text in read_documents("python-stdlib") if isinstance(text, str)]
    tokenizer = train_tokenizer(texts, args.vocabulary)
    ids = [token for text in texts for token in [*tokenizer(text, verbose=False)["input_ids"], 1]]
    print(f"{len(texts)} files, {len(ids) / 1e6:.1f}M tokens")
    model = build(len(tokenizer), args.seed)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    train(model, torch.tensor(ids), args)
    model = model.to("cpu", torch.bfloat16).eval()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    result = perplexity(
        model.float(),
        tokenizer,
        read_text("python-stdlib"),
        window=512,
        max_tokens=args.eval_tokens,
    )
    print(
        f"held-out perplexity {result.perplexity:.2f} on {result.tokens} tokens; saved in {args.out}"
    )


if __name__ == "__main__":
    main()
