"""What a quantized model is worth: perplexity and, later, everything else that is measured."""
