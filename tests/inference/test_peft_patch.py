"""LoRA through PEFT on a quantized model: adapters are trained, the codes do not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.inference.peft_patch import patch_peft

peft = pytest.importorskip("peft", reason="peft is not installed: pip install '.[peft]'")

# PEFT asks transformers by names that this deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def checkpoint(quantized: Callable[..., Path]) -> Path:
    return quantized("llama")


@pytest.fixture
def batch() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 64, (4, 24), generator=generator)


def adapted(model: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(model, config)


def train(model: Any, batch: torch.Tensor, steps: int = 12) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=2e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def base_of(model: Any) -> dict[str, torch.Tensor]:
    """All tensors but those of adapters, under the names of the checkpoint."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if "lora_" not in name and ".quant_linear_module." not in name
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_learn_and_the_base_stays(
    dtype: torch.dtype, checkpoint: Path, batch: torch.Tensor
) -> None:
    model, _ = rw.load(checkpoint, dtype=dtype)
    before = base_of(model)
    trained = adapted(model)
    losses = train(trained, batch)
    assert losses[-1] < losses[0] - 0.2
    after = base_of(trained)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    names = {name.split(".lora_")[0].rpartition(".")[2] for name, p in trained.named_parameters()
             if p.requires_grad}  # fmt: skip
    assert names == set(TARGETS)


def test_adapters_are_saved_and_loaded(
    checkpoint: Path, batch: torch.Tensor, tmp_path: Path
) -> None:
    trained = adapted(rw.load(checkpoint, dtype=torch.float32)[0])
    train(trained, batch)
    trained.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 100_000
    again = peft.PeftModel.from_pretrained(rw.load(checkpoint, dtype=torch.float32)[0], tmp_path)
    with torch.no_grad():
        expected = trained(input_ids=batch).logits
        assert torch.equal(again.eval()(input_ids=batch).logits, expected)
        with again.disable_adapter():
            plain = again(input_ids=batch).logits
    model, _ = rw.load(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(plain, model(input_ids=batch).logits)
    assert not torch.equal(plain, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(
    reentrant: bool, checkpoint: Path, batch: torch.Tensor
) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, _ = rw.load(checkpoint, dtype=torch.float32)
        if checkpointing:
            model = peft.prepare_model_for_kbit_training(
                model, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
        model = adapted(model)
        model.train()
        model(input_ids=batch, labels=batch).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_a_model_opened_by_transformers(checkpoint: Path, batch: torch.Tensor) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    losses = train(adapted(model, lora_dropout=0.1), batch)
    assert losses[-1] < losses[0]
    assert model.generate(batch[:1], max_new_tokens=2, do_sample=False).shape == (1, 26)


def test_merging_into_codes_is_refused(checkpoint: Path) -> None:
    model = adapted(rw.load(checkpoint)[0])
    with pytest.raises(ValueError, match="Cannot merge LORA layers when the model is gptq"):
        model.merge_and_unload()


def test_other_layers_are_left_to_peft(llama: Path, batch: torch.Tensor) -> None:
    losses = train(adapted(rw.load(llama, dtype=torch.float32)[0]), batch)
    assert losses[-1] < losses[0]


def test_a_second_patch_does_nothing() -> None:
    module = ModuleType("chain")
    patch_peft(module)  # another version of PEFT, without this function
    assert not vars(module).get("dispatch_gptq")
    module.dispatch_gptq = lambda target, *_, **__: ("peft", target)
    patch_peft(module)
    patched = module.dispatch_gptq
    layer = torch.nn.Linear(2, 2)
    assert patched(layer, "default") == ("peft", layer)
    patch_peft(module)
    assert module.dispatch_gptq is patched
