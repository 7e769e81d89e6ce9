"""Import before GPTQModel: disables GPU and network, and sends the library's prints to stderr."""

import os

os.environ.update(CUDA_VISIBLE_DEVICES="", GPTQMODEL_CPU_WORKERS="2", HF_HUB_OFFLINE="1")
#: The original stdout, for what the script itself prints.
output = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
