"""llama.cpp runs our GGUF files, and computes what the weights in them say.

llama.cpp rounds the inputs of quantized layers to 8 bits, so its logits are not float32's. How far
they may be is measured: a file with the same weights in F32 has no such rounding and must agree closely;
the quantized one must be as near as llama.cpp's own Q8_0 of the original is to the original.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from roundwise.gguf.convert import convert_to_gguf
from tests.clients import reference
from tests.clients.conftest import HERE, MODEL, ROOT, Client, Quantize
from tests.clients.test_clients import Distance
from tests.gguf.templates import write_template

pytestmark = pytest.mark.clients

SETTINGS = {
    "2 bit": ({"bits": 2, "group_size": 32}, "Q4_0"),
    "3 bit": ({"bits": 3, "group_size": 64}, "Q4_0"),
    "4 bit": ({"bits": 4, "group_size": 128}, "Q4_0"),
    "4 bit asymmetric": ({"bits": 4, "group_size": 64, "sym": False, "format": "gptq_v2"}, "Q4_1"),
    "5 bit": ({"bits": 5, "group_size": 64}, "Q5_0"),
    "5 bit asymmetric": ({"bits": 5, "group_size": 64, "sym": False, "format": "gptq_v2"}, "Q5_1"),
    "8 bit": ({"bits": 8, "group_size": 128}, "Q8_0"),
}


def in_float32(path: Path, out: Path) -> Path:
    """The same file with every tensor decoded by the `gguf` package."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if name != "general.architecture" and not name.startswith("GGUF."):
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_template(MODEL, tmp_path_factory.mktemp("template") / "f16.gguf")


@pytest.fixture
def own_q8(template: Path, tmp_path: Path) -> Path:
    """The tiny model as llama.cpp itself quantizes it to 8 bits."""
    python = ROOT / ".venv-clients" / "llamacpp" / "bin" / "python"
    out = tmp_path / "own-q8.gguf"
    line = [python, HERE / "run_llamacpp.py", "--quantize", "Q8_0", template, "-", out]
    subprocess.run(line, check=True, capture_output=True)
    return out


@pytest.mark.parametrize("name", SETTINGS)
def test_llama_cpp_computes_what_the_weights_say(
    name: str,
    ours: Quantize,
    template: Path,
    own_q8: Path,
    llamacpp: Client,
    windows: NDArray[np.int64],
    tmp_path: Path,
    finding: Callable[[str], None],
) -> None:
    settings, kind = SETTINGS[name]
    checkpoint = ours(**settings)
    result = convert_to_gguf(checkpoint, tmp_path / "ours.gguf", template=template)
    assert result.types[kind] == 6 * 7 and not result.issues
    expected = reference.logits(reference.dense_model(checkpoint, torch.float32), windows)
    plain = llamacpp(in_float32(result.output, tmp_path / "f32.gguf"))["logits"]
    same = Distance.between(plain, expected)
    # Only what is not quantized, F16 in the template, differs, and the minimums of Q4_1 and Q5_1.
    assert same.root_mean_square < 2e-3 and same.largest < 0.05, same
    judged = Distance.between(llamacpp(result.output)["logits"], expected)
    dense = llamacpp(in_float32(template, tmp_path / "dense.gguf"))["logits"]
    own = Distance.between(llamacpp(own_q8)["logits"], dense)
    finding(
        f"{kind}: rms {judged.root_mean_square:.5f}, in F32 {same.root_mean_square:.5f}; "
        f"llama.cpp's Q8_0 of the original {own.root_mean_square:.5f}"
    )
    assert judged.root_mean_square < 1.5 * own.root_mean_square
