"""Log-probabilities of a checkpoint as vLLM computes them on a CPU, for the tests in this folder.

Run by vLLM's own interpreter and knows nothing of roundwise (see run_gptqmodel.py).

    python run_vllm.py CHECKPOINT INPUT.npz OUTPUT.npz [--dtype float16|bfloat16] [--experts-anywhere]

INPUT holds `input_ids` [windows, length] int64. Writes `logprobs` [windows, length, vocab] float32
(natural logarithm, normalised over the whole vocabulary) and `argmax` [windows, length].
"""

import argparse
import os
from pathlib import Path

os.environ.update(  # before the client is imported
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB: the default takes a large part of the machine
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # a failure is this process's failure
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)

import numpy as np
from vllm import LLM, SamplingParams
from vllm.logprobs import FlatLogprobs


def dense(logprobs: FlatLogprobs, position: int, vocab: int) -> np.ndarray:
    """One position's log-probabilities, in the order of the token ids."""
    span = slice(logprobs.start_indices[position], logprobs.end_indices[position])
    row = np.full(vocab, np.nan, np.float32)
    row[logprobs.token_ids[span]] = logprobs.logprobs[span]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--experts-anywhere", action="store_true")
    args = parser.parse_args()
    if args.experts_anywhere:
        # Its kernel for quantized experts is offered on processors with AMX tiles only, for its speed.
        # Here it is to show that it reads and computes what is in the files, which it does without.
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4

        CPUExpertsInt4._supports_current_device = staticmethod(lambda: True)

    windows = np.load(args.input)["input_ids"]
    llm = LLM(
        model=str(args.checkpoint),
        dtype=args.dtype,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=4,
        max_logprobs=-1,
        enable_prefix_caching=False,
    )
    vocab = llm.llm_engine.model_config.get_vocab_size()
    # -1 is the whole vocabulary; flat and not detokenized, because one object and one string per
    # token of it takes minutes. One generated token brings the last position's distribution.
    everything = SamplingParams(
        temperature=0,
        max_tokens=1,
        logprobs=-1,
        prompt_logprobs=-1,
        detokenize=False,
        flat_logprobs=True,
    )
    prompts = [{"prompt_token_ids": window.tolist()} for window in windows]
    rows = []
    for answer in llm.generate(prompts, everything, use_tqdm=False):
        prompt, generated = answer.prompt_logprobs, answer.outputs[0].logprobs
        # Entry i of the prompt's is the distribution *of* token i; the first token has none.
        row = [dense(prompt, i, vocab) for i in range(1, windows.shape[1])]
        rows.append([*row, dense(generated, 0, vocab)])
    logprobs = np.array(rows)
    if np.isnan(logprobs).any():
        raise SystemExit("vLLM left some tokens of the vocabulary without a log-probability")
    np.savez(args.output, logprobs=logprobs, argmax=logprobs.argmax(-1))


if __name__ == "__main__":
    main()
