"""W&B shows a run completely, from files that can be read back, and never stands in its way."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.callbacks.wandb import WandbRun, WandbView, finish
from helpsteer2.commands.train import train
from tests.training.runs import NAMES, arguments

wandb = pytest.importorskip("wandb")

BLOCK, HEADER, WHOLE, LAST = 32768, 7, 1, 4
"""The log format of LevelDB, in which W&B writes protocol buffers."""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    finish(0)


def records(run_dir: Path) -> Iterator[Any]:
    """The records of the offline files of a run, oldest file first."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        data, position, content = path.read_bytes(), HEADER, b""
        assert data.startswith(b":W&B")
        while position < len(data):
            left = BLOCK - position % BLOCK
            if left < HEADER:
                position += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, position)
            position += HEADER + length
            content += data[position - length : position]
            if kind in (WHOLE, LAST):
                record = Record()
                record.ParseFromString(content)
                content = b""
                yield record


def items(entries: Any) -> dict[str, Any]:
    """Values by name; tables and images come in pieces."""
    found: dict[str, Any] = {}
    for entry in entries:
        *outer, last = entry.nested_key or [entry.key]
        place = found
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(entry.value_json)
    return found


class Offline:
    """What the offline files of a run hold."""

    def __init__(self, run_dir: Path) -> None:
        self.config: dict[str, Any] = {}
        self.history: dict[int, dict[str, Any]] = {}
        self.summary: dict[str, Any] = {}
        self.exit_codes = []
        self.runs = []
        for record in records(run_dir):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.runs.append(record.run)
                self.config.update(items(record.run.config.update))
            elif kind == "config":
                self.config.update(items(record.config.update))
            elif kind == "history":
                row = items(record.history.item)
                self.history.setdefault(int(row["_step"]), {}).update(row)
            elif kind == "summary":
                self.summary.update(items(record.summary.update))
            elif kind == "exit":
                self.exit_codes.append(record.exit.exit_code)


def csv_rows(run_dir: Path) -> dict[int, dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics.csv").read_text().splitlines()[1:]:
        step, name, value = line.split(",")
        rows.setdefault(int(step), {})[name] = float(value)
    return rows


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was shown offline."""
    run_dir = tmp_path_factory.mktemp("shown") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
            patch.setenv(name, value)
        logger = WandbRun(project="p", group="my sweep", name="my run", tags=("a", "b"))
        train(**arguments(run_dir, max_steps=6, validate_every=2, lr=0.5, wandb=logger))
    assert wandb.run is None
    return run_dir


def test_offline_files_hold_configuration_names_and_exit_code(shown: Path) -> None:
    offline = Offline(shown)
    config = arguments(shown, max_steps=6, validate_every=2, lr=0.5)["config"]
    assert {key: offline.config[key] for key in config} == config
    run = offline.runs[0]
    assert (run.project, run.run_group, run.display_name) == ("p", "my sweep", "my run")
    assert sorted(run.tags) == ["a", "b"]
    assert run.run_id == (shown / "wandb_id").read_text()
    assert offline.exit_codes == [0]


def test_offline_history_is_the_metrics_file(shown: Path) -> None:
    offline, rows = Offline(shown), csv_rows(shown)
    assert len(rows) == 6
    for step, metrics in rows.items():
        logged = {name: offline.history[step][name] for name in metrics}
        assert logged == pytest.approx(metrics, nan_ok=True), step
    assert {f"val/{name}/pearson" for name in NAMES} <= set(offline.history[4])
    assert set(offline.history) == set(rows)


def test_offline_summary_tells_the_exported_weights(shown: Path) -> None:
    summary = Offline(shown).summary
    result = json.loads((shown / "result.json").read_text())
    assert summary["exported/step"] == result["exported_step"]
    assert summary["exported/val/loss"] == pytest.approx(result["metrics"]["val/loss"])
    assert summary["val/loss"] == pytest.approx(result["last_validation"]["val/loss"])


def test_offline_files_hold_samples_and_plots(shown: Path) -> None:
    offline = Offline(shown)
    [files] = (shown / "wandb").glob("offline-run-*/files")
    table = offline.history[6]["samples"]
    content = json.loads((files / table["path"]).read_text())
    samples = [json.loads(line) for line in (shown / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 16
    for row, sample in zip(content["data"], samples, strict=True):
        cells = dict(zip(content["columns"], row, strict=True))
        assert cells["response"] == sample["response"]
        for name in NAMES:
            assert cells[f"rated {name}"] == pytest.approx(sample["rated"][name])
            assert cells[f"predicted {name}"] == pytest.approx(sample["predicted"][name])
    for name in ("scatter", "calibration"):
        image = offline.history[6][f"plots/{name}"]
        assert image["_type"] == "image-file"
        assert (files / image["path"]).read_bytes() == (shown / f"plots/{name}.png").read_bytes()


class Away:
    """A W&B run whose service goes away after some calls."""

    def __init__(self, calls: int) -> None:
        self.calls, self.logged = calls, 0
        self.summary = self

    def log(self, *args: Any, **options: Any) -> None:
        self.logged += 1
        if self.logged > self.calls:
            raise ConnectionError("the service went away")

    update = log


@pytest.mark.parametrize("calls", [0, 3, 100])
def test_a_service_that_goes_away_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    service = Away(calls)
    monkeypatch.setattr(WandbRun, "_start", lambda *args: service)
    options: dict[str, Any] = {"max_steps": 4, "validate_every": 2}
    value = train(**arguments(tmp_path / "a", wandb=WandbRun(), **options))
    assert value == train(**arguments(tmp_path / "b", **options))
    assert csv_rows(tmp_path / "a") == csv_rows(tmp_path / "b")
    log = (tmp_path / "a/run.log").read_text()
    assert log.count("the service went away") == (1 if calls < 100 else 0)
    assert service.logged == min(calls + 1, 4 + 2 + 3 + 1)


def test_a_failing_end_is_not_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(exit_code: int) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(wandb, "run", object())
    monkeypatch.setattr(wandb, "finish", broken)
    finish(0)


def test_the_first_failure_is_told_and_the_last(caplog: pytest.LogCaptureFixture) -> None:
    view = WandbView(Away(0))
    view.log_metrics({"a": 1.0}, 1)
    view.log_table("t", ["a"], [["b"]], 1)
    view.summarise({"a": 1.0})
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_resumed_run_is_the_same_one_on_wandb(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for steps in (3, 5):
        train(**arguments(run_dir, max_steps=steps, validate_every=None, wandb=WandbRun(),
                          optimized_metric=None))  # fmt: skip
    offline = Offline(run_dir)
    assert len({run.run_id for run in offline.runs}) == 1
    assert set(offline.history) == {1, 2, 3, 4, 5}
    assert offline.runs[0].display_name == "run"
