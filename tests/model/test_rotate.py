"""A rotated model computes what the original computes; a model that cannot be rotated is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.writer import write_safetensors
from roundwise.core.hadamard import Rotation
from roundwise.errors import CheckpointError, ConfigError
from roundwise.model.residual_trace import trace_residual_stream
from roundwise.model.rotate import apply_recorded_rotation, rotated_checkpoint
from roundwise.model.streamed import open_streamed_model
from tests.helpers import ARCHITECTURES, LLAMA, random_model, tensors_of, windows

#: Norms, embeddings and blocks of these commute with a rotation; the mean is kept for layer norms.
RMS = ["llama", "qwen3", "mistral", "phi3"]
LAYER = ["gpt2", "opt", "gpt_neox", "falcon"]
REFUSED = {
    "gemma3": r"model\.layers\.0 adds more than the outputs of linear layers to the residual stream",
    "bloom": r"the input of transformer\.h\.0 is not rotated as a whole",
}


def test_every_architecture_is_listed() -> None:
    assert {*RMS, *LAYER, *REFUSED} == set(ARCHITECTURES)


def whole(checkpoint: Checkpoint) -> Any:
    """The model of a checkpoint with all its weights."""
    streamed = open_streamed_model(checkpoint)
    for name, module in streamed.model.named_modules():
        streamed.load(module, name, recurse=False)
    return streamed.model


@pytest.mark.parametrize("name", [*RMS, *LAYER])
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_are_unchanged(name: str, seed: int, folder_of: Callable[[str], Path]) -> None:
    source = Checkpoint(folder_of(name))
    ids = torch.tensor(windows())
    with torch.no_grad():
        before, after = (
            whole(c)(input_ids=ids).logits for c in (source, rotated_checkpoint(source, seed))
        )
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*RMS, *LAYER])
def test_the_stream_is_rotated_and_gains_are_one(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    source = Checkpoint(folder_of(name))
    before, after = (
        trace_residual_stream(open_streamed_model(c, dtype=torch.float32))
        for c in (source, rotated_checkpoint(source, 7))
    )
    rotation = Rotation(64, 7, keeps_mean=name in LAYER)
    for old, new in zip(before.blocks, after.blocks, strict=True):
        assert float((new.x - old.x).norm()) > 0.5 * float(old.x.norm())
        for a, b in ((old.x, new.x), (old.y, new.y)):
            torch.testing.assert_close(b, rotation.rows(a).float(), rtol=1e-4, atol=1e-4)
    view = rotated_checkpoint(source, 7)
    streamed = open_streamed_model(view)
    norms = [n for block in before.blocks for n in block.norms if n.reads_stream] + [
        before.final_norm
    ]
    for norm in norms:
        assert norm is not None
        gains = view.tensors[streamed.checkpoint_name_of[f"{norm.name}.weight"]].read()
        assert torch.equal(gains, torch.ones(64))


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_reason(name: str, folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=f"cannot be rotated: {REFUSED[name]}.*remove --rotate"):
        rotated_checkpoint(Checkpoint(folder_of(name)), 0)


@pytest.mark.parametrize(
    "config",
    [
        lambda: transformers.Olmo2Config(**{k: v for k, v in LLAMA.items() if k != "head_dim"}),
        lambda: transformers.Gemma2Config(**{**LLAMA, "pad_token_id": 2}),
        lambda: transformers.CohereConfig(**{k: v for k, v in LLAMA.items() if k != "head_dim"}),
        lambda: transformers.GraniteConfig(
            **{k: v for k, v in LLAMA.items() if k != "head_dim"}, residual_multiplier=0.3
        ),
        lambda: transformers.GemmaConfig(**{**LLAMA, "pad_token_id": 2}),
        lambda: transformers.StableLmConfig(**{k: v for k, v in LLAMA.items() if k != "head_dim"}),
    ],
    ids=["olmo2", "gemma2", "cohere", "granite", "gemma", "stablelm"],
)
def test_other_families_are_exact_or_refused(config: Any, tmp_path: Path) -> None:
    # For all families: sandwich norms, parallel blocks, scaled sums, 1 + w.
    model = random_model(config())
    model.save_pretrained(tmp_path)
    try:
        view = rotated_checkpoint(Checkpoint(tmp_path), 0)
    except ConfigError as error:
        assert "cannot be rotated" in str(error)
        assert config().model_type in ("olmo2", "gemma2")
        return
    ids = torch.tensor(windows())
    with torch.no_grad():
        torch.testing.assert_close(
            whole(view)(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )


class TestTied:
    """A head that shares the embedding's weight gets its own: the last norm's gain goes into it."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
        random_model(config).save_pretrained(tmp_path / "tied")
        return tmp_path / "tied"

    def test_head_is_added(self, model: Path) -> None:
        source = Checkpoint(model)
        assert "lm_head.weight" not in source.tensors
        view = rotated_checkpoint(source, 0)
        assert view.config["tie_word_embeddings"] is False
        assert view.tensors.keys() == {*source.tensors, "lm_head.weight"}
        Q = Rotation(64, 0)
        tensors = tensors_of(model)
        E, g = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
        torch.testing.assert_close(
            view.tensors["model.embed_tokens.weight"].read(), Q.rows(E).float()
        )
        torch.testing.assert_close(
            view.tensors["lm_head.weight"].read(), Q.rows(E * g).float(), rtol=1e-5, atol=1e-6
        )
        assert view.nbytes() == source.nbytes()

    def test_logits_are_unchanged(self, model: Path) -> None:
        source = Checkpoint(model)
        ids = torch.tensor(windows())
        with torch.no_grad():
            before, after = (
                whole(c)(input_ids=ids).logits for c in (source, rotated_checkpoint(source, 0))
            )
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


class TestCheck:
    """The check before a run detects models that a rotation would change."""

    def test_a_norm_that_another_module_reads_too(
        self, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # For example a router that is not a linear layer: it would get rotated input.
        original = transformers.models.llama.modeling_llama.LlamaMLP.forward

        def routed(self: Any, x: torch.Tensor) -> torch.Tensor:
            return original(self, x) * x[..., :1].sigmoid()

        monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", routed)
        with pytest.raises(ConfigError, match=r"model\.layers\.0 adds more than the outputs"):
            rotated_checkpoint(Checkpoint(llama), 0)

    def test_a_reader_that_is_not_a_module(
        self, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = transformers.models.llama.modeling_llama.LlamaMLP.forward

        def routed(self: Any, x: torch.Tensor) -> torch.Tensor:
            gate = nn.functional.linear(x, self.gate_proj.weight.roll(1, 0))
            return self.down_proj(gate.tanh() * self.up_proj(x))

        assert original is not routed
        monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", routed)
        # gate_proj is never called as a module, so its weight is not rotated.
        with pytest.raises(
            ConfigError, match=r"model\.layers\.0 also reads or writes the residual stream"
        ):
            rotated_checkpoint(Checkpoint(llama), 0)

    def test_a_bias_with_a_gain_of_zero(self, copy_of: Callable[[str], Path]) -> None:
        folder = copy_of("gpt2")
        tensors = tensors_of(folder)
        tensors["transformer.h.1.ln_1.weight"][3] = 0.0
        write_safetensors(folder / "model.safetensors", tensors)
        with pytest.raises(ConfigError, match=r"h\.1\.ln_1 has a bias and a gain of zero"):
            rotated_checkpoint(Checkpoint(folder), 0)


def test_apply_recorded_rotation_takes_the_seed_from_the_settings(llama: Path) -> None:
    source = Checkpoint(llama)
    assert apply_recorded_rotation(source, {"meta": {"quantizer": ["other:1"]}}) is source
    view = apply_recorded_rotation(source, {"meta": {"rotate": {"seed": 4}}})
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(
        view.tensors[name].read(), rotated_checkpoint(source, 4).tensors[name].read()
    )
    assert apply_recorded_rotation(view, {"meta": {"rotate": {"seed": 4}}}) is view
    with pytest.raises(
        CheckpointError, match=r"meta\.rotate of the quantization config is damaged"
    ):
        apply_recorded_rotation(source, json.loads('{"meta": {"rotate": {"seed": "x"}}}'))
