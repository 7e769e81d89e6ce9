"""CPU-only parts of inference: memory-mapped embeddings, streamed linear layers, decoding attention."""
