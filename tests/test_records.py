from __future__ import annotations

import json
import os
import re
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from helpsteer2 import records
from helpsteer2.errors import UserError


@dataclass
class Figure:
    value: float


def test_what_is_written_is_plain_json_without_nan(tmp_path):
    path = tmp_path / "new" / "result.json"
    payload = {
        "nan": float("nan"),
        "numpy": np.array([[1.5, np.nan], [np.inf, 2.0]], dtype=np.float32),
        "count": np.int64(3),
        "flag": True,
        "nested": {"figure": Figure(np.float64(0.5)), 7: (1, None)},
        "path": Path("a/b"),
    }
    records.write_json_atomic(path, payload)
    assert json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name)) == {
        "nan": None,
        "numpy": [[1.5, None], [None, 2.0]],
        "count": 3,
        "flag": True,
        "nested": {"figure": {"value": 0.5}, "7": [1, None]},
        "path": "a/b",
    }


def test_what_is_no_data_is_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "result.json"
    records.write_json_atomic(path, {"a": 1})
    with pytest.raises(TypeError, match="lock"):
        records.write_json_atomic(path, {"a": threading.Lock()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_write_that_fails_halfway_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "scores"
    path.write_bytes(b"old")

    def disk_full(file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        records.write_atomic(path, disk_full)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_files_get_the_mode_that_the_user_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        records.write_json_atomic(tmp_path / "result.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "result.json").stat().st_mode & 0o777 == 0o640


def test_environment_names_versions_and_hardware_but_neither_host_nor_user():
    found = records.environment()
    assert found["packages"]["numpy"] == np.__version__
    assert found["hardware"]["cores"] >= 1
    assert found["git"] is None or re.fullmatch(r"[0-9a-f]{40}", found["git"]["commit"])
    text = json.dumps(records.plain(found))
    for private in (socket.gethostname(), str(Path.home()), str(Path(__file__).parent.parent)):
        assert len(private) < 3 or private not in text
