"""Times one layer of a checkpoint in GPTQModel, on request. Run with GPTQModel's interpreter.

    python run_gptqmodel_kernel.py CHECKPOINT LAYER COPIES

Prints the kernel's name. Then, for each line read from stdin, prints the median seconds of a
product with one row, over enough copies of the layer to exceed every cache.
"""

import copy
import statistics
import sys
import time

from quiet import output  # isort: skip  # before all others

import torch
from gptqmodel import GPTQModel

folder, name, copies = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = GPTQModel.load(folder, device="cpu", dtype=torch.bfloat16).model.eval()
layer = model.get_submodule(name)
x = torch.randn(1, layer.in_features).bfloat16()
with torch.no_grad():
    layer(x)  # some kernels change the layout of the weight in the first call
    layers = [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]
    for each in layers:
        each(x)
    print(type(layer).__name__, file=output)
    for _ in sys.stdin:
        times = []
        for each in layers * 3:
            begun = time.perf_counter()
            each(x)
            times.append(time.perf_counter() - begun)
        print(statistics.median(times), file=output)
