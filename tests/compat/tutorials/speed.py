"""As in tutorials: speed.py QUANTIZED. Generation speed in tokens per second."""

import sys
import time

import torch
from transformers import AutoTokenizer, GenerationConfig

from roundwise.compat.auto_gptq import AutoGPTQForCausalLM  # was: auto_gptq

quantized_model_dir = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(quantized_model_dir)
model = AutoGPTQForCausalLM.from_quantized(quantized_model_dir, device="cpu")
config = GenerationConfig(
    max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0, num_beams=1
)
total_tokens, total_seconds = 0, 0.0
for prompt in ("import os", "def main():", "class Stack:"):
    input_ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    start = time.time()
    outputs = model.generate(input_ids=input_ids, generation_config=config)
    total_seconds += time.time() - start
    total_tokens += outputs.shape[1] - input_ids.shape[1]
print(f"{total_tokens} tokens, {total_tokens / total_seconds:.1f} tokens/s")
