"""The codes of our layers are in the GGUF file, exactly, in the place that llama.cpp reads them from."""

import json
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

import roundwise as rw
from roundwise.checkpoint.quantized_layers import quantized_layers
from roundwise.checkpoint.reader import Checkpoint
from roundwise.errors import ConfigError, OutputError, StrictError
from roundwise.gguf.convert import convert_to_gguf
from tests.gguf.templates import changed, read_gguf, tensors_of_llama_cpp, write_template
from tests.helpers import LLAMA, random_model, tensors_of, windows


def dense_values(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint under their dense names: layers decoded, in float32."""
    checkpoint = Checkpoint(folder)
    layers = quantized_layers(checkpoint)
    packed = {f"{layer.name}.{suffix}" for layer in layers for suffix in layer.tensors}
    rest = {name: t.float() for name, t in tensors_of(folder).items() if name not in packed}
    return rest | {f"{layer.name}.weight": layer.read().dequantize() for layer in layers}


def expected_values(folder: Path, original: Path, tmp_path: Path) -> dict[str, np.ndarray]:
    """What llama.cpp's converter makes of the dequantized checkpoint."""
    from safetensors.torch import save_file

    dense = tmp_path / "expected"
    dense.mkdir()
    shutil.copy(original / "config.json", dense)
    conv1d = r"\.c_(attn|proj|fc)\.weight$"  # GPT-2's files hold these as [in, out]
    values = {
        name: (W.T if re.search(conv1d, name) else W).contiguous()
        for name, W in dense_values(folder).items()
    }
    save_file(values, dense / "model.safetensors")
    return dict(tensors_of_llama_cpp(dense))


def assert_exact(path: Path, expected: dict[str, np.ndarray], packed: str, count: int) -> None:
    """Tensors in blocks of a type are exact, the others as near as 16 bits are; counts the blocks."""
    written = read_gguf(path)
    assert written.keys() == expected.keys()
    blocks = 0
    for name, (kind, values) in written.items():
        if kind == packed:
            blocks += 1
            np.testing.assert_array_equal(values, expected[name], err_msg=name)
        else:
            assert kind in ("F16", "F32"), name
            np.testing.assert_allclose(values, expected[name], rtol=1e-3, atol=1e-6)
    assert blocks == count


@pytest.mark.parametrize(
    ("family", "layers", "ways"),
    [
        ("llama", 14, {"the same rows", "rows permuted", "columns permuted"}),
        ("gemma3", 21, {"the same rows", "plus 1"}),
        ("gpt2", 8, {"the same rows", "transposed"}),
        ("bloom", 8, {"the same rows", "rows permuted", "columns permuted"}),
        ("phi3", 8, {"the same rows"}),
    ],
)
def test_layers_go_where_llama_cpp_has_them(family, layers, ways, quantized, folder_of, tmp_path):
    source, original = quantized(family, recipe="textbook"), folder_of(family)
    template = write_template(original, tmp_path / "f16.gguf")
    result = convert_to_gguf(source, tmp_path / "out.gguf", template=template)
    assert {*result.origins} == ways and not result.issues and not result.notes
    assert result.types["Q4_0"] == layers
    assert_exact(result.output, expected_values(source, original, tmp_path), "Q4_0", layers)
    reader = gguf.GGUFReader(result.output)
    assert reader.get_field("general.file_type").contents() == int(gguf.LlamaFileType.MOSTLY_Q4_0)


def test_experts_are_stacked(quantized, folder_of, tmp_path):
    source, original = quantized("qwen3_moe", recipe="textbook"), folder_of("qwen3_moe")
    template = write_template(original, tmp_path / "f16.gguf")
    result = convert_to_gguf(source, tmp_path / "out.gguf", template=template)
    assert result.origins["joined"] == 6 and not result.issues
    assert_exact(result.output, expected_values(source, original, tmp_path), "Q4_0", 2 * (4 + 3))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"bits": 3}, "Q4_0"), ({"bits": 8}, "Q8_0"), ({"bits": 5}, "Q5_0"), ({"bits": 6}, "Q8_0"),
        ({"bits": 3, "sym": False, "format": "gptq_v2"}, "Q4_0"),
        ({"bits": 4, "format": "compressed-tensors"}, "Q4_0"),
    ],
)  # fmt: skip
def test_every_width_that_is_exact(settings, kind, quantized, llama, tmp_path):
    source = quantized("llama", recipe="textbook", **settings)
    template = write_template(llama, tmp_path / "f16.gguf")
    result = convert_to_gguf(source, tmp_path / "out.gguf", template=template)
    assert not result.issues
    assert_exact(result.output, expected_values(source, llama, tmp_path), kind, 14)


def test_minimums_are_rounded_and_that_is_said(quantized, llama, tmp_path):
    source = quantized("llama", recipe="textbook", sym=False, format="gptq_v2")
    template = write_template(llama, tmp_path / "f16.gguf")
    result = convert_to_gguf(source, tmp_path / "out.gguf", template=template)
    assert result.types["Q4_1"] == 14 and not result.issues
    assert "and 9 more: Q4_1: the minimum, -scale · zero, is rounded to float16" in result.notes[0]
    expected = expected_values(source, llama, tmp_path)
    for name, (_, values) in read_gguf(result.output).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-3, atol=1e-3)


def test_what_cannot_be_stored_in_blocks_is_dequantized_and_named(quantized, llama, tmp_path):
    source = quantized("llama", recipe="textbook", desc_act=True)
    template = write_template(llama, tmp_path / "f16.gguf")
    result = convert_to_gguf(source, tmp_path / "out.gguf", template=template, rest="q8_0")
    assert len(result.issues) == 1
    assert "dequantized to F16, because 32 neighbouring input channels" in result.issues[0]
    expected = expected_values(source, llama, tmp_path)
    written = read_gguf(result.output)
    for layer in quantized_layers(Checkpoint(source)):
        assert layer.bits == 4
    up = "blk.0.ffn_up.weight"
    np.testing.assert_array_equal(
        written[up][1], expected[up].astype(np.float16).astype(np.float32)
    )
    assert written[up][0] == "F16" and written["token_embd.weight"][0] == "Q8_0"
    with pytest.raises(StrictError, match="because 32 neighbouring"):
        convert_to_gguf(source, tmp_path / "strict.gguf", template=template, strict=True)
    assert not (tmp_path / "strict.gguf").exists()


def test_the_rest_is_quantized_as_asked(quantized, llama, tmp_path):
    source = quantized("llama", recipe="textbook")
    template = write_template(llama, tmp_path / "f16.gguf")
    result = convert_to_gguf(source, tmp_path / "out.gguf", template=template, rest="q8_0")
    written, before = read_gguf(result.output), read_gguf(template)
    assert result.types == {"Q4_0": 14, "Q8_0": 2, "F32": 13}
    expected = gguf.quants.quantize(before["output.weight"][1], gguf.GGMLQuantizationType.Q8_0)
    stored = next(t for t in gguf.GGUFReader(result.output).tensors if t.name == "output.weight")
    np.testing.assert_array_equal(stored.data, expected)
    assert written["blk.0.attn_norm.weight"][0] == "F32"


def rotated_model(folder, *, tied):
    """A rotated checkpoint of the model in `folder / "model"`, and a template of that model."""
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied)
    random_model(config).save_pretrained(folder / "model")
    settings = rw.QuantizeConfig(group_size=32, method="rtn", rotate=True)
    rw.quantize(folder / "model", folder / "rotated", settings, windows())
    return folder / "rotated", write_template(folder / "model", folder / "f16.gguf")


def double_first_value(template, *names):
    """Changes tensors of a template, so that nothing in the original makes them."""
    for tensor in gguf.GGUFReader(template, "r+").tensors:
        if tensor.name in names:
            tensor.data.reshape(-1)[0] *= 2


def test_a_rotated_model_takes_its_other_tensors_along(quantized, folder_of, tmp_path):
    out, template = rotated_model(tmp_path, tied=False)
    result = convert_to_gguf(out, tmp_path / "out.gguf", template=template)
    assert not result.issues
    assert_exact(result.output, expected_values(out, tmp_path / "model", tmp_path), "Q4_0", 14)


def test_a_head_that_a_rotation_untied_has_no_place(quantized, folder_of, tmp_path):
    out, template = rotated_model(tmp_path, tied=True)
    with pytest.raises(ConfigError, match=r"lm_head.weight differs from the original's"):
        convert_to_gguf(out, tmp_path / "out.gguf", template=template)


def test_a_rotated_model_is_not_mixed_with_matrices_that_are_not(tmp_path):
    out, template = rotated_model(tmp_path, tied=False)
    double_first_value(template, "blk.0.ffn_up.weight")
    with pytest.raises(ConfigError, match=r"is rotated, and how blk.0.ffn_up.weight of"):
        convert_to_gguf(out, tmp_path / "out.gguf", template=template)


def test_a_tensor_whose_way_is_not_known_stays_and_is_named(quantized, llama, tmp_path):
    source = quantized("llama", recipe="textbook")
    template = write_template(llama, tmp_path / "f16.gguf")
    double_first_value(template, "blk.0.ffn_up.weight", "blk.1.attn_norm.weight")
    result = convert_to_gguf(source, tmp_path / "out.gguf", template=template)
    assert result.issues == ["model.layers.0.mlp.up_proj: not found in the template"]
    assert result.notes == [
        "blk.0.ffn_up.weight, blk.1.attn_norm.weight: not found in the original, so as in the "
        "template"
    ]  # fmt: skip
    before, after = read_gguf(template), read_gguf(result.output)
    for name in ("blk.0.ffn_up.weight", "blk.1.attn_norm.weight"):
        assert after[name][0] == before[name][0]
        np.testing.assert_array_equal(after[name][1], before[name][1])


def test_a_layer_of_which_only_a_part_is_found_is_named(quantized, llama, tmp_path):
    source = quantized("llama", recipe="textbook")
    template = write_template(llama, tmp_path / "f16.gguf")
    writer = gguf.GGUFWriter(tmp_path / "split.gguf", "llama")
    for name, (kind, values) in read_gguf(template).items():
        half = len(values) // 2
        parts = {name: values}
        if name == "blk.0.ffn_up.weight":
            parts = {"first": values[:half], "second": values[half:] * 2}
        for part, numbers in parts.items():
            stored = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(part, gguf.quants.quantize(numbers, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = convert_to_gguf(source, tmp_path / "out.gguf", template=tmp_path / "split.gguf")
    assert result.issues == [
        "model.layers.0.mlp.up_proj: only a part of it was found in the template"
    ]
    written = read_gguf(result.output)
    assert written["first"][0] == "Q4_0" and written["second"][0] == "F16"


def test_bad_arguments_are_refused_before_work_starts(quantized, folder_of, llama, tmp_path):
    source = quantized("llama", recipe="textbook")
    template = write_template(llama, tmp_path / "f16.gguf")
    with pytest.raises(ConfigError, match=r"name it like model.gguf"):
        convert_to_gguf(source, tmp_path / "out", template=template)
    with pytest.raises(OutputError, match="exists: choose another name"):
        convert_to_gguf(source, template, template=template)
    with pytest.raises(ConfigError, match=r"--rest 'q4_k' is not supported: use f16, .*q8_0"):
        convert_to_gguf(source, tmp_path / "o.gguf", template=template, rest="q4_k")
    plain = write_template(llama, tmp_path / "f32.gguf", "F32")
    with pytest.raises(ConfigError, match="--rest needs a template in F16 or BF16"):
        convert_to_gguf(source, tmp_path / "o.gguf", template=plain, rest="q8_0")
    other = write_template(folder_of("gemma3"), tmp_path / "other.gguf")
    with pytest.raises(ConfigError, match=r"no quantized layer was found in .*other.gguf"):
        convert_to_gguf(source, tmp_path / "o.gguf", template=other)
    assert not (tmp_path / "o.gguf").exists()


def test_the_helper_permutes_as_the_rotary_embedding_of_llama_cpp_needs():
    # Rows of one head of 4: two halves side by side become pairs.
    W = np.arange(4, dtype=np.float32)[:, None].repeat(2, 1)
    name = "model.layers.0.self_attn.q_proj.weight"
    config = {"model_type": "llama", "num_attention_heads": 1}
    assert changed(name, W, config)[:, 0].tolist() == [0, 2, 1, 3]


def test_the_result_as_json(quantized, llama, tmp_path):
    source = quantized("llama", recipe="textbook")
    template = write_template(llama, tmp_path / "f16.gguf")
    result = convert_to_gguf(source, tmp_path / "out.gguf", template=template)
    written = json.loads(json.dumps(result.as_json()))
    assert written["bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert 4.5 < written["bits_per_weight"] < 16 and written["to"] == "gguf"
