"""The evaluator of all tools: calibration windows, held-out tokens, and a checkpoint's divergence."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peers.reader import Dense, read_dense
from roundwise.calibration.dataset import load_calibration
from roundwise.calibration.sources import read_text
from roundwise.calibration.special_tokens import special_tokens
from roundwise.config import CalibrationConfig
from roundwise.evaluation.divergence import divergence

#: Windows of calibration text for the bundled model, and tokens of a window.
SAMPLES, LENGTH = 128, 512
#: Values of one forward, and of all cached outputs: those of a large vocabulary need much memory.
AT_ONCE, CACHED = 1 << 27, 1 << 29
#: Characters of text read per held-out token; a token is shorter on average.
CHARACTERS = 12


class CachedModel:
    """The original model with cached outputs: every checkpoint is compared with the same ones."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.device = self.model.device
        self._outputs: dict[bytes, Any] = {}
        self._cached = 0

    def __call__(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        """Returns the output of the model's forward."""
        key = input_ids.numpy().tobytes()
        if key in self._outputs:
            return self._outputs[key]
        outputs = self.model(input_ids=input_ids, use_cache=use_cache)
        self._cached += outputs.logits.numel()
        if self._cached <= CACHED:
            self._outputs[key] = outputs
        return outputs


@dataclass
class Evaluator:
    """A model, its calibration text, and the held-out text that it is evaluated on."""

    model: Path
    calibration: str
    held_out: str
    tokens: int
    samples: int = SAMPLES
    length: int = LENGTH

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.special = special_tokens(self.tokenizer)
        self._base: CachedModel | None = None
        text = read_text(self.held_out)[: CHARACTERS * self.tokens]
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < self.tokens:
            raise SystemExit(f"{self.held_out} has only {len(ids)} held-out tokens: use --tokens")
        self.ids = ids[: self.tokens]

    def identity(self) -> dict[str, Any]:
        """Returns what a result depends on besides the job: hashes of weights and text, and sizes."""
        digest = hashlib.sha256()
        for file in sorted(self.model.glob("*.safetensors")):
            digest.update(file.read_bytes())
        held_out = hashlib.sha256(torch.tensor(self.ids).numpy().tobytes())
        return {
            "model": self.model.name, "weights": digest.hexdigest()[:16],
            "text": Path(self.calibration).name, "held_out": held_out.hexdigest()[:16],
            "tokens": self.tokens, "windows": [self.samples, self.length],
            "special": [list(self.special.prefix), list(self.special.suffix)],
        }  # fmt: skip

    def windows(self, seed: int) -> list[list[int]]:
        """Returns the calibration windows of a seed, the same for every tool."""
        config = CalibrationConfig(
            samples=self.samples, seq_len=self.length, batch_size=self.samples, seed=seed
        )
        calibration = load_calibration(self.calibration, self.tokenizer, config)
        ids = [window for batch in calibration.batches for window in batch.input_ids.tolist()]
        if [len(window) for window in ids] != [self.length] * self.samples:
            raise SystemExit(
                f"{self.calibration} does not give {self.samples} windows of {self.length}"
            )
        return ids

    def evaluate(self, checkpoint: Path) -> dict[str, Any]:
        """Measures the divergence of a checkpoint's dense weights from the original, both in float32."""
        dense = read_dense(checkpoint)
        quantized = self.load_dense(dense)
        self._base = self._base or CachedModel(self.model)
        vocabulary = int(quantized.config.get_text_config().vocab_size)
        result = divergence(
            self._base, quantized, self.ids, window=self.length, special=self.special,
            batch_size=max(1, min(4, AT_ONCE // (self.length * vocabulary))),
        )  # fmt: skip
        return {
            "base_perplexity": result.perplexity[0],
            "perplexity": result.perplexity[1],
            "kl": result.kl_divergence,
            "top1": result.top1_agreement,
            "trivial_g_idx": dense.trivial,
            "file_bytes": sum(f.stat().st_size for f in checkpoint.glob("*.safetensors")),
        }

    def load_dense(self, dense: Dense) -> Any:
        """Builds the original's architecture with these weights; every tensor must fit."""
        config = AutoConfig.from_pretrained(self.model)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        state = {name: torch.tensor(value) for name, value in dense.state.items()}
        for layer in dense.layers:
            if type(model.get_submodule(layer)).__name__ == "Conv1D":  # its weight is [in, out]
                state[f"{layer}.weight"] = state[f"{layer}.weight"].T
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"missing {missing}, unexpected {unexpected}")
        model.tie_weights()
        return model.eval()
