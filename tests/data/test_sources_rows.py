"""Reading rows: every damage of a file becomes a problem with its line, and memory stays flat."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.data import rows as rows_module
from helpsteer2.data.rows import Part, digest_part, find_files, local_path, read_file, read_part
from helpsteer2.errors import DataError, Problem, UserError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    pa = pq = None

needs_parquet = pytest.mark.skipif(pq is None, reason="pyarrow is not installed")
TRAIN = Part("train", "train")
PARQUET = pytest.param("train.parquet", marks=needs_parquet)


def read(file: Path) -> tuple[list[Any], list[Problem]]:
    """Values of every row and every problem."""
    problems: list[Problem] = []
    return [(row.line, row.values) for row in read_file(file, problems.append)], problems


def lines_of(n: int) -> bytes:
    return b"".join(json.dumps({"n": i}).encode() + b"\n" for i in range(1, n + 1))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"n": "\xff"}', "not UTF-8: byte 0xff at position 8"),
        (b'{"n": ', "not valid JSON"),
        (b"[1, 2]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b"[" * 100_000, "not readable JSON"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not readable JSON"),
    ],
)
def test_damaged_line_is_reported_and_its_neighbours_are_read(
    tmp_path: Path, line: bytes, says: str
) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(lines_of(1) + line + b"\n" + lines_of(1))
    rows, problems = read(file)
    assert rows == [(1, {"n": 1}), (2, None), (3, {"n": 1})]
    assert [(p.file, p.line) for p in problems] == [(str(file), 2)]
    assert says in problems[0].message


def test_blank_lines_count_but_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n\n  \n{"n": 2}')
    assert read(file) == ([(1, {"n": 1}), (4, {"n": 2})], [])


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", PARQUET])
def test_empty_file_is_a_problem(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name.endswith(".gz"):
        file.write_bytes(gzip.compress(b"", mtime=0))
    elif name.endswith(".parquet"):
        pq.write_table(pa.table({"n": pa.array([], pa.int64())}), file)
    else:
        file.touch()
    rows, problems = read(file)
    assert rows == []
    assert [(p.line, p.message) for p in problems] == [(None, "the file is empty")]


def test_truncated_gzip_gives_its_rows_and_one_problem(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl.gz"
    # Random numbers do not compress to nothing, so half of the file holds many whole lines.
    whole = gzip.compress(b"".join(b'{"n": "%064x"}\n' % (i**17) for i in range(5000)))
    file.write_bytes(whole[: len(whole) // 2])
    rows, problems = read(file)
    assert 0 < len(rows) < 5000
    assert len(problems) == 1
    assert "truncated" in problems[0].message
    assert problems[0].line == len(rows) + 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl.gz", b"this is no gzip"),
        ("train.jsonl.gz", gzip.compress(lines_of(3), mtime=0)[:-8] + b"\0" * 8),
        pytest.param("train.parquet", b"this is no parquet", marks=needs_parquet),
    ],
)
def test_file_that_is_not_what_its_name_says(tmp_path: Path, name: str, content: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    _, problems = read(file)
    assert len(problems) == 1


@needs_parquet
def test_damaged_parquet_page_is_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"n": [f"{i}" * 50 for i in range(3000)]}), file, row_group_size=1000)
    content = bytearray(file.read_bytes())
    content[4:40] = b"\xff" * 36
    file.write_bytes(content)
    _, problems = read(file)
    assert len(problems) == 1
    assert "Parquet" in problems[0].message


@needs_parquet
def test_parquet_string_that_is_no_utf8(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    text = pa.array([b"good", b"\xff", b"good"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"n": text}), file)
    rows, problems = read(file)
    assert rows == [(1, {"n": "good"}), (2, None), (3, {"n": "good"})]
    assert [p.line for p in problems] == [2]


@needs_parquet
def test_three_kinds_of_files_give_the_same_rows(tmp_path: Path) -> None:
    values = [{"text": "é\n" * i, "rating": i if i % 2 else None} for i in range(200)]
    plain = "".join(json.dumps(v) + "\n" for v in values).encode()
    (tmp_path / "a.jsonl").write_bytes(plain)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain, mtime=0))
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "a.parquet")
    expected = list(enumerate(values, start=1))
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        assert read(tmp_path / name) == (expected, [])


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"expected one of \.jsonl"):
        list(read_file(tmp_path / "train.csv", print))


def test_huge_line_never_fills_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 2**16)
    file = tmp_path / "train.jsonl"
    with file.open("wb") as out:
        out.write(b'{"n": "')
        for _ in range(40):
            out.write(b"x" * 2**20)
        out.write(b'"}\n{"n": 2}\n')
    tracemalloc.start()
    rows, problems = read(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == [(1, None), (2, {"n": 2})]
    assert "longer than" in problems[0].message
    assert peak < 8 * 2**20


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_memory_does_not_grow_with_rows(tmp_path: Path, kind: str) -> None:
    peaks = []
    for n in (500, 10_000):
        file = tmp_path / f"{n}.{kind}"
        content = b'{"text": "%s"}\n' % (b"x" * 500) * n
        file.write_bytes(gzip.compress(content, 1, mtime=0) if kind.endswith("gz") else content)
        del content
        tracemalloc.start()
        assert sum(1 for _ in read_file(file, print)) == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000


def test_path_that_is_nowhere_says_so(tmp_path: Path) -> None:
    for path in (str(tmp_path / "no"), "./no/where", "~/no-such-folder", "no.jsonl", "a/b.parquet"):
        with pytest.raises(UserError, match="no such file or folder"):
            local_path(path)
    assert local_path("owner/name") is None
    assert local_path(str(tmp_path)) == tmp_path


def test_folder_without_the_split_names_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "readme.md").touch()
    problems: list[Problem] = []
    assert list(read_part(str(tmp_path), TRAIN, problems.append)) == []
    assert "train.jsonl or train.jsonl.gz or train.parquet" in problems[0].message
    assert "readme.md" in problems[0].message
    with pytest.raises(DataError, match=r"readme\.md"):
        digest_part(str(tmp_path), TRAIN)


def test_single_file_never_serves_two_splits(tmp_path: Path) -> None:
    """A validation split read from the training file would be a leak."""
    for name, split in (
        ("x.jsonl", "train"),
        ("train.jsonl", "train"),
        ("validation.jsonl", "validation"),
    ):
        file = tmp_path / name
        file.write_bytes(lines_of(1))
        served = []
        for wanted in ("train", "validation"):
            problems: list[Problem] = []
            if list(read_part(str(file), Part(wanted, wanted), problems.append)):
                served.append(wanted)
            else:
                assert "holds the split" in problems[0].message
        assert served == [split]


@needs_parquet
def test_same_table_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines_of(1))
    pq.write_table(pa.table({"n": [1]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="more than once"):
        find_files(tmp_path, TRAIN)


@needs_parquet
def test_clone_of_a_hub_repository_with_shards(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(2):
        shard = folder / f"train-{i:05d}-of-00002-abc.parquet"
        pq.write_table(pa.table({"n": [10 * i, 10 * i + 1]}), shard)
    rows = list(read_part(str(tmp_path), TRAIN, print))
    assert [row.values["n"] for row in rows if row.values] == [0, 1, 10, 11]
    assert [row.line for row in rows] == [1, 2, 1, 2]


def test_digest_follows_content_not_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_bytes(lines_of(3))
    first, second = (digest_part(str(tmp_path / name), TRAIN) for name in ("a", "b"))
    assert first == second
    (tmp_path / "b" / "train.jsonl").write_bytes(lines_of(4))
    assert digest_part(str(tmp_path / "b"), TRAIN) != first
