"""As in tutorials: generate.py QUANTIZED. Loads it, generates with `generate` and with a pipeline."""

import sys

from transformers import AutoTokenizer, TextGenerationPipeline

from roundwise.compat.auto_gptq import AutoGPTQForCausalLM  # was: auto_gptq

quantized_model_dir = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(quantized_model_dir)
model = AutoGPTQForCausalLM.from_quantized(quantized_model_dir, device="cpu")

inputs = tokenizer("import os", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]))

pipeline = TextGenerationPipeline(model=model.model, tokenizer=tokenizer)
print(pipeline("import os", max_new_tokens=12, do_sample=False)[0]["generated_text"])
