"""The one judge of all tools: calibration windows, held-out tokens, and a checkpoint's divergence."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peers.reader import Dense, read_dense
from roundwise.calibration.dataset import load_calibration
from roundwise.calibration.sources import read_text
from roundwise.evaluation.divergence import divergence

SAMPLES, LENGTH = 128, 512
#: Characters that are enough for one held-out token.
CHARACTERS = 12


class Remembered:
    """The original model; what it said of a batch is kept, because every checkpoint needs it again."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.device = self.model.device
        self._said: dict[bytes, Any] = {}

    def __call__(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        """As the model's own forward."""
        key = input_ids.numpy().tobytes()
        if key not in self._said:
            self._said[key] = self.model(input_ids=input_ids, use_cache=use_cache)
        return self._said[key]


@dataclass
class Evaluator:
    """A model, the text it is calibrated with, and the held-out text it is judged by."""

    model: Path
    calibration: str
    held_out: str
    tokens: int

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self._base: Remembered | None = None
        text = read_text(self.held_out)[: CHARACTERS * self.tokens]
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < self.tokens:
            raise SystemExit(f"{self.held_out} has only {len(ids)} held-out tokens: use --tokens")
        self.ids = ids[: self.tokens]

    def identity(self) -> dict[str, Any]:
        """What a result depends on beside the job."""
        digest = hashlib.sha256()
        for file in sorted(self.model.glob("*.safetensors")):
            digest.update(file.read_bytes())
        held_out = hashlib.sha256(torch.tensor(self.ids).numpy().tobytes())
        return {
            "model": self.model.name, "weights": digest.hexdigest()[:16],
            "text": Path(self.calibration).name, "held_out": held_out.hexdigest()[:16],
            "tokens": self.tokens, "windows": [SAMPLES, LENGTH],
        }  # fmt: skip

    def windows(self, seed: int) -> list[list[int]]:
        """Calibration windows, the same for every tool."""
        drawn = load_calibration(
            self.calibration, self.tokenizer,
            samples=SAMPLES, seq_len=LENGTH, batch_size=SAMPLES, seed=seed,
        )  # fmt: skip
        ids = [window for batch in drawn.batches for window in batch.input_ids.tolist()]
        if [len(window) for window in ids] != [LENGTH] * SAMPLES:
            raise SystemExit(f"{self.calibration} does not give {SAMPLES} windows of {LENGTH}")
        return ids

    def judge(self, checkpoint: Path) -> dict[str, Any]:
        """Divergence of a checkpoint's dense weights from the original, both in float32."""
        dense = read_dense(checkpoint)
        quantized = self._model_of(dense)
        self._base = self._base or Remembered(self.model)
        found = divergence(self._base, quantized, self.ids, window=LENGTH)
        return {
            "base_perplexity": found.perplexity[0],
            "perplexity": found.perplexity[1],
            "kl": found.kl_divergence,
            "top1": found.top1_agreement,
            "trivial_g_idx": dense.trivial,
            "file_bytes": sum(f.stat().st_size for f in checkpoint.glob("*.safetensors")),
        }

    def _model_of(self, dense: Dense) -> Any:
        """The original's architecture with these weights; each of them must have its place."""
        config = AutoConfig.from_pretrained(self.model)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        state = {name: torch.tensor(value) for name, value in dense.state.items()}
        for layer in dense.layers:
            if type(model.get_submodule(layer)).__name__ == "Conv1D":  # keeps its weight [in, out]
                state[f"{layer}.weight"] = state[f"{layer}.weight"].T
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"missing {missing}, unexpected {unexpected}")
        model.tie_weights()
        return model.eval()
