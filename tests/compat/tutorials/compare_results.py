"""As in tutorials: compare_results.py BASE QUANTIZED. Result files of lm-eval side by side."""

import json
import sys
from pathlib import Path

base, quantized = (json.loads(Path(name).read_text())["results"] for name in sys.argv[1:])
print(f"{'task':20} {'base':>8} {'quantized':>10} {'change':>8}")
for task, metrics in base.items():
    before, after = metrics["acc,none"], quantized[task]["acc,none"]
    print(f"{task:20} {before:8.4f} {after:10.4f} {after - before:+8.4f}")
