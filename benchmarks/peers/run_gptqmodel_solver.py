"""Times GPTQModel's solver on one layer. Run with GPTQModel's interpreter.

    python run_gptqmodel_solver.py WIDTH REPEAT

Prints the median seconds of quantizing a square float32 weight with 4 bits, groups of 128 and its other
defaults, from a finished Hessian.
"""

import statistics
import sys
import time

from quiet import output  # isort: skip  # before all others

import torch
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ

width, repeat = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
X = torch.randn(2 * width, width) * torch.linspace(0.2, 3.0, width)
layer = torch.nn.Linear(width, width, bias=False)
times = []
with torch.inference_mode():
    for _ in range(1 + repeat):  # the first is a warm-up
        solver = GPTQ(layer, QuantizeConfig(bits=4, group_size=128))
        solver.quantizer.configure(perchannel=True)
        solver.add_batch(X[None], layer(X[None]))
        solver.finalize_hessian()
        begun = time.perf_counter()
        solver.quantize()
        times.append(time.perf_counter() - begun)
print(statistics.median(times[1:]), file=output)
