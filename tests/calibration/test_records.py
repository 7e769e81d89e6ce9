"""Records of texts and chats, in the forms that people have."""

from __future__ import annotations

import csv
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import transformers

from roundwise.calibration.dataset import load_calibration
from roundwise.calibration.records import Chat, Document, is_json, parse_record
from roundwise.calibration.sources import SourceText, read_documents
from roundwise.calibration.windows import tokenize_documents
from roundwise.config import CalibrationConfig
from roundwise.errors import CalibrationError

USER = {"role": "user", "content": "2 + 2?"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
RESULT = {"role": "tool", "content": "4"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def lines(*records: Any) -> str:
    return "\n".join(json.dumps(record) for record in records)


@pytest.mark.parametrize(
    ("record", "document"),
    [
        ({"text": "one", "id": 7}, "one"),
        ("one", "one"),
        ({"messages": [USER]}, Chat([USER])),
        ({"text": None, "messages": [USER], "source": "web"}, Chat([USER])),
        ({"messages": [USER, CALL, RESULT]}, Chat([USER, CALL, RESULT])),
        ({"messages": [USER, CALL], "tools": TOOLS}, Chat([USER, CALL], TOOLS)),
        ({"messages": [{"role": "assistant", "content": None, **CALL}]},
         Chat([{"role": "assistant", "content": None, **CALL}])),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
         Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])),
        ({"instruction": "Add.", "input": "2 and 2", "output": "4"},
         Chat([{"role": "user", "content": "Add.\n\n2 and 2"}, {"role": "assistant", "content": "4"}],
              plain="Add.\n\n2 and 2\n\n4")),
        ({"instruction": "Say hi.", "input": "", "output": "hi"},
         Chat([{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "hi"}],
              plain="Say hi.\n\nhi")),
        ({"prompt": "a", "completion": "b"},
         Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
              plain="a\n\nb")),
        ({"text": "", "messages": [USER]}, Chat([USER])),
        ({"text": "", "id": 3}, ""),
        ({"messages": [USER], "tools": json.dumps(TOOLS)}, Chat([USER], TOOLS)),
        ({"messages": [USER], "tools": "no JSON"}, Chat([USER])),
        ({"messages": [USER], "tools": None, "functions": TOOLS}, Chat([USER], TOOLS)),
        # As Parquet has it: every message has all fields.
        ({"messages": [{**USER, "tool_calls": None, "name": None}, {**CALL, "content": None}]},
         Chat([USER, {**CALL, "content": None}])),
        ({"system": "Be brief.", "conversations": [{"from": "human", "value": "a"}]},
         Chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}])),
        ({"system": "Be brief.", "messages": [{"role": "system", "content": "b"}, USER]},
         Chat([{"role": "system", "content": "b"}, USER])),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, None),
        ({"body": "one"}, None),
        ({"messages": [{"role": "user"}]}, None),
        ({"conversations": [{"from": "nobody", "value": "a"}]}, None),
        ([1, 2], None),
        (None, None),
    ],
)  # fmt: skip
def test_forms_of_a_record(record: Any, document: Document | None) -> None:
    assert parse_record(record) == document


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines({"text": "one"}, {"text": "two"})),
        ("a.jsonl", "\ufeff" + lines({"text": "one"}, {"text": "two"})),
        ("a.ndjson", lines({"text": "one"}, {"text": "two"})),
        ("A.JSONL", lines({"text": "one"}, {"text": "two"})),
        ("a.json", json.dumps([{"text": "one"}, {"text": "two"}])),
        ("a.json", lines({"text": "one"}, {"text": "two"}) + "\r\n"),
        ("a.json", json.dumps({"version": 1, "data": [{"text": "one"}, {"text": "two"}]})),
        ("a.csv", "id,text\n1,one\n2,two\n"),
    ],
)
def test_files_of_records(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_documents(str(tmp_path / name)) == SourceText(["one", "two"], [])


def test_one_chat_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"messages": [USER]}))
    (tmp_path / "b.json").write_text(json.dumps([USER, RESULT]))
    assert read_documents(str(tmp_path / "a.json")).documents == [Chat([USER])]
    # A list of messages is a list of records without a text.
    with pytest.raises(CalibrationError, match="record 1 has neither"):
        read_documents(str(tmp_path / "b.json"))


def test_parquet_needs_the_package_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"pip install '\.\[datasets\]'"):
        read_documents(str(file))
    module = types.ModuleType("datasets")

    def load_dataset(kind: str, **options: Any) -> list[dict[str, str]]:
        assert (kind, options["data_files"]) == ("parquet", str(file))
        return [{"text": "one"}, {"body": "two"}]

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    documents, left_out = read_documents(str(file))
    assert documents == ["one"]
    assert left_out[0].startswith("a.parquet: 1 of 2 records are left out, row 2 has neither")


def test_a_parquet_file_as_it_is_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "a.parquet"
    rows = [{"messages": [USER, CALL, RESULT], "tools": json.dumps(TOOLS)}, {"messages": [USER]}]
    datasets.Dataset.from_list(rows).to_parquet(file)
    first, second = read_documents(str(file)).documents
    assert first == Chat([USER, {**CALL, "content": None}, RESULT], TOOLS)
    assert second == Chat([USER])


def test_long_fields_of_a_csv_file(tmp_path: Path) -> None:
    text = "a line, with a comma\n" * 20_000
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], ["1", text]])
    assert read_documents(str(tmp_path / "a.csv")).documents == [text]


def test_a_chat_that_the_template_refuses_is_named_with_its_line(
    tiny: Path, tmp_path: Path
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('begin with user') }}{% endif %}"
    )
    file = tmp_path / "a.jsonl"
    file.write_text(lines({"messages": [USER]}, {}, {"messages": [RESULT, USER]}))
    with pytest.raises(
        CalibrationError, match=r"a chat .* \(a.jsonl, line 3\) .* \(begin with user\)"
    ):
        load_calibration(str(file), tokenizer, CalibrationConfig(samples=2, seq_len=16))


def test_empty_records_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines({"text": ""}, {"text": "x"}, {"messages": []}))
    assert read_documents(str(file)) == SourceText(["x"], ["a.jsonl: 2 of 3 records are empty"])


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines({"text": "import os " * 50}, {"body": 1}, {"text": "x"}, {"id": 3}))
    documents, left_out = read_documents(str(file))
    assert len(documents) == 2
    assert left_out == [
        "a.jsonl: 2 of 4 records are left out, line 2 has neither `text`, `messages`, "
        "`conversations` nor `instruction` and `output`"
    ]


def test_json_that_is_read_as_plain_text_is_said(tmp_path: Path, tiny: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(json.dumps([{"text": "import os " * 80}]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    config = CalibrationConfig(samples=2, seq_len=16, batch_size=2)
    found = load_calibration(str(file), tokenizer, config)
    assert "notes.txt is JSON and is read as plain text" in found.not_as_asked[0]
    file.write_text(lines({"text": "import os"}, {"text": "import re"}))
    assert "notes.txt is JSON and is read as plain" in read_documents(str(file)).left_out[0]
    file.write_text("[1] is a footnote, {x} a placeholder")
    assert read_documents(str(file)).left_out == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1]", True),
        (' {"a": 1}\n', True),
        ('{"a": 1}\n\n{"a": 2}\n', True),
        ('{"a": 1}\nand prose', False),
        ("[1", False),
        ("1", False),
        ("", False),
        ("[" * 10**5, False),
    ],
)
def test_a_whole_text_that_is_json(text: str, expected: bool) -> None:
    assert is_json(text) is expected


TEMPLATE = (
    "{% if tools %}[{{ tools[0].function.name }}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }}{% endfor %}{% endfor %}"
)


def test_tools_and_calls_reach_the_template(tiny: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = TEMPLATE
    ids = tokenize_documents([Chat([USER, CALL, RESULT], TOOLS)], tokenizer, None).tokens
    assert tokenizer.decode(ids) == "[add]<user>2 + 2?<assistant>CALL add<tool>4"


def test_a_question_is_plain_text_where_there_is_no_template(tiny: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    question = parse_record({"instruction": "import os", "output": "os.walk(top)"})
    assert question is not None
    ids = tokenize_documents([question], tokenizer, None).tokens
    assert tokenizer.decode(ids) == "import os\n\nos.walk(top)"
    with pytest.raises(CalibrationError, match="no chat template"):
        tokenize_documents([Chat([USER])], tokenizer, None)
