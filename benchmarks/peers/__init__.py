"""Parts of `benchmarks/accuracy.py`: methods, their environments, one reader, one evaluator."""
