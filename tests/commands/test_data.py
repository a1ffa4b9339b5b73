"""``helpsteer2 data``: every bad row on its own line, the right exit code, and a true table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES as NAMES
from helpsteer2.commands import data_report
from helpsteer2.commands.data import main
from helpsteer2.commands.data_source import SOURCES
from helpsteer2.data.checks import SCHEMAS
from helpsteer2.errors import UserError

REAL = os.environ.get("HELPSTEER2_REAL_DATA")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptions are written below the working directory; drawing would take seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_report, "write_figures", lambda *arguments: [])


def row(prompt: str, response: str = "r", **other: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, **dict.fromkeys(NAMES, 3), **other}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


ASK = "\n\nHuman: a\n\nAssistant:"
USER = {"role": "user", "content": "q"}
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "helpsteer2": [row(f"p{i // 2}") for i in range(20)],
    "helpsteer": [row(f"p{i // 4}") for i in range(20)],
    "disagreements": [row(f"p{i // 2}", **{n: [1, 2] for n in NAMES}) for i in range(20)],
    "preference": [
        {"split": s, "prompt": p, "response_1": "a", "response_2": "b", "preference_strength": 1}
        for s, p in (("train", "p"), ("validation", "q"), ("train", "r"))
    ],
    "open_assistant": [
        {"message_id": "a", "parent_id": None, "text": "?", "role": "prompter", "labels": None},
        {"message_id": "b", "parent_id": "a", "text": "!", "role": "assistant", "labels": None},
    ],
    "hh_rlhf": [{"chosen": f"{ASK} b", "rejected": f"{ASK} c"}],
    "messages": [{"messages": [USER, {"role": "assistant", "content": "a"}]}],
    "conversations": [
        {"conversations": [{"from": "User", "value": "q"}, {"from": "Assistant", "value": "a"}]}
    ],
    "groups": [{"id": "a", "prompt": [USER], "responses": ["b"]}],
}


def test_every_schema_has_a_source() -> None:
    assert set(SOURCES) == set(SCHEMAS) == set(EXAMPLES)


@pytest.mark.parametrize("schema", sorted(EXAMPLES))
@pytest.mark.parametrize("command", ["validate", "describe"])
def test_schema_is_found_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], schema: str, command: str
) -> None:
    file = write(tmp_path / "a.jsonl", EXAMPLES[schema])
    assert main([command, str(file)]) == 0
    assert schema in capsys.readouterr().out
    assert main([command, str(file), "--schema", schema]) == 0


def test_every_bad_row_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "validation"):
        rows = [row(f"{split} {i // 2}") for i in range(200)]
        for i in range(0, 200, 4):
            rows[i].update(helpfulness=7, response="")
        write(tmp_path / f"{split}.jsonl", rows)
    assert main(["validate", str(tmp_path)]) == 1
    *problems, summary = capsys.readouterr().out.splitlines()
    expected = [
        f"{tmp_path / split}.jsonl:{i + 1}: {field}"
        for split in ("train", "validation")
        for i in range(0, 200, 4)
        for field in ("response", "helpfulness")
    ]
    assert [": ".join(line.split(": ")[:2]) for line in problems] == expected
    assert summary.endswith("400 rows, 100 groups, 100 bad rows, 200 problems")
    assert main(["validate", str(tmp_path), "--split", "validation"]) == 1
    assert "200 rows, 50 groups, 50 bad rows" in capsys.readouterr().out


def test_good_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", EXAMPLES["helpsteer2"])
    assert main(["validate", str(file)]) == 0
    assert (
        capsys.readouterr().out
        == f"{file} (helpsteer2): 20 rows, 10 groups, 0 bad rows, 0 problems\n"
    )


def test_table_with_both_splits_tells_its_problems_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {**EXAMPLES["preference"][0], "preference_strength": 9}
    file = write(tmp_path / "a.jsonl", [*EXAMPLES["preference"], bad])
    assert main(["validate", str(file)]) == 1
    problem, summary = capsys.readouterr().out.splitlines()
    assert problem.startswith(f"{file}:4: preference_strength: ")
    assert summary.endswith("4 rows, 3 groups, 1 bad row, 1 problem")


def compared(split: str, prompt: str, *responses: str) -> dict[str, Any]:
    texts = dict(zip(("response_1", "response_2"), responses, strict=True))
    return {"split": split, "prompt": prompt, **texts, "preference_strength": 1}


def test_validation_rows_that_stand_in_train_are_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [compared("train", f"p{i}", f"a{i}", f"b{i}") for i in range(20)]
    rows[3] = {**rows[3], "preference_strength": 9}  # A bad row moves the others up by one place.
    repeated = [compared("validation", f"p{i}", f"a{i}", f"b{i}") for i in range(8, 12)]
    turned = compared("validation", "p12", "b12", "a12")
    file = write(tmp_path / "preference.jsonl", [*rows, *repeated, turned])
    assert main(["validate", str(tmp_path)]) == 1
    *problems, summary = capsys.readouterr().out.splitlines()
    told = "prompt and responses also stand in train"
    assert problems[0].startswith(f"{file}:4: preference_strength: ")
    # Lines 21 to 25 repeat lines 9 to 13.
    assert problems[1:] == [f"{file}:{line + 12}: {told} ({file}:{line})" for line in range(9, 14)]
    assert summary.endswith("25 rows, 24 groups, 6 bad rows, 6 problems")
    # Of one split alone nothing can be said.
    assert main(["validate", str(tmp_path), "--split", "validation"]) == 1
    assert told not in capsys.readouterr().out


def test_prompts_alone_that_stand_in_train_are_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.jsonl", [row(f"p{i // 2}") for i in range(20)])
    other = [row(p, r) for p in ("p2", "p4", "new") for r in ("r", "other")]
    file = write(tmp_path / "validation.jsonl", other)
    assert main(["validate", str(tmp_path)]) == 0
    *warnings, summary = capsys.readouterr().out.splitlines()
    told = "warning: the prompt also stands in train, with other responses"
    assert warnings == [f"{file}:1: {told} ({train}:5)", f"{file}:3: {told} ({train}:9)"]
    assert summary.endswith("26 rows, 13 groups, 0 bad rows, 0 problems, 2 warnings")


def test_one_rating_that_is_a_list_costs_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*EXAMPLES["helpsteer2"], row("x", helpfulness=[3]), row("x")]
    file = write(tmp_path / "a.jsonl", rows)
    assert main(["validate", str(file)]) == 1
    problem, _ = capsys.readouterr().out.splitlines()
    expected = f"{file}:{len(rows) - 1}: helpfulness: expected a number from 0 to 4 or null"
    assert problem.startswith(expected)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "empty"),
        ('{"question": "a", "answer": "b"}\n', "unknown schema"),
        ('{"promt": "a", "response": "b"}\n', "is it 'promt', misspelt?"),
        ("not json\n", "not valid JSON"),
    ],
)
def test_file_that_is_no_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, says: str
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    assert main(["validate", str(file)]) == 1
    assert says in capsys.readouterr().out


def test_folder_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(tmp_path)]) == 1
    assert "it holds nothing" in capsys.readouterr().out


def test_path_that_is_nowhere(tmp_path: Path) -> None:
    for command in ("validate", "describe"):
        with pytest.raises(UserError, match="no such file"):
            main([command, str(tmp_path / "nowhere")])


def test_describe_leaves_bad_rows_out_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = EXAMPLES["helpsteer2"] + [row("x", helpfulness=9), row("x")]
    file = write(tmp_path / "a.jsonl", rows)
    assert main(["describe", str(file)]) == 0
    captured = capsys.readouterr()
    assert "10 groups, 2.00 responses each" in captured.out
    assert "1 problem left out" in captured.err


def test_validate_is_quick_to_start_and_imports_nothing_heavy(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", EXAMPLES["helpsteer2"])
    code = (
        "import sys; from helpsteer2.commands.data import main; "
        f"main(['validate', {str(file)!r}]); main(['describe', {str(file)!r}]); "
        "heavy = {'torch', 'transformers', 'datasets', 'pytorch_lightning', 'pyarrow', 'hydra'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_reader_that_stops_early_gets_no_traceback(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [row(f"p{i}", helpfulness=9) for i in range(5000)])
    code = f"from helpsteer2.commands.data import main; main(['validate', {str(file)!r}])"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == ""
    child.wait(60)


@pytest.mark.skipif(not REAL, reason="HELPSTEER2_REAL_DATA is not set")
@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("helpsteer2_slice", "(helpsteer2): 8,286 rows, 4,143 groups, 0 bad rows"),
        ("helpsteer2_slice/disagreements.jsonl.gz", "(disagreements): 2,288 rows, 1,144 groups"),
        (
            "helpsteer2_first100/helpsteer2_train_first100.jsonl",
            "(helpsteer2): 100 rows, 50 groups",
        ),
        ("helpsteer1_500/helpsteer1_sample500.jsonl", "(helpsteer): 500 rows"),
    ],
)
def test_real_data(capsys: pytest.CaptureFixture[str], path: str, says: str) -> None:
    assert main(["validate", str(Path(REAL or "") / path)]) == 0
    assert says in capsys.readouterr().out


@pytest.mark.skipif(not REAL, reason="HELPSTEER2_REAL_DATA is not set")
def test_real_files_of_other_kinds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("steerlm_format/test-rm.jsonl", "rewardbench/filtered.parquet"):
        assert main(["validate", str(Path(REAL or "") / path)]) == 1
        assert "unknown schema" in capsys.readouterr().out
