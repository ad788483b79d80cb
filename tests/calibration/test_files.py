"""Local files."""

import gzip
import json
import lzma
import sys

import pytest

from awqc.calibration import all_tokens, corpus, load_tokens
from awqc.errors import CalibrationError

TEXT = "w1 w2 w3\nw4 w5\n"
IDS = [7, 8, 9, 10, 11]
ROWS = [{"id": 0, "text": "w1 w2 w3"}, {"id": 1, "text": "w4"}]
ROW_IDS = [7, 8, 9, 0, 10]


def write_jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {".jsonl": write_jsonl, ".parquet": write_parquet}


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.xz", ".TXT"])
@pytest.mark.parametrize("as_string", [True, False])
def test_text(tmp_path, tokenizer, suffix, as_string):
    path = tmp_path / f"a.b{suffix}"
    data = TEXT.encode()
    path.write_bytes({"gz": gzip.compress, "xz": lzma.compress}.get(suffix[-2:], bytes)(data))
    calib = str(path) if as_string else path
    found = load_tokens(calib, tokenizer=tokenizer)
    assert found.ids.tolist() == [IDS]
    assert found.source == str(path)
    assert all_tokens(calib, tokenizer=tokenizer).tolist() == IDS


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_records(tmp_path, tokenizer, suffix):
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, ROWS)
    assert load_tokens(path, tokenizer=tokenizer).ids.tolist() == [ROW_IDS]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_records_with_a_named_column(tmp_path, tokenizer, suffix):
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, [{"text": "w1", "body": "w2 w3"}])
    assert load_tokens(path, tokenizer=tokenizer, column="body").ids.tolist() == [[8, 9]]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_records_with_conversations(tmp_path, chat_tokenizer, suffix):
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, [{"messages": [{"role": "user", "content": "w1"}]}])
    assert load_tokens(path, tokenizer=chat_tokenizer).ids.tolist() == [[3, 7, 5]]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_records_with_token_ids(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, [{"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0], "text": "w1"}])
    assert load_tokens(path).ids.tolist() == [[1, 2]]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("body", "item 0 of {} has no column 'body': its columns are 'id', 'title'"),
        (
            None,
            "item 0 of {} has none of the columns 'input_ids', 'messages', 'conversations', 'text': "
            "its columns are 'id', 'title'; name the one to read with column=",
        ),
    ],
)
def test_a_missing_column_lists_those_found(tmp_path, tokenizer, suffix, column, message):
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, [{"id": 0, "title": "w1"}])
    with pytest.raises(CalibrationError) as error:
        load_tokens(path, tokenizer=tokenizer, column=column)
    assert str(error.value) == message.format(path)


def test_a_column_of_something_else_is_refused(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"text": None}])
    with pytest.raises(
        CalibrationError, match=r"^column 'text' of item 0 of .*rows.jsonl is None: calibration data"
    ):
        load_tokens(path, tokenizer=tokenizer)


def test_a_file_is_read_no_further_than_its_budget(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(corpus, "MOST_CHARACTERS", 8)
    text, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text(TEXT)
    write_jsonl(rows, [{"text": "w1 w2 w3"}, {"text": "w4"}])
    for path in (text, rows):
        found = load_tokens(path, tokenizer=tokenizer)
        assert found.ids.tolist() == [IDS[:3]]
        assert found.notes[0] == "only 8 characters in 1 documents were read"
        assert len(all_tokens(path, tokenizer=tokenizer)) == 5


def damaged(path):
    if path.name == "bytes.txt":
        path.write_bytes(b"w1 \xff")
    elif path.name == "cut.txt.gz":
        path.write_bytes(gzip.compress(TEXT.encode())[:-4])
    elif path.name == "cut.txt.xz":
        path.write_bytes(lzma.compress(TEXT.encode())[:-4])
    elif path.name == "not.txt.xz":
        path.write_text(TEXT)
    elif path.name == "lines.jsonl":
        path.write_text('{"text": "w1"}\n{"text": \n')
    elif path.name == "cut.parquet":
        path.write_text("PAR1")
    elif path.name == "table.csv":
        path.write_text(TEXT)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "{}: no such calibration file"),
        ("bytes.txt", "{} is not UTF-8 text: invalid start byte at byte 3"),
        (
            "cut.txt.gz",
            "{} cannot be read: Compressed file ended before the end-of-stream marker was reached",
        ),
        (
            "cut.txt.xz",
            "{} cannot be read: Compressed file ended before the end-of-stream marker was reached",
        ),
        ("not.txt.xz", "{} cannot be read: Input format not supported by decoder"),
        ("lines.jsonl", "{}, line 2 is not JSON: Expecting value: line 2 column 1 (char 10)"),
        ("table.csv", "{}: a calibration file is .txt or .jsonl (either may end in .gz or .xz) or .parquet"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, tokenizer, name, message):
    path = tmp_path / name
    damaged(path)
    with pytest.raises(CalibrationError) as error:
        load_tokens(str(path), tokenizer=tokenizer)
    assert str(error.value) == message.format(path)


def test_a_damaged_parquet_file_is_named(tmp_path, tokenizer):
    pytest.importorskip("pyarrow")
    path = tmp_path / "cut.parquet"
    damaged(path)
    with pytest.raises(CalibrationError, match=r"cut\.parquet cannot be read: Parquet"):
        load_tokens(path, tokenizer=tokenizer)


def test_parquet_without_pyarrow(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "a.parquet"
    with pytest.raises(CalibrationError) as error:
        load_tokens(path, tokenizer=tokenizer)
    assert str(error.value) == (
        f"{path}: reading .parquet needs pyarrow: pip install 'awqc[data]', or convert it to .jsonl"
    )


def test_an_empty_file_is_no_tokens(tmp_path, tokenizer):
    path = tmp_path / "empty.txt"
    path.touch()
    with pytest.raises(CalibrationError) as error:
        load_tokens(path, tokenizer=tokenizer)
    assert str(error.value) == (
        f"no calibration tokens: {path} is empty; give text or token ids, or calib='self'"
    )
    with pytest.raises(CalibrationError) as error:
        all_tokens(path, tokenizer=tokenizer)
    assert str(error.value) == f"no tokens: {path} is empty"
