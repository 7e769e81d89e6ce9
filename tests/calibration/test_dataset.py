"""Windows and batches from text, chats, strings or token ids; warnings and issues."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from roundwise.calibration.dataset import (
    Calibration,
    load_calibration,
    split_by_weight,
    unique_share,
)
from roundwise.config import CalibrationConfig
from roundwise.errors import CalibrationError
from tests.helpers import windows

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


class Letters:
    """A tokenizer with one token per character, so that expected windows are easy to read."""

    eos_token_id: int | None = 0
    chat_template: str | None = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, chat: list[dict[str, str]], **_: Any) -> dict[str, list[int]]:
        text = "".join(f"<{m['role']}>{m['content']}\n" for m in chat)
        return self(text)


def load(source: Any, tokenizer: Any = None, widest: int = 0, **changes: Any) -> Calibration:
    usual: dict[str, Any] = {"samples": 4, "seq_len": 10, "batch_size": 2, "seed": 0}
    settings = CalibrationConfig(**{**usual, **changes})
    return load_calibration(source, tokenizer or Letters(), settings, widest=widest)


def rows(calibration: Calibration) -> list[list[int]]:
    """The windows, padding removed, in the order of the batches."""
    return [
        ids[keep].tolist()
        for batch in calibration.batches
        for ids, keep in zip(
            batch.input_ids,
            batch.mask if batch.mask is not None else torch.ones_like(batch.input_ids).bool(),
            strict=True,
        )
    ]


def text_of(row: list[int]) -> str:
    return "".join(map(chr, row))


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """A text in which every 4 characters are a number of their own."""
    path = tmp_path / "numbers.txt"
    path.write_text("".join(f"{number:04}" for number in range(500)))
    return path


class TestText:
    def test_windows_are_pieces_of_the_text(self, counted: Path) -> None:
        text = counted.read_text()
        loaded = rows(load(str(counted), samples=20))
        assert [len(row) for row in loaded] == [10] * 20
        assert all(text_of(row) in text for row in loaded)

    @pytest.mark.parametrize("seed", range(5))
    def test_windows_do_not_overlap(self, counted: Path, seed: int) -> None:
        text = counted.read_text()
        loaded = rows(load(str(counted), samples=200, seq_len=13, seed=seed))
        assert len(loaded) >= 2000 // 13 - 1
        # 13 characters hold two whole numbers: they tell where in the text a window is.
        places = sorted(text.index(text_of(row)) for row in loaded)
        assert all(after - before >= 13 for before, after in pairwise(places))

    def test_only_the_seed_decides(self, counted: Path) -> None:
        first = load(str(counted), seed=1)
        random.seed(99)
        torch.manual_seed(99)
        state = random.getstate(), torch.get_rng_state()
        again, other = load(str(counted), seed=1), load(str(counted), seed=2)
        assert rows(again) == rows(first)
        assert again.record.as_json() == first.record.as_json()
        assert rows(other) != rows(first)
        assert other.record.sha256 != first.record.sha256
        # The generator is private: the global random state does not change.
        assert random.getstate() == state[0]
        assert torch.equal(torch.get_rng_state(), state[1])

    def test_a_text_shorter_than_a_window_is_one_window(self, tmp_path: Path) -> None:
        (tmp_path / "short.txt").write_text("short")
        loaded = load(str(tmp_path / "short.txt"))
        assert [text_of(row) for row in rows(loaded)] == ["short"]
        assert (loaded.record.samples, loaded.record.tokens) == (1, 5)

    def test_a_long_text_is_not_tokenized_completely(self, tmp_path: Path) -> None:
        (tmp_path / "long.txt").write_text("".join(f"{n:07} " for n in range(1 << 20)))
        seen = 0

        class Counting(Letters):
            def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
                nonlocal seen
                seen += len(text)
                return super().__call__(text, **options)

        loaded = load(str(tmp_path / "long.txt"), Counting(), samples=64)
        assert len(rows(loaded)) == 64
        assert seen <= 2 << 20
        # The pieces come from the whole text.
        places = [int(text_of(row).split()[-1][:4] or 0) for row in rows(loaded)]
        assert places
        assert rows(load(str(tmp_path / "long.txt"), samples=64)) == rows(loaded)


class TestJsonLines:
    def file(self, path: Path, *records: Any) -> str:
        path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
        return str(path)

    def test_text_documents_are_joined_by_the_end_token(self, tmp_path: Path) -> None:
        source = self.file(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two", "id": 7})
        assert rows(load(source)) == [[*map(ord, "one"), 0, *map(ord, "two")]]

    def test_chats_go_through_the_template(self, tmp_path: Path) -> None:
        tokenizer = Letters()
        tokenizer.chat_template = CHAT_TEMPLATE
        chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
        source = self.file(tmp_path / "a.jsonl", {"messages": chat})
        loaded = rows(load(source, tokenizer, seq_len=100))
        assert [text_of(row) for row in loaded] == ["<user>hi\n<assistant>ho\n"]

    def test_chats_with_a_real_tokenizer(self, tiny: Path, tmp_path: Path) -> None:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
        tokenizer.chat_template = CHAT_TEMPLATE
        source = self.file(
            tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "def f(x): pass"}]}
        )
        loaded = rows(load(source, tokenizer, seq_len=100))
        assert tokenizer.decode(loaded[0]) == "<user>def f(x): pass\n"

    def test_chats_without_a_template_are_refused(self, tmp_path: Path) -> None:
        source = self.file(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
        with pytest.raises(CalibrationError, match="no chat template: give plain `text`"):
            load(source)


class TestPythonList:
    def test_each_item_is_one_window_in_the_given_order(self) -> None:
        assert rows(load([[5, 6, 7], [8, 9, 10], [1, 2, 3]], batch_size=1)) == [
            [5, 6, 7], [8, 9, 10], [1, 2, 3],
        ]  # fmt: skip

    def test_strings(self) -> None:
        assert [text_of(row) for row in rows(load(["abc", "xyz"]))] == ["abc", "xyz"]

    def test_tensors_and_dicts_with_a_mask(self) -> None:
        items = [
            torch.tensor([[4, 5, 6]]),
            {
                "input_ids": torch.tensor([[0, 0, 7, 8]]),
                "attention_mask": torch.tensor([[0, 0, 1, 1]]),
            },
            {"input_ids": [1, 2, 3, 9], "attention_mask": [1, 1, 1, 0]},
        ]
        loaded = load(items, batch_size=1)
        assert sorted(rows(loaded)) == [[1, 2, 3], [4, 5, 6], [7, 8]]
        assert loaded.record.tokens == 8

    def test_output_of_a_tokenizer(self, tiny: Path) -> None:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
        encoded = tokenizer("import os", return_tensors="pt")
        assert rows(load([encoded])) == [encoded["input_ids"][0].tolist()]

    def test_long_items_are_cut_and_surplus_ones_dropped(self) -> None:
        loaded = load(windows(6, length=25), samples=4, seq_len=10)
        assert rows(loaded) == [row[:10] for row in windows(6, length=25)[:4]]

    def test_empty_items_are_dropped(self) -> None:
        assert rows(load([[], [5, 6], ""])) == [[5, 6]]

    @settings(max_examples=40, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9), batch_size=st.integers(1, 5)
    )
    def test_batches_hold_every_token_once(self, lengths: list[int], batch_size: int) -> None:
        items = [list(range(100 * i + 1, 100 * i + 1 + n)) for i, n in enumerate(lengths)]
        loaded = load(items, samples=99, seq_len=99, batch_size=batch_size)
        assert sorted(rows(loaded)) == items
        assert loaded.record.tokens == sum(lengths)
        assert all(len(batch.input_ids) <= batch_size for batch in loaded.batches)
        for batch in loaded.batches:
            padded = len(set(map(len, rows(replace(loaded, batches=[batch]))))) > 1
            assert (batch.mask is not None) == padded
            if batch.mask is not None:  # on the right
                assert torch.equal(batch.mask, batch.mask.sort(dim=1, descending=True).values)


class TestWarnings:
    def warnings_of(self, source: Any, **changes: Any) -> str:
        return "\n".join(load(source, **changes).warnings)

    @pytest.fixture
    def plenty(self) -> list[list[int]]:
        return windows(128, length=16)

    def test_enough_text_gives_no_warning(self, plenty: list[list[int]]) -> None:
        assert self.warnings_of(plenty, samples=128, seq_len=16, widest=2048) == ""

    def test_fewer_tokens_than_channels(self, plenty: list[list[int]]) -> None:
        warnings = self.warnings_of(plenty, samples=128, seq_len=16, widest=2049)
        assert "2048 calibration tokens are fewer than the 2049 input channels" in warnings

    def test_few_samples(self, plenty: list[list[int]]) -> None:
        warnings = self.warnings_of(plenty[:127], samples=127, seq_len=16)
        assert warnings == "127 calibration samples: 128 or more are advised"

    @pytest.mark.parametrize(("distinct", "warned"), [(1, True), (60, True), (70, False)])
    def test_repetition(self, distinct: int, warned: bool, plenty: list[list[int]]) -> None:
        items = [plenty[i % distinct] for i in range(128)]
        warnings = self.warnings_of(items, samples=128, seq_len=16)
        assert ("mostly repetition" in warnings) == warned

    def test_repetition_in_a_text(self, tmp_path: Path) -> None:
        (tmp_path / "rows.txt").write_text("all work and no play " * 2000)
        assert "mostly repetition" in self.warnings_of(
            str(tmp_path / "rows.txt"), samples=128, seq_len=40
        )


class TestIssues:
    """The text has less than was requested, or more than is used."""

    def test_none(self) -> None:
        assert load(windows(6, length=16), samples=6, seq_len=16).not_as_asked == ()

    def test_fewer_windows(self, counted: Path) -> None:
        loaded = load(windows(6, length=16), samples=9, seq_len=16)
        assert loaded.not_as_asked == ("the calibration text gives only 6 of 9 windows",)
        assert "gives only" in load(str(counted), samples=10**6).not_as_asked[0]

    def test_more_items(self) -> None:
        loaded = load(windows(6, length=16), samples=4, seq_len=16)
        assert loaded.not_as_asked == ("only the first 4 of 6 calibration items are used: samples",)

    def test_longer_items(self) -> None:
        rows = [*windows(2, length=16), *windows(1, length=17)]
        loaded = load(rows, samples=3, seq_len=16)
        assert loaded.not_as_asked == ("1 of 3 calibration items are cut to seq_len=16 tokens",)


def test_records_of_different_calibrations_differ(counted: Path) -> None:
    base = load(str(counted)).record.as_json()
    assert base["source"] == "numbers.txt"
    assert base == load(str(counted)).record.as_json()
    for changes in ({"samples": 5}, {"seq_len": 9}, {"batch_size": 1}, {"seed": 1}):
        assert load(str(counted), **changes).record.as_json() != base
    counted.write_text(counted.read_text()[::-1])
    assert load(str(counted)).record.as_json() != base


def test_the_record_does_not_depend_on_the_folder_of_the_file(
    counted: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = counted.rename(tmp_path / "elsewhere" / counted.name)
    assert str(tmp_path) not in json.dumps(load(str(moved)).record.as_json())


def test_a_mixture_follows_its_weights(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "a.txt").write_text("alpha " * 4000)
    (tmp_path / "b.txt").write_text("omega " * 4000)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    source = f"{tmp_path}/a.txt:0.7,{tmp_path}/b.txt:0.3"
    loaded = load_calibration(
        source, tokenizer, CalibrationConfig(samples=20, seq_len=16, batch_size=5, seed=0)
    )
    windows = [row for batch in loaded.batches for row in batch.input_ids.tolist()]
    kinds = ["alpha" in tokenizer.decode(window) for window in windows]
    assert (kinds.count(True), len(kinds)) == (14, 20)
    assert kinds != sorted(kinds, reverse=True)  # mixed, not one after the other
    assert loaded.record.source == "a.txt: 14, b.txt: 6"
    again = load_calibration(
        source, tokenizer, CalibrationConfig(samples=20, seq_len=16, batch_size=5, seed=0)
    )
    assert again.record.sha256 == loaded.record.sha256


def test_split_by_weight() -> None:
    assert split_by_weight(10, [0.5, 0.25, 0.25]) == [5, 3, 2]
    assert split_by_weight(128, [1.0]) == [128]
    assert split_by_weight(3, [0.98, 0.01, 0.01]) == [3, 1, 1]


def test_unique_share() -> None:
    distinct, repeated = [*range(64)], [1, 2, 3, 4, 5, 6, 7, 8] * 4
    assert unique_share([distinct]) == 1.0
    assert unique_share([repeated]) == 0.25
    assert unique_share([[1, 2]]) == 1.0


class TestDocumentsThatCannotBeTokenized:
    @pytest.fixture
    def tokenizer(self, tiny: Path) -> Any:
        return transformers.AutoTokenizer.from_pretrained(tiny)

    def read(self, folder: Path, record: str, tokenizer: Any) -> None:
        (folder / "x.jsonl").write_text(f'{{"text": "fine"}}\n{record}\n')
        load_calibration(
            str(folder / "x.jsonl"),
            tokenizer,
            CalibrationConfig(samples=1, seq_len=4, batch_size=1, seed=0),
        )

    def test_half_a_character(self, tokenizer: Any, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match=r"a text of the calibration.*begins with .*odd"):
            self.read(tmp_path, '{"text": "odd \\ud800"}', tokenizer)

    def test_a_chat_that_the_template_refuses(self, tokenizer: Any, tmp_path: Path) -> None:
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        chat = '{"messages": [{"role": "user", "content": "hello"}]}'
        with pytest.raises(CalibrationError, match=r"a chat of .*\(roles must alternate\).*hello"):
            self.read(tmp_path, chat, tokenizer)

    def test_json_nested_too_deeply(self, tokenizer: Any, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match="line 2 is not valid JSON"):
            self.read(tmp_path, '{"text": ' + "[" * 100_000, tokenizer)
