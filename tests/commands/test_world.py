"""``helpsteer2 world``: files of the made-up world, and its oracle for rows of any kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.commands import world
from helpsteer2.data.groups import read_all
from helpsteer2.data.sources.helpsteer import HelpSteer2
from helpsteer2.errors import UserError
from helpsteer2.world.files import prompt_text
from helpsteer2.world.oracle import rate
from helpsteer2.world.source import WorldSource

GROUPS = list(read_all(WorldSource(groups=30, seed=1, validation_groups=1), "train"))


def run(*arguments: str, stdin: bytes = b"") -> tuple[int, list[dict[str, Any]], str]:
    command = [sys.executable, "-m", "helpsteer2", "world", *arguments]
    ran = subprocess.run(command, input=stdin, capture_output=True)
    lines = ran.stdout.splitlines() if arguments[0] == "rate" else []
    return ran.returncode, [json.loads(line) for line in lines], ran.stderr.decode()


def test_files_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["write", str(tmp_path), "--groups", "12", "--seed", "5"]
    assert world.main([*arguments, "--validation-groups", "4"]) == 0
    written = capsys.readouterr().out.split()
    assert sorted(written) == sorted(str(path) for path in tmp_path.rglob("*.gz"))
    source = WorldSource(groups=12, seed=5, validation_groups=4)
    for split in ("train", "validation"):
        read = read_all(HelpSteer2(str(tmp_path)), split)
        assert [g.responses for g in read] == [g.responses for g in read_all(source, split)]


def test_no_groups_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 1"):
        world.main(["write", str(tmp_path), "--groups", "0"])


def test_rows_come_back_rated_in_order() -> None:
    rows = []
    for i, group in enumerate(GROUPS):
        prompt: Any = list(group.prompt) if i % 2 else prompt_text(group.prompt)
        rows.append({"id": i, "prompt": prompt, "response": group.responses[0], "ratings": "old"})
    code, out, err = run("rate", stdin="\n\n".join(map(json.dumps, rows)).encode())
    assert (code, err) == (0, "")
    for row, rated, group in zip(rows, out, GROUPS, strict=True):
        expected = dict(
            zip(HELPSTEER2_ATTRIBUTES, rate(group.prompt, group.responses[0]), strict=True)
        )
        assert rated == {**row, "ratings": expected}


def test_bad_rows_come_back_with_an_error_and_stop_nothing() -> None:
    good = {"prompt": prompt_text(GROUPS[0].prompt), "response": "What? é"}
    bad = [
        (b'{"prompt": "a"', "not valid JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"prompt": "Who are you?", "response": "b"}', "not a prompt of the made-up world"),
        (b'{"prompt": "Tell me job of Zeus.", "response": "b"}', "Zeus"),
        (b'{"response": "b"}', "prompt"),
        (b"\xff", "UTF-8"),
    ]
    lines = [json.dumps(good).encode(), *(line for line, _ in bad), json.dumps(good).encode()]
    code, out, err = run("rate", stdin=b"\n".join(lines))
    assert code == 1
    assert out[0] == out[-1] == {**good, "ratings": out[0]["ratings"]}
    for number, ((line, expected), row) in enumerate(zip(bad, out[1:-1], strict=True), 2):
        assert expected in row["error"]
        assert f"stdin:{number}: " in err
        assert "ratings" not in row
        assert row.get("response", "b") == "b"
        assert ("line" in row) == (not line.startswith(b'{"prompt": "T') and "response" not in row)
