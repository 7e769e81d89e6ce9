"""GGUF files as sources: each tensor is what transformers makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type

import roundwise as rw
from roundwise.checkpoint.reader import Checkpoint
from roundwise.errors import CheckpointError
from roundwise.model.gguf_source import open_source
from roundwise.model.streamed import open_streamed_model
from roundwise.plan.plan import plan
from roundwise.verify import audit
from tests.helpers import LLAMA, random_model, raw, tensors_of, windows

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.weight"
    return f"{NAMES[stem]}.weight"


def add_tokenizer(writer: gguf.GGUFWriter, size: int, tiny: Path) -> None:
    """Adds the first tokens of the bundled model's tokenizer."""
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)[:size]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    known, pairs = {*tokens}, (m if isinstance(m, list) else m.split() for m in tokenizer["merges"])
    writer.add_token_merges([" ".join(m) for m in pairs if {*m, "".join(m)} <= known])
    writer.add_token_types([1] * len(tokens))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def write_llama(model: transformers.LlamaForCausalLM, file: Path, kind: Type, tiny: Path) -> None:
    """Writes a Llama as llama.cpp does: queries and keys in the order of its rotary embedding."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, config.vocab_size, tiny)
    for name, tensor in model.state_dict().items():
        W = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = W.shape[0] // config.head_dim
            W = W.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(W.shape)
        if W.ndim == 2:
            W = gguf.quants.quantize(np.ascontiguousarray(W), kind)
            writer.add_tensor(gguf_name(name), W, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), W)
    close(writer)


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module", params=[Type.Q8_0, Type.Q4_0, Type.BF16], ids=lambda t: t.name)
def folder(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / request.param.name
    folder.mkdir()
    model = random_model(transformers.LlamaConfig(**{**LLAMA, "vocab_size": 512}))
    write_llama(model, folder / "a.gguf", request.param, tiny)
    return folder


@pytest.fixture(scope="module")
def dense(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, dequantized and written by transformers."""
    out = tmp_path_factory.mktemp("dense")
    transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="a.gguf", dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).save_pretrained(out)  # fmt: skip
    transformers.AutoTokenizer.from_pretrained(folder, gguf_file="a.gguf").save_pretrained(out)
    return out


def test_tensors_are_those_of_transformers(folder: Path, dense: Path) -> None:
    opened, expected = open_source(folder), tensors_of(dense)
    assert opened.tensors.keys() == expected.keys()
    for name, T in expected.items():
        info = opened.tensors[name]
        assert (info.dtype, info.shape) == ("BF16", tuple(T.shape))
        assert raw(info.read()) == raw(T), name
    assert opened.config["architectures"] == ["LlamaForCausalLM"]
    assert opened.nbytes() == sum(T.nbytes for T in expected.values())


def test_the_same_codes_as_from_the_dequantized_weights(
    folder: Path, dense: Path, tmp_path: Path
) -> None:
    config = rw.QuantizeConfig(group_size=32, recipe="textbook")
    for source, out in ((folder / "a.gguf", "a"), (dense, "b")):
        rw.quantize(source, tmp_path / out, config, windows(), samples=4, seq_len=32)
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(raw(a[name]) == raw(b[name]) for name in a)
    assert audit(tmp_path / "a", against=open_source(folder)).failures == []
    # The tokenizer goes with it.
    tokenizers = [transformers.AutoTokenizer.from_pretrained(f) for f in (tmp_path / "a", dense)]
    assert tokenizers[0]("import os").input_ids == tokenizers[1]("import os").input_ids
    planned = plan(open_streamed_model(folder), config, samples=4, seq_len=32)
    expected = {"BF16": []}.get(folder.name, [f"{folder.name} layers -> 4-bit GPTQ (14)"])
    assert planned.sources[:1] == expected


def test_a_config_and_a_tokenizer_beside_the_file_are_used(
    folder: Path, dense: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / "a.gguf", tmp_path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense / name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    opened = open_source(tmp_path)
    assert {info.dtype for info in opened.tensors.values()} == {"F16"}
    assert (opened.folder / "tokenizer.json").read_text() == (dense / "tokenizer.json").read_text()


def test_files_that_cannot_be_used(folder: Path, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(CheckpointError, match=r"transformers .* cannot read .*a.gguf"):
        open_source(tmp_path)
    shutil.copy(folder / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(
        CheckpointError, match=r"has 2 GGUF files .* give the path of the one to use"
    ):
        open_source(tmp_path)
    # Beside safetensors, a GGUF file is another copy of the weights.
    both = Path(shutil.copytree(llama, tmp_path / "both"))
    shutil.copy(folder / "a.gguf", both)
    assert type(open_source(both)) is Checkpoint


LFM2_NAMES = (
    ("model.embed_tokens.", "token_embd."), ("model.embedding_norm.", "token_embd_norm."),
    ("lm_head.", "output."), ("model.layers.", "blk."), (".operator_norm.", ".attn_norm."),
    (".self_attn.q_proj.", ".attn_q."), (".self_attn.k_proj.", ".attn_k."),
    (".self_attn.v_proj.", ".attn_v."), (".self_attn.out_proj.", ".attn_output."),
    (".self_attn.q_layernorm.", ".attn_q_norm."), (".self_attn.k_layernorm.", ".attn_k_norm."),
    (".feed_forward.w1.", ".ffn_gate."), (".feed_forward.w3.", ".ffn_up."),
    (".feed_forward.w2.", ".ffn_down."), (".conv.", ".shortconv."),
)  # fmt: skip


def test_an_architecture_that_transformers_converts(tiny: Path, tmp_path: Path) -> None:
    """LFM2, whose tensors go through converters instead of processors; in older versions they do not."""
    sizes = {**LLAMA, "vocab_size": 512, "norm_eps": 1e-5, "block_auto_adjust_ff_dim": False}
    config = transformers.Lfm2Config(
        **sizes, conv_L_cache=3, conv_bias=False, layer_types=["conv", "full_attention"],
        tie_word_embeddings=False,
    )  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "lfm2")
    writer.add_context_length(64)
    writer.add_block_count(2)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv([0, config.num_key_value_heads])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_shortconv_l_cache(3)
    writer.add_vocab_size(512)
    add_tokenizer(writer, 512, tiny)
    for key, tensor in random_model(config).state_dict().items():
        name = key
        for ours, theirs in LFM2_NAMES:
            name = name.replace(ours, theirs)
        W = tensor.float().numpy()
        if W.ndim == 3:
            writer.add_tensor(name, np.ascontiguousarray(W[:, 0]))
        elif W.ndim == 2:
            W = gguf.quants.quantize(np.ascontiguousarray(W), Type.Q8_0)
            writer.add_tensor(name, W, raw_dtype=Type.Q8_0)
        else:
            writer.add_tensor(name, W)
    close(writer)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="a.gguf", dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )  # fmt: skip
    opened = open_source(tmp_path)
    for name, T in model.state_dict().items():
        assert raw(opened.tensors[name].read()) == raw(T), name
    quick = rw.QuantizeConfig(group_size=32, recipe="textbook")
    rw.quantize(tmp_path, tmp_path / "out", quick, windows(), samples=4, seq_len=32)
    assert audit(tmp_path / "out", against=open_source(tmp_path)).failures == []
