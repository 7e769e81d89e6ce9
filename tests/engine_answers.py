"""Answers of `served_by` written down by hand, and how they are compared."""

from __future__ import annotations

from collections.abc import Mapping

from roundwise.checkpoint.engines import ENGINES

#: What a user must do; "": nothing.
WAYS = {
    "H": "with --quantization humming", "C": "as --format compressed-tensors",
    "G": "as --format gptq", "L": "as convert --to gguf",
}  # fmt: skip


def assert_answers(served_by: Mapping[str, str | None], expected: str) -> None:
    """Compares the answers with a row of a truth table.

    Args:
        served_by: engine -> why it does not serve a checkpoint; None: it does.
        expected: for vLLM on a CPU, vLLM on a GPU, SGLang, llama.cpp, ExLlamaV2, GPTQModel and
            transformers with roundwise: yes; no; or the letters of the ways in which the engine takes
            the layers after all.
    """
    assert [*served_by] == [*ENGINES]
    for (engine, reason), known in zip(served_by.items(), expected.split(), strict=True):
        ways = reason.partition("; it takes them ")[2] if reason else None
        if known in ("yes", "no"):
            assert ways == (None if known == "yes" else ""), (engine, reason)
        else:
            # "GH" is one way: another format and an option.
            groups = ["GH"] if known == "GH" else [*known]
            expected_ways = [" ".join(WAYS[letter] for letter in group) for group in groups]
            assert ways == " or ".join(expected_ways), (engine, reason)
