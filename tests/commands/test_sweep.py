"""Sweeps: every job in its own folder, a failing one alone, all of them told at the end."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helpsteer2.commands.launch import launch
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.commands.sweep import Job, Sweep, _marked, table
from helpsteer2.config.command import ConfigCommand
from helpsteer2.errors import ConfigError, UserError

COMMAND = """
import json
import os
import signal
import time
from pathlib import Path
from typing import Any


class Strange(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__("strange")


def run(
    run_dir: str,
    seed: int,
    optimized_metric: str | None = None,
    logger: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> float:
    from helpsteer2.commands.run_folder import RunFolder
    from helpsteer2.errors import UserError

    path = Path(run_dir) / "written.json"
    if path.exists():
        return json.loads(path.read_text())["value"]
    print(f"seed {seed} speaks")
    lucky = (path.parents[1] / "lucky").exists()
    if seed == 13 and not lucky:
        raise UserError("thirteen brings no luck")
    if seed == 14:
        raise Strange(1, 2)
    if seed == 15:
        raise SystemExit(143)
    if seed == 16 and not lucky:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == 17:
        with RunFolder(run_dir).locked():
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
    content = {"value": seed / 2, "run_dir": run_dir, "logger": logger, "process": os.getpid()}
    path.write_text(json.dumps(content))
    return seed / 2
"""

ROOT = """
defaults:
  - _self_
  - hydra_settings
run_dir: runs/one
seed: 1
optimized_metric: loss
logger: null
"""

FIXTURE = ConfigCommand("fixture", "for tests", "sweep_fixture.run", "root")

Call = Callable[..., int]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """Launch a command that notes what it was given, in a folder of its own."""
    from helpsteer2.config.compose import conf_dir

    (tmp_path / "sweep_fixture.py").write_text(COMMAND)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "root.yaml").write_text(ROOT)
    settings = (conf_dir() / "hydra_settings.yaml").read_text()
    (tmp_path / "conf" / "hydra_settings.yaml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    # For jobs in processes of their own.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["helpsteer2"])
    handlers, level = list(logging.root.handlers), logging.root.level
    yield lambda *given: launch(FIXTURE, [f"--config-path={tmp_path / 'conf'}", *given])
    # Hydra's logging holds the captured output.
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    sys.modules.pop("sweep_fixture", None)


def written(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(folder) / "written.json").read_text())
    return content


def notes(folder: str) -> list[Job]:
    return Sweep(Path(folder)).jobs()


def wait_for(folder: RunFolder) -> None:
    """Wait until no process has a folder; longer than any has to be given is a failure."""
    deadline = time.monotonic() + 30
    while True:
        try:
            with folder.locked():
                return
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
HAS_JOBLIB = find_spec("joblib") is not None
NEEDS_JOBLIB = pytest.mark.skipif(not HAS_JOBLIB, reason="hydra-joblib-launcher is not installed")


@pytest.mark.parametrize(
    "launcher", [[], pytest.param(JOBLIB, marks=NEEDS_JOBLIB)], ids=["basic", "joblib"]
)
def test_failing_jobs_stop_no_other(
    command: Call, capfd: pytest.CaptureFixture[str], launcher: list[str]
) -> None:
    with pytest.raises(UserError, match=r"2 of 4 jobs did not finish \(0, 2\)"):
        command("-m", "seed=13,3,14,4", "run_dir=runs/sweep", *launcher)
    jobs = notes("runs/sweep")
    assert [job.status for job in jobs] == ["failed", "finished", "failed", "finished"]
    assert [job.value for job in jobs] == [None, 1.5, None, 2.0]
    assert [job.swept for job in jobs] == [{"seed": text} for text in ("13", "3", "14", "4")]
    assert {job.metric for job in jobs} == {"loss"}
    assert jobs[0].error == "thirteen brings no luck"
    assert "Traceback" in str(jobs[2].error)
    assert "sweep_fixture.py" in str(jobs[2].error)
    for job in jobs:
        assert Path(job.folder) == Path(f"runs/sweep/{job.number}").absolute()
    assert written("runs/sweep/1")["run_dir"] == jobs[1].folder
    shown = capfd.readouterr().out
    assert "job 0 failed: thirteen brings no luck" in shown
    assert "job 2 failed: sweep_fixture.Strange: strange" in shown
    for text in ("1.5000", "runs/sweep/3", "finished", "failed"):
        assert text in shown
    processes = {written(f"runs/sweep/{n}")["process"] for n in (1, 3)}
    assert (processes == {os.getpid()}) is not bool(launcher)
    # Lines of jobs that run at the same time say whose they are.
    assert ("[1] seed 3 speaks" in shown) is bool(launcher)


@NEEDS_JOBLIB
def test_a_killed_job_takes_no_other_along(
    command: Call, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("-m", "seed=16,3,4,5", "run_dir=runs/sweep", *JOBLIB)
    with pytest.raises(UserError, match=r"1 of 4 jobs did not finish \(0\); ") as told:
        command(*arguments)
    assert told.value.exit_code == 1
    jobs = notes("runs/sweep")
    assert [job.status for job in jobs] == ["killed", "finished", "finished", "finished"]
    assert [job.value for job in jobs] == [None, 1.5, 2.0, 2.5]
    shown = capfd.readouterr().out
    assert "job 0 killed: its process was ended by signal 9, as the system does when" in shown
    assert all(f"runs/sweep/{number}" in shown for number in range(4))
    Path("runs/sweep/lucky").touch()
    assert command(*arguments) == 0
    assert [job.value for job in notes("runs/sweep")] == [8.0, 1.5, 2.0, 2.5]


@NEEDS_JOBLIB
def test_a_launcher_that_gives_up_is_told_and_leaves_no_job_behind(
    command: Call, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"(?s)did not finish \(0.*gave up"):
        command("-m", "seed=17,17", "run_dir=runs/sweep", *JOBLIB)
    assert "killed" in capfd.readouterr().out
    for job in notes("runs/sweep"):
        wait_for(RunFolder(job.folder))


@NEEDS_JOBLIB
def test_a_stop_ends_a_sweep_of_processes_too(command: Call) -> None:
    with pytest.raises(SystemExit) as stopped:
        command("-m", "seed=15,15", "run_dir=runs/sweep", *JOBLIB)
    assert stopped.value.code == 143
    assert "stopped" in {job.status for job in notes("runs/sweep")}


def test_the_same_command_goes_on_after_the_sweep_itself_was_killed(
    command: Call, tmp_path: Path
) -> None:
    arguments = ("-m", "seed=2,16,3", "run_dir=runs/sweep")
    code = (
        "from tests.commands.test_sweep import FIXTURE, launch\n"
        f"launch(FIXTURE, ['--config-path={tmp_path / 'conf'}', *{arguments}])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert [job.status for job in notes("runs/sweep")] == ["finished", "running"]
    before = Path("runs/sweep/0/written.json").stat().st_mtime_ns
    Path("runs/sweep/lucky").touch()
    assert command(*arguments) == 0
    assert Path("runs/sweep/0/written.json").stat().st_mtime_ns == before
    assert [job.value for job in notes("runs/sweep")] == [1.0, 8.0, 1.5]


def test_a_sweep_without_failures_says_so(command: Call, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("-m", "seed=2,3", "run_dir=runs/sweep") == 0
    shown = capfd.readouterr().out
    assert "finished" in shown
    assert "failed" not in shown


def test_the_same_command_leaves_finished_jobs_and_runs_the_others(command: Call) -> None:
    arguments = ("-m", "seed=13,3", "run_dir=runs/sweep")
    with pytest.raises(UserError, match=r"1 of 2 jobs did not finish \(0\)"):
        command(*arguments)
    before = Path("runs/sweep/1/written.json").stat().st_mtime_ns
    Path("runs/sweep/lucky").touch()
    assert command(*arguments) == 0
    assert Path("runs/sweep/1/written.json").stat().st_mtime_ns == before
    assert [job.value for job in notes("runs/sweep")] == [6.5, 1.5]


def test_notes_of_an_earlier_sweep_are_not_those_of_this_one(command: Call) -> None:
    command("-m", "seed=2,3,4", "run_dir=runs/sweep")
    command("-m", "seed=2,3", "run_dir=runs/sweep")
    assert len(notes("runs/sweep")) == 2


def test_a_stop_ends_the_sweep_and_is_told(
    command: Call, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command("-m", "seed=2,15,3", "run_dir=runs/sweep")
    assert stopped.value.code == 143
    assert [job.status for job in notes("runs/sweep")] == ["finished", "stopped"]
    assert "stopped" in capfd.readouterr().out


def test_a_sweep_named_after_the_time_is_one_folder(command: Call) -> None:
    assert command("-m", "seed=2,3", "run_dir='runs/${now:%H%M%S%f} it\\'s'") == 0
    [folder] = Path("runs").iterdir()
    assert {path.name for path in folder.iterdir()} >= {"0", "1", "jobs"}


def test_jobs_are_one_wandb_group_and_have_names(command: Call) -> None:
    command("-m", "seed=2,3", "run_dir=runs/my_sweep", "logger={project: p, name: null}")
    for number, seed in enumerate((2, 3)):
        logger = written(f"runs/my_sweep/{number}")["logger"]
        assert logger == {"project": "p", "group": "my_sweep", "name": f"seed={seed}"}
    command("-m", "seed=2,3", "run_dir=runs/other", "logger={group: mine}")
    assert written("runs/other/0")["logger"] == {"group": "mine", "name": "seed=2"}
    command("seed=2", "run_dir=runs/single", "logger={project: p}")
    assert written("runs/single")["logger"] == {"project": "p"}


def test_two_sweeps_cannot_share_a_folder(command: Call, tmp_path: Path) -> None:
    code = (
        "import sys; from helpsteer2.commands.run_folder import RunFolder\n"
        f"with RunFolder({str(tmp_path / 'runs/sweep')!r}).locked():\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match=f"in use by process {other.pid}"):
            command("-m", "seed=2,3", "run_dir=runs/sweep")
        other.communicate("")
    assert not Path("runs/sweep/0").exists()
    assert RunFolder("runs/sweep").path.exists()


def test_ranks_do_not_each_run_the_sweep(command: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        command("-m", "seed=2,3", "run_dir=runs/sweep")
    assert not Path("runs").exists()


def test_wrong_values_are_told_before_anything_is_made(command: Call) -> None:
    with pytest.raises(ConfigError, match="seed: expected int"):
        command("-m", "seed=2,x", "run_dir=runs/sweep")
    assert not Path("runs").exists()


def test_other_sweepers_are_given_the_failure(
    command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweeper that looks for the best has to know that there is no value."""
    from hydra._internal.core_plugins import basic_sweeper
    from hydra.core.plugins import Plugins

    class OtherSweeper(basic_sweeper.BasicSweeper):
        pass

    name = f"{basic_sweeper.__name__}.OtherSweeper"
    OtherSweeper.__module__, OtherSweeper.__qualname__ = name.rsplit(".", 1)
    monkeypatch.setattr(basic_sweeper, "OtherSweeper", OtherSweeper, raising=False)
    monkeypatch.setitem(Plugins.instance().class_name_to_class, name, OtherSweeper)
    with pytest.raises(UserError, match="thirteen"):
        command("-m", "seed=13,3", "run_dir=runs/sweep", f"hydra.sweeper._target_={name}")
    assert [job.status for job in notes("runs/sweep")] == ["failed", "finished"]


def test_table_shows_what_differs_and_what_was_killed() -> None:
    jobs = [
        Job(0, "/runs/0", {"backbone": "tiny"}, "finished", "val/loss", 0.25, 3.0),
        Job(1, "/runs/1", {"backbone": "small", "seed": "2"}, "running", "val/loss"),
        Job(2, "/runs/2", {"seed": "[bold]"}, "failed", "val/loss", error="no"),
    ]
    shown = table(jobs)
    columns = {str(column.header): list(column.cells) for column in shown.columns}
    assert columns["backbone"] == ["tiny", "small", ""]
    assert columns["val/loss"] == ["0.2500", "–", "–"]
    assert columns["folder"] == ["/runs/0", "/runs/1", "/runs/2"]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(shown)
    text = console.export_text()
    assert "killed" in text
    assert "[bold]" in text
    assert all("val/loss" not in str(c.header) for c in table([Job(0, "x", {})]).columns)


def test_marked_lines_are_whole_and_of_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with _marked(7):
        print("one\ntwo")
        print("half ", end="")
        print("of it", file=sys.stderr)
        print("and the rest")
        assert not sys.stdout.isatty()
    print("plain")
    caught = capsys.readouterr()
    assert caught.out == "[7] one\n[7] two\n[7] half and the rest\nplain\n"
    assert caught.err == "[7] of it\n"
