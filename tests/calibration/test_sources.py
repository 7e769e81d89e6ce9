"""Sources of text: files, folders, Python's standard library, public data sets, mixtures."""

from __future__ import annotations

import sys
import sysconfig
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from roundwise.calibration.records import Chat
from roundwise.calibration.sources import MAX_DOCUMENTS, parse_mixture, read_documents, read_text
from roundwise.errors import CalibrationError


@pytest.fixture(scope="module")
def parts() -> tuple[list[Any], list[Any]]:
    """Python's own library: for calibration, and held out."""
    return (
        read_documents("python-stdlib").documents,
        read_documents("python-stdlib", held_out=True).documents,
    )


class TestPythonStdlib:
    """The sources of the running interpreter: no network, no data files."""

    def test_the_split_is_deterministic(self, parts: tuple[list[Any], list[Any]]) -> None:
        assert read_documents("python-stdlib", held_out=True).documents == parts[1]

    def test_the_parts_are_disjoint(self, parts: tuple[list[Any], list[Any]]) -> None:
        # Some files are equal to each other (empty ones, licences): sizes tell the rest apart.
        calibration, held_out = ({text for text in part if len(text) > 500} for part in parts)
        assert not calibration & held_out
        assert 15 < len(calibration) / len(held_out) < 25

    def test_installed_packages_are_not_part_of_it(
        self, parts: tuple[list[Any], list[Any]]
    ) -> None:
        everything = {*parts[0], *parts[1]}
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        assert (stdlib / "shutil.py").read_text(encoding="utf-8") in everything
        assert Path(pytest.__file__).read_text(encoding="utf-8") not in everything
        assert sum(map(len, parts[0])) > 5_000_000

    def test_evaluation_reads_the_held_out_part(self, parts: tuple[list[Any], list[Any]]) -> None:
        assert read_text("python-stdlib") == "\n".join(parts[1])


class TestFiles:
    def test_a_text_file_is_one_document(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("naïve\n\n漢字", encoding="utf-8")
        assert read_documents(str(tmp_path / "a.txt")).documents == ["naïve\n\n漢字"]

    def test_json_lines(self, tmp_path: Path) -> None:
        chat = '[{"role": "user", "content": "hi"}]'
        (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n\n{{"messages": {chat}}}\n')
        assert read_documents(str(tmp_path / "a.jsonl")).documents == [
            "one", Chat([{"role": "user", "content": "hi"}]),
        ]  # fmt: skip

    def test_a_line_separator_inside_a_string_does_not_end_the_line(self, tmp_path: Path) -> None:
        # U+2028 may stand in JSON as it is; only a newline ends a line.
        (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two"}\n', encoding="utf-8")
        assert read_documents(str(tmp_path / "a.jsonl")).documents == ["one\u2028two"]

    def test_blank_documents_are_left_out(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": " "}\n{"text": "x"}\n{"messages": []}\n')
        assert read_documents(str(tmp_path / "a.jsonl")).documents == ["x"]

    def test_perplexity_of_chats_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
        with pytest.raises(CalibrationError, match="holds chats"):
            read_text(str(tmp_path / "a.jsonl"))

    def test_an_unknown_name_lists_the_known_ones(self) -> None:
        with pytest.raises(
            CalibrationError, match=r"python-stdlib, wikitext2, c4, ptb, github-code, or NAME:SPLIT"
        ):
            read_documents("wikitext3")


class TestDataSets:
    """Hugging Face data sets, through a stand-in for the `datasets` package."""

    @pytest.fixture
    def datasets(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
        def install(load: Callable[..., Any]) -> None:
            module = types.ModuleType("datasets")
            module.load_dataset = load  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, "datasets", module)

        return install

    @pytest.mark.parametrize(
        ("source", "held_out", "call"),
        [
            ("wikitext2", False, ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
            ("wikitext2", True, ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
            ("c4", False, ("allenai/c4", "en", "train")),
            ("c4", True, ("allenai/c4", "en", "validation")),
            ("ptb", True, ("ptb-text-only/ptb_text_only", None, "test")),
            ("github-code", False, ("codeparrot/codeparrot-clean-train", None, "train")),
            ("github-code", True, ("codeparrot/codeparrot-clean-valid", None, "train")),
            ("me/mine:dev:text", False, ("me/mine", None, "dev")),
        ],
    )
    def test_the_data_set_and_split_that_are_loaded(
        self, source: str, held_out: bool, call: tuple[Any, ...], datasets: Any
    ) -> None:
        calls: list[tuple[Any, ...]] = []

        def load(name: str, subset: str | None, *, split: str, streaming: bool) -> Any:
            calls.append((name, subset, split))
            assert streaming
            return [dict.fromkeys(("text", "sentence", "content"), each) for each in ("one", "")]

        datasets(load)
        assert read_documents(source, held_out=held_out).documents == ["one"]
        assert calls == [call]

    def test_only_as_much_is_read_as_needed(self, datasets: Any) -> None:
        taken = 0

        def rows(*_: Any, **__: Any) -> Any:
            nonlocal taken
            while True:
                taken += 1
                yield {"text": f"row {taken}"}

        datasets(rows)
        assert len(read_documents("c4").documents) == taken == MAX_DOCUMENTS

    def test_a_missing_column(self, datasets: Any) -> None:
        datasets(lambda *_, **__: [{"body": "x"}])
        with pytest.raises(CalibrationError, match="me/mine has no column 'text'"):
            read_documents("me/mine:train:text")

    def test_a_set_that_cannot_be_read(self, datasets: Any) -> None:
        def load(*_: Any, **__: Any) -> Any:
            raise ConnectionError("no route to host\nand a long story")

        datasets(load)
        with pytest.raises(CalibrationError, match=r"\(train\) cannot be read: no route to host$"):
            read_documents("wikitext2")

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(CalibrationError, match=r"pip install '\.\[datasets\]'"):
            read_documents("wikitext2")

    def test_chats_in_a_column(self, datasets: Any) -> None:
        chat = [{"role": "user", "content": "hi"}]
        datasets(lambda *_, **__: [{"messages": chat}])
        assert read_documents("me/mine:train:messages").documents == [Chat(chat)]

    def test_a_column_of_something_else(self, datasets: Any) -> None:
        datasets(lambda *_, **__: [{"label": 3}])
        with pytest.raises(CalibrationError, match="label"):
            read_documents("me/mine:train:label")


class TestSeveral:
    """Folders, patterns, and mixtures."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "sub").mkdir()
        for name in ("b.txt", "a.md", "sub/c.txt", "picture.png"):
            (tmp_path / name).write_text(name)
        return tmp_path

    def test_a_folder_is_its_texts_in_order_of_name(self, folder: Path) -> None:
        assert read_documents(str(folder)).documents == ["a.md", "b.txt", "sub/c.txt"]

    def test_a_pattern_is_what_it_matches(self, folder: Path) -> None:
        assert read_documents(f"{folder}/*.txt").documents == ["b.txt"]
        assert read_documents(f"{folder}/**/*.txt").documents == ["b.txt", "sub/c.txt"]

    def test_a_folder_without_texts(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match=r"no files that end in \.txt"):
            read_documents(str(tmp_path))

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("a.txt", [("a.txt", 1.0)]),
            ("a.txt,b.txt", [("a.txt", 0.5), ("b.txt", 0.5)]),
            ("a.txt:3, b.jsonl:1", [("a.txt", 0.75), ("b.jsonl", 0.25)]),
            ("org/set:train:text", [("org/set:train:text", 1.0)]),
            ("org/set:train:text:0.5,c4:0.5", [("org/set:train:text", 0.5), ("c4", 0.5)]),
        ],
    )
    def test_mixtures(self, source: str, expected: list[tuple[str, float]]) -> None:
        assert parse_mixture(source) == expected

    def test_a_file_with_a_comma_in_its_name_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "a,b:1").write_text("x")
        assert parse_mixture(str(tmp_path / "a,b:1")) == [(str(tmp_path / "a,b:1"), 1.0)]

    @pytest.mark.parametrize("source", ["a.txt:0.5,b.txt", "a.txt:0,b.txt:1", "a.txt:-1,b.txt:1"])
    def test_invalid_weights(self, source: str) -> None:
        with pytest.raises(CalibrationError, match="give every source a weight above 0"):
            parse_mixture(source)
