"""The Hub: loaded through ``datasets``, from the cache without network, else refused at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES as NAMES
from helpsteer2.data import hub
from helpsteer2.data.groups import read_all
from helpsteer2.data.sources.helpsteer import HelpSteer2
from helpsteer2.data.sources.hh_rlhf import HHRLHF
from helpsteer2.errors import UserError


class FakeTable(list[dict[str, Any]]):
    """What ``load_dataset`` returns, as far as it is used."""

    _fingerprint = "revision"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A ``datasets`` that serves two rows and notes how it was called."""
    noted: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, data_dir: str | None, split: str) -> FakeTable:
        noted.append((path, name, data_dir, split))
        if data_dir == "preference":
            row = {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": 1}
            return FakeTable([{**row, "split": split} for split in ("train", "validation")])
        return FakeTable([{"prompt": "p", "response": r, **dict.fromkeys(NAMES, 2)} for r in "ab"])

    fake = SimpleNamespace(load_dataset=load_dataset, config=SimpleNamespace(HF_HUB_OFFLINE=False))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(hub, "is_reachable", lambda: True)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return noted


def test_default_config(calls: list[tuple[Any, ...]]) -> None:
    (group,) = read_all(HelpSteer2(), "validation")
    assert calls == [("nvidia/HelpSteer2", None, None, "validation")]
    assert group.source == "nvidia/HelpSteer2[validation]:1"


def test_preference_config_filters_the_one_split_that_the_hub_has(
    calls: list[tuple[Any, ...]],
) -> None:
    groups = list(read_all(HelpSteer2(config="preference"), "validation"))
    assert calls == [("nvidia/HelpSteer2", None, "preference", "train")]
    assert len(groups) == 1
    assert groups[0].source.endswith("[preference]:2")


def test_fingerprint_follows_the_revision(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = HelpSteer2().fingerprint("train")
    assert HelpSteer2().fingerprint("train") == before
    monkeypatch.setattr(FakeTable, "_fingerprint", "another")
    assert HelpSteer2().fingerprint("train") != before


def test_whatever_the_client_raises_becomes_one_message(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("gated")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", broken)
    with pytest.raises(UserError, match=r"gated.*data\.path=DIR.*train\.jsonl"):
        list(HelpSteer2().read("train", print))


def test_without_datasets_the_local_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_reachable", lambda: True)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install datasets.*data\.path=DIR"):
        list(HHRLHF().read("train", print))


def test_probe_tells_open_from_closed_and_heeds_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert hub.is_reachable()
    assert not hub.is_reachable()

    def stuck(*args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        time.sleep(1)
        return nullcontext()

    monkeypatch.setattr(socket, "create_connection", stuck)
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.05)
    start = time.perf_counter()
    assert not hub.is_reachable()
    assert time.perf_counter() - start < 0.8


def test_probe_asks_the_proxy_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def connect(address: Any, timeout: float) -> AbstractContextManager[None]:
        asked.append(address)
        return nullcontext()

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setenv("HF_ENDPOINT", "https://example.org")
    monkeypatch.setenv("https_proxy", "http://proxy.example.org:3128")
    monkeypatch.setenv("no_proxy", "")
    assert hub.is_reachable()
    assert asked == [("proxy.example.org", 3128)]


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process with the real ``datasets`` and a Hub that nobody serves."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**keep, **closed, **environment},
    )


@pytest.mark.parametrize("flag", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_no_network_fails_at_once_with_the_local_way(tmp_path: Path, flag: dict[str, str]) -> None:
    pytest.importorskip("datasets")
    code = """
        import time
        import datasets
        from helpsteer2.data.sources.helpsteer import HelpSteer2
        from helpsteer2.errors import UserError
        before = datasets.config.HF_HUB_OFFLINE
        start = time.perf_counter()
        try:
            list(HelpSteer2().read("train", print))
        except UserError as error:
            print(error)
        # The client's own retries take more than 20 s.
        assert time.perf_counter() - start < 8
        assert datasets.config.HF_HUB_OFFLINE == before
    """
    done = run(code, {"HF_HOME": str(tmp_path), **flag})
    assert done.returncode == 0, done.stderr
    assert "data.path=DIR" in done.stdout
    assert "train.jsonl or train.jsonl.gz or train.parquet" in done.stdout


CACHE = """
    import json, pathlib, shutil
    import datasets
    root = pathlib.Path({root!r})
    for folder, rows in {tables!r}.items():
        file = root / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + chr(10) for row in rows))
        made = root / "made"
        datasets.load_dataset("json", data_files={{"train": str(file)}}, cache_dir=str(made))
        built = next(made.glob("json/*/*/*/dataset_info.json")).parent
        config = "default" + (f"-data_dir={{folder}}" if folder else "")
        kept = root / "cache" / "nvidia___help_steer2" / config / "0.0.0" / "0123456789abcdef"
        shutil.copytree(built, kept)
        shutil.rmtree(made)
        (kept / "json-train.arrow").rename(kept / "help_steer2-train.arrow")
        info = json.loads((kept / "dataset_info.json").read_text())
        info.update(dataset_name="help_steer2", config_name=config)
        (kept / "dataset_info.json").write_text(json.dumps(info))

    from helpsteer2.data.groups import read_all
    from helpsteer2.data.sources.helpsteer import HelpSteer2
    for config in ("default", "preference"):
        source = HelpSteer2(config=config)
        (group,) = read_all(source, "train")
        print(json.dumps([group.responses, len(source.fingerprint("train"))]))
    assert not datasets.config.HF_HUB_OFFLINE
"""


def test_cached_copy_serves_without_network(tmp_path: Path) -> None:
    """With several configurations cached, each source gets its own."""
    pytest.importorskip("datasets")
    rated = [{"prompt": "p", "response": r, **dict.fromkeys(NAMES, 2)} for r in "ab"]
    preferred = {"prompt": "p", "response_1": "c", "response_2": "d", "preference_strength": 1}
    tables = {
        "": rated,
        "preference": [{**preferred, "split": split} for split in ("train", "validation")],
    }
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = run(CACHE.format(root=str(tmp_path), tables=tables), environment)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        [["a", "b"], 64],
        [["c", "d"], 64],
    ]
