"""roundwise: GPTQ quantization of large language models to 2-8 bits, streamed and verified.

    import roundwise as rw
    rw.quantize("Qwen/Qwen3-0.6B", "out", rw.QuantizeConfig(bits=4), calibration="notes.txt")
    model, tokenizer = rw.load("out")
    rw.perplexity(model, tokenizer, text)
    q = rw.solve(W, H, rw.QuantizeConfig(bits=3))        # one weight, one Hessian, no model

Names are resolved on first use, so that importing the package costs nothing; that alone lets
`transformers.AutoModelForCausalLM.from_pretrained` open any GPTQ checkpoint.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from roundwise.inference import import_hooks
from roundwise.version import __version__ as __version__

if TYPE_CHECKING:
    from roundwise.config import QuantizeConfig
    from roundwise.core.hessian import Hessian
    from roundwise.core.quantized_weight import QuantizedWeight
    from roundwise.core.solver import round_to_nearest, solve
    from roundwise.errors import RoundwiseError
    from roundwise.evaluation.perplexity import perplexity
    from roundwise.evaluation.report.page import write_report
    from roundwise.inference.load import load
    from roundwise.publish.push import push
    from roundwise.run.api import QuantizeResult, quantize

__all__ = [
    "Hessian",
    "QuantizeConfig",
    "QuantizeResult",
    "QuantizedWeight",
    "RoundwiseError",
    "load",
    "perplexity",
    "push",
    "quantize",
    "round_to_nearest",
    "solve",
    "write_report",
]

_HOME = {
    "Hessian": "roundwise.core.hessian",
    "QuantizeConfig": "roundwise.config",
    "QuantizeResult": "roundwise.run.api",
    "QuantizedWeight": "roundwise.core.quantized_weight",
    "RoundwiseError": "roundwise.errors",
    "load": "roundwise.inference.load",
    "perplexity": "roundwise.evaluation.perplexity",
    "push": "roundwise.publish.push",
    "quantize": "roundwise.run.api",
    "round_to_nearest": "roundwise.core.solver",
    "solve": "roundwise.core.solver",
    "write_report": "roundwise.evaluation.report.page",
}

if sys.platform == "win32":  # locks, limits and maps of files are those of POSIX
    raise ImportError("roundwise needs Linux or macOS: on Windows, install it in WSL2")
import_hooks.register()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'roundwise' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
