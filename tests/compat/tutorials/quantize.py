"""As in tutorials: quantize.py MODEL OUT."""

import logging
import sys

from transformers import AutoTokenizer

from roundwise.compat.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig  # was: auto_gptq

logging.basicConfig(
    format="%(asctime)s %(levelname)s [%(name)s] %(message)s",
    level=logging.INFO,
    datefmt="%Y-%m-%d %H:%M:%S",
)

pretrained_model_dir, quantized_model_dir = sys.argv[1:]

tokenizer = AutoTokenizer.from_pretrained(pretrained_model_dir, use_fast=True)
examples = [
    tokenizer("def parse(arguments):\n    options = {}\n    for argument in arguments:"),
    tokenizer("import os\nimport sys\n\n\ndef main() -> int:\n    return 0\n"),
    tokenizer("class Stack:\n    def __init__(self):\n        self.items = []\n"),
    tokenizer("with open(path, encoding='utf-8') as file:\n    lines = file.readlines()\n"),
]

quantize_config = BaseQuantizeConfig(
    bits=4,  # quantize model to 4-bit
    group_size=128,  # it is recommended to set the value to 128
    desc_act=False,  # set to False can significantly speed up inference
)

model = AutoGPTQForCausalLM.from_pretrained(pretrained_model_dir, quantize_config)
model.quantize(examples)
model.save_quantized(quantized_model_dir, use_safetensors=True)
tokenizer.save_pretrained(quantized_model_dir)
