"""What `benchmarks/accuracy.py` is made of: methods, their environments, one reader, one evaluator."""
