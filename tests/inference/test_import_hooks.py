"""`import roundwise` is enough for transformers and PEFT, in any order, and imports neither."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from roundwise.inference import import_hooks
from roundwise.inference.import_hooks import PatchFinder, _patch_after_import


def run(script: str) -> str:
    """Standard output of a script in a new process."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.sampled(2)
@pytest.mark.parametrize("first", ["roundwise", "transformers"])
def test_transformers_loads_a_checkpoint(first: str, quantized: Callable[..., Path]) -> None:
    """Imported before roundwise or after it, and roundwise does not import it."""
    second = {"roundwise": "transformers", "transformers": "roundwise"}[first]
    printed = run(f"""
import sys
import {first}
assert {first!r} == "transformers" or not {{"torch", "transformers"}} & set(sys.modules)
import {second}
model = transformers.AutoModelForCausalLM.from_pretrained({str(quantized("llama"))!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
""")
    assert printed == "QuantLinear\n"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("order", [("peft", "roundwise"), ("roundwise", "peft")])
def test_peft_is_patched(order: tuple[str, str]) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install '.[peft]'")
    run(f"""
import sys
import {order[0]}
assert ("peft" in sys.modules) == ({order[0]!r} == "peft")
import {order[1]}
import peft.tuners.lora.model as chain
from roundwise.inference import import_hooks
import_hooks.register()
assert chain.dispatch_gptq.accepts_quant_linear
assert not [f for f in sys.meta_path if getattr(f, "name", "") == import_hooks.PEFT_MODULE]
""")


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a module that can be imported and has not been."""
    (tmp_path / "sample_for_hooks.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "sample_for_hooks"
    sys.modules.pop("sample_for_hooks", None)


def finders(name: str) -> list[PatchFinder]:
    return [f for f in sys.meta_path if isinstance(f, PatchFinder) and f.name == name]


def test_a_module_is_patched_once_when_it_is_imported(sample: str) -> None:
    seen = []
    for _ in range(2):
        _patch_after_import(sample, lambda module: seen.append(module.value))
    assert len(finders(sample)) == 1
    assert seen == []
    module = __import__(sample)
    assert seen == [1]  # it was executed before the patch
    assert finders(sample) == []
    assert module.__spec__.name == sample
    _patch_after_import(sample, lambda module: seen.append("again"))
    assert seen == [1, "again"]  # it is imported: at once


def test_a_module_that_does_not_exist_leaves_no_finder() -> None:
    _patch_after_import("no_such_module_anywhere", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        __import__("no_such_module_anywhere")
    assert finders("no_such_module_anywhere") == []


def test_registering_again_replaces_another_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import auto

    from roundwise.inference.hf_quantizer import RoundwiseHfQuantizer

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "gptq", object)
    import_hooks.register()
    config = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"](bits=4)
    assert isinstance(auto.AUTO_QUANTIZER_MAPPING["gptq"](config), RoundwiseHfQuantizer)
