"""Measures the accuracy that quantization costs on real language models: roundwise and its peers.

    python benchmarks/real_models.py                                everything; days on two cores
    python benchmarks/real_models.py --models smollm2-135m --bits 3 --seeds 0
    python benchmarks/real_models.py --models gemma3-270m --bits 4 --groups 128 --only roundwise --risks
    python benchmarks/real_models.py --docs docs/accuracy.md        tables of what is recorded

The models come from the package index (peers/published.py), the text is the prose of docstrings
(peers/prose.py). Windows begin with what the tokenizer puts first. Every tool gets the same windows, one
reader decodes every checkpoint, and one evaluator measures it in float32; see accuracy.py.

Records are kept in benchmarks/records/real_models.jsonl, with the commit they were measured at; what is
there is not measured again unless `--redo` is given.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from accuracy import Results, insert, measure, names, numbers
from peers.environments import ROOT
from peers.evaluator import Evaluator
from peers.methods import RISKS, TOOLS, jobs
from peers.prose import write_prose
from peers.published import MODELS, dense_checkpoint
from peers.table import ingredients, report

RECORDS = ROOT / "benchmarks" / "records" / "real_models.jsonl"
#: Group sizes that all layers of a model can take: SmolLM2 has 576 channels, Gemma 640.
GROUPS = {"smollm2-135m": [64], "gemma3-270m": [64, 128]}
#: Windows of calibration text, and held-out tokens.
SAMPLES, TOKENS = 64, 12_288


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", type=names, default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--only", type=names, default=list(TOOLS), help=", ".join(TOOLS))
    parser.add_argument("--method", default="", help="only methods whose name contains this")
    parser.add_argument("--bits", type=numbers, default=[2, 3, 4], help="2,3,4")
    parser.add_argument("--groups", type=numbers, default=[64, 128], help="64,128")
    parser.add_argument("--symmetry", type=names, default=["sym", "asym"], help="sym,asym")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration windows of 512")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="number of held-out tokens")
    parser.add_argument("--risks", action="store_true", help="also corrections and transforms")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of every job")
    parser.add_argument("--redo", action="store_true", help="measure again what is recorded")
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    parser.add_argument("--docs", type=Path, help="document whose tables are replaced")
    args = parser.parse_args()
    results = Results(args.records)
    syms = [{"sym": True, "asym": False}[name] for name in args.symmetry]
    with tempfile.TemporaryDirectory() as scratch:
        calibration, held_out = write_prose(Path(scratch))
        for name in args.models:
            evaluator = Evaluator(
                dense_checkpoint(name), str(calibration), str(held_out), args.tokens, args.samples
            )
            groups = [size for size in GROUPS[name] if size in args.groups]
            formats = [(bits, size, sym) for bits in args.bits for size in groups for sym in syms]
            if not (args.table or args.docs):
                more = RISKS if args.risks else {}
                selected = list(jobs(args.only, formats, args.seeds, more, args.method))
                logs = ROOT / "benchmarks" / "results" / "logs"
                measure(selected, evaluator, results, logs, args.threads, args.redo)
            show(results, evaluator, args.docs)


def show(results: Results, evaluator: Evaluator, docs: Path | None) -> None:
    """Prints the tables of one model, and puts them into a document if one is given."""
    records = results.of(evaluator.identity())
    name = evaluator.model.name
    for tables, marker in ((report(records), name), (ingredients(records), f"{name}, risks")):
        print(tables, end="\n\n")
        if docs is not None and tables:
            insert(tables, docs, marker)


if __name__ == "__main__":
    main()
