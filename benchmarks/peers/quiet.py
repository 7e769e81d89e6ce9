"""Imported before GPTQModel: no GPU, no network, and what the library prints goes to stderr."""

import os

os.environ.update(CUDA_VISIBLE_DEVICES="", GPTQMODEL_CPU_WORKERS="2", HF_HUB_OFFLINE="1")
#: What a script prints itself.
output = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
