"""Quantized checkpoints as GGUF files: the codes of our layers in llama.cpp's blocks of 32."""
