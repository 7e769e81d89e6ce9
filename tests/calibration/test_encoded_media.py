"""Models of pictures and sounds are calibrated with what their language model will see."""

from __future__ import annotations

import json
import shutil
import wave
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw

import roundwise as rw
from roundwise.calibration.encoded_media import encode_chat
from roundwise.calibration.records import Chat
from roundwise.calibration.windows import Batch, make_batches
from roundwise.checkpoint.reader import Checkpoint
from roundwise.convert import convert
from roundwise.errors import CalibrationError, CheckpointError
from roundwise.model.build import forward_kwargs
from roundwise.model.streamed import open_streamed_model
from roundwise.model.tokenizer import load_processor
from roundwise.run.api import quantize
from roundwise.verify import audit
from tests.helpers import hidden, raw, run_blocks, tensors_of

TEXT = {
    "vocab_size": 4128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text if p.type == 'text' else MARK }}{% endfor %}{% endif %}\n"
    "{% endfor %}"
)
MARKS = {"image": "<image>", "audio": "<|AUDIO|>"}
RATE = 16_000


def save_model(kind: str, folder: Path, tiny: Path) -> Path:
    """A small model of pictures (LLaVA) or sounds (Qwen2-Audio), with random weights and a processor."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    marks = [MARKS[kind], "<|audio_bos|>", "<|audio_eos|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    token = tokenizer.convert_tokens_to_ids(MARKS[kind])
    template = TEMPLATE.replace("MARK", f"'{MARKS[kind]}'")
    torch.manual_seed(0)
    if kind == "image":
        vision = transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            image_size=28, patch_size=14,
        )  # fmt: skip
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=transformers.LlamaConfig(**TEXT),
            image_token_id=token, vision_feature_layer=-1,
        )  # fmt: skip
        model = transformers.LlavaForConditionalGeneration(config)
        size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
        processor = transformers.LlavaProcessor(
            transformers.CLIPImageProcessorPil(**size), tokenizer, patch_size=14,
            vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=template,
        )  # fmt: skip
    else:
        sound = transformers.Qwen2AudioEncoderConfig(
            d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64,
            num_mel_bins=16, max_source_positions=50,
        )  # fmt: skip
        config = transformers.Qwen2AudioConfig(
            audio_config=sound,
            text_config=transformers.Qwen2Config(**TEXT),
            audio_token_index=token,
        )
        model = transformers.Qwen2AudioForConditionalGeneration(config)
        extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
        processor = transformers.Qwen2AudioProcessor(
            extractor, tokenizer, chat_template=template, audio_token=MARKS[kind]
        )
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def draw(file: Path, seed: int) -> None:
    """Draws a picture of coloured shapes."""
    numbers = np.random.default_rng(seed)
    picture = Image.new("RGB", (40, 30), tuple(numbers.integers(0, 255, 3).tolist()))
    drawing = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y = numbers.integers(0, 25, 2).tolist()
        drawing.ellipse((x, y, x + 12, y + 8), fill=tuple(numbers.integers(0, 255, 3).tolist()))
    picture.save(file)


def play(file: Path, seed: int, rate: int = RATE) -> None:
    """Writes a sound of two tones."""
    low, high = np.random.default_rng(seed).integers(200, 3000, 2)
    time = np.arange(rate // 2) / rate
    samples = np.sin(2 * np.pi * low * time) + np.sin(2 * np.pi * high * time)
    with wave.open(str(file), "wb") as out:
        out.setparams((1, 2, rate, 0, "NONE", ""))
        out.writeframes((8000 * samples).astype("<i2").tobytes())


def write_records(kind: str, folder: Path, count: int = 6, texts: Sequence[str] = ()) -> Path:
    """A file of chats, each with a picture or a sound, and then some of text alone."""
    folder.mkdir(exist_ok=True)
    lines = []
    for seed in range(count):
        name = f"{seed}.{'png' if kind == 'image' else 'wav'}"
        (draw if kind == "image" else play)(folder / name, seed)
        content = [{"type": kind}, {"type": "text", "text": "import os, sys"}]
        answer = {"role": "assistant", "content": f"os.walk({seed})"}
        messages = [{"role": "user", "content": content}, answer]
        lines.append(json.dumps({f"{kind}s": [name], "messages": messages, "id": seed}))
    chats = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    lines += map(json.dumps, chats)
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return folder / "chats.jsonl"


def small_models(
    tiny: Path, factory: pytest.TempPathFactory, texts: Sequence[str] = ()
) -> Callable[[str], tuple[Path, Path]]:
    """Returns a function: kind -> folder of its small model, and a file of its records."""

    @cache
    def get(kind: str) -> tuple[Path, Path]:
        folder = factory.mktemp(kind)
        records = write_records(kind, folder / "records", texts=texts)
        return save_model(kind, folder / "model", tiny), records

    return get


@pytest.fixture(scope="module")
def model_of(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """Folder of the small model of a kind, and a file of its records."""
    return small_models(tiny, tmp_path_factory)


def encoded(model: Path, records: Path, count: int | None = None) -> list[Batch]:
    """The first records as batches, each encoded by the processor itself; None: all of them."""
    from roundwise.calibration.sources import read_documents

    processor = load_processor(Checkpoint(model))
    chats = [d for d in read_documents(str(records)).documents if isinstance(d, Chat)]
    return make_batches([encode_chat(chat, processor) for chat in chats[:count]], 1)


KINDS = pytest.mark.parametrize("kind", ["image", "audio"])


@KINDS
@torch.no_grad()
def test_the_language_model_sees_what_the_tower_made_of_it(
    kind: str, model_of: Callable[[str], tuple[Path, Path]]
) -> None:
    """Hidden states equal those of transformers' own forward with the processor's inputs."""
    model, records = model_of(kind)
    streamed, batches = open_streamed_model(model), encoded(model, records)[:2]
    plain = type(streamed.model).from_pretrained(model).eval()
    seen: dict[str, list[torch.Tensor]] = {block.name: [] for block in streamed.blocks}
    for block in streamed.blocks:
        plain.get_submodule(block.name).register_forward_hook(
            lambda _m, _a, output, key=block.name: seen[key].append(hidden(output))
        )
    processor = transformers.AutoProcessor.from_pretrained(model)
    for batch in batches:
        assert batch.inputs
        plain(input_ids=batch.input_ids, **batch.inputs)
        without = plain(input_ids=batch.input_ids[:, -4:]).logits
        assert bool(torch.isfinite(without).all())
    names = iter([block.name for block in streamed.blocks])
    for _, scheduler in run_blocks(streamed, batches, reference=True):
        name = next(names)
        for paused in [*scheduler.quantized, *scheduler.references]:
            assert torch.equal(hidden(paused.output), seen[name][2 * paused.number])
    token = processor.tokenizer.convert_tokens_to_ids(MARKS[kind])
    assert int((batches[0].input_ids == token).sum()) > 1


@KINDS
def test_a_run(kind: str, model_of: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    model, records = model_of(kind)
    config = rw.QuantizeConfig(group_size=32)
    options: dict[str, Any] = {"samples": 6, "seq_len": 128, "batch_size": 2}
    result = quantize(model, tmp_path / "out", config, records, **options)
    assert not any("calibrated with text alone" in line for line in result.warnings)
    assert all("language_model" in layer.name for layer in result.layers)
    assert {layer.tokens for layer in result.layers} == {
        sum(batch.input_ids.numel() for batch in encoded(model, records))
    }
    assert audit(tmp_path / "out", against=Checkpoint(model)).failures == []
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    towers = [name for name in before if "tower" in name]
    assert len(towers) > 20
    assert all(raw(before[name]) == raw(after[name]) for name in towers)
    again = quantize(model, tmp_path / "again", config, records, **options)
    assert again.layers == result.layers
    # With the words alone the layers see other inputs.
    words = records.with_name("words.jsonl")
    words.write_text(records.read_text().replace(f'{{"type": "{kind}"}}, ', ""))
    text = quantize(model, tmp_path / "text", config, words, **options)
    assert any("calibrated with text alone" in line for line in text.warnings)
    assert text.layers != result.layers
    # The result computes with pictures and sounds as its dequantized weights do.
    convert(tmp_path / "out", tmp_path / "dense", "dense", dtype=torch.float32)
    batch = encoded(model, records)[0]
    logits = []
    for folder in (tmp_path / "out", tmp_path / "dense", model):
        loaded = rw.load(folder, dtype=torch.float32)[0]
        with torch.no_grad():
            logits.append(
                loaded(**forward_kwargs(loaded, batch.input_ids, None, batch.inputs)).logits
            )
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
    divergence = torch.nn.functional.kl_div(
        logits[0].log_softmax(-1), logits[2].log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert float(divergence.mean()) < 0.05


def test_text_and_pictures_share_the_windows(
    model_of: Callable[[str], tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    model, records = model_of("image")
    mixed = tmp_path / "mixed.jsonl"
    lines = records.read_text().splitlines()[:2]
    lines = [line.replace('["', f'["{records.parent}/') for line in lines]
    lines += [json.dumps({"text": text.read_text()[:4000]})] * 2
    mixed.write_text("\n".join(lines))
    config = rw.QuantizeConfig(group_size=32, recipe="textbook")
    result = quantize(model, tmp_path / "out", config, mixed, samples=8, seq_len=64, batch_size=2)
    manifest = json.loads((tmp_path / "out" / "roundwise.json").read_text())
    assert manifest["run"]["calibration"]["samples"] == 8
    assert not any("calibrated with text alone" in line for line in result.warnings)


def test_what_cannot_be_used(
    model_of: Callable[[str], tuple[Path, Path]], text_model: Path, tmp_path: Path
) -> None:
    model, records = model_of("image")

    def refused(folder: Path, message: str, file: Path = records, **options: Any) -> None:
        with pytest.raises((CalibrationError, CheckpointError), match=message):
            quantize(folder, tmp_path / "out", rw.QuantizeConfig(group_size=32), file, **options)

    refused(text_model, r"chats.jsonl, line \d has a picture or a sound, but the model takes text")
    refused(model, "picture or a sound, but only=assistant is for chats of text", only="assistant")
    refused(model, r"longer than seq_len=4 tokens and cannot be cut: the longest has", seq_len=4)
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    (bare / "processor_config.json").unlink()
    (bare / "preprocessor_config.json").unlink(missing_ok=True)
    refused(bare, "has no (usable )?processor for pictures or sounds")
    broken = write_records("image", tmp_path / "broken", 1)
    (broken.parent / "0.png").write_bytes(b"no picture")
    refused(model, r"chats.jsonl, line 1 cannot be encoded: cannot identify image file", broken)
    sounds, chats = model_of("audio")[0], write_records("audio", tmp_path / "slow", 1)
    play(chats.parent / "0.wav", 0, rate=8000)
    refused(sounds, "a WAV file has 8000 samples per second, but the model takes 16000", chats)
