from __future__ import annotations

from pathlib import Path

import pytest

from helpsteer2.evaluation.scoring import model_key


def test_a_model_in_the_home_folder_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    key = model_key(str(tmp_path / "model"))
    assert key is not None
    assert model_key("~/model") == key
    assert model_key("~/elsewhere") is None
    assert model_key("owner/name") is None
