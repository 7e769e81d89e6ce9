"""As in tutorials: perplexity.py QUANTIZED TEXT. The loop of the documentation of transformers."""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from roundwise.compat.auto_gptq import AutoGPTQForCausalLM  # was: auto_gptq

quantized_model_dir, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(quantized_model_dir)
model = AutoGPTQForCausalLM.from_quantized(
    quantized_model_dir, device="cpu", torch_dtype=torch.float32
)
encodings = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt")

max_length = 128
stride = 64
seq_len = min(encodings.input_ids.size(1), 600)
nll_sum, n_tokens, prev_end_loc = 0.0, 0, 0
for begin_loc in range(0, seq_len, stride):
    end_loc = min(begin_loc + max_length, seq_len)
    trg_len = end_loc - prev_end_loc
    input_ids = encodings.input_ids[:, begin_loc:end_loc]
    target_ids = input_ids.clone()
    target_ids[:, :-trg_len] = -100
    with torch.no_grad():
        neg_log_likelihood = model(input_ids, labels=target_ids).loss
    num_loss_tokens = int((target_ids[:, 1:] != -100).sum())
    nll_sum += float(neg_log_likelihood) * num_loss_tokens
    n_tokens += num_loss_tokens
    prev_end_loc = end_loc
    if end_loc == seq_len:
        break
print(f"perplexity {torch.exp(torch.tensor(nll_sum / n_tokens)).item():.4f}")
