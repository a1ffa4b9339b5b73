"""The command line: quick help and errors, completion, sweeps, exit codes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpsteer2 import __main__ as cli
from helpsteer2.commands import CONFIG_COMMANDS, OTHER_COMMANDS, completion
from helpsteer2.commands.launch import launch
from helpsteer2.config.command import ConfigCommand
from helpsteer2.errors import ConfigError, UserError

NOISE = 3
"""Promised seconds times this are tested, in CPU time: machines that run tests are busy."""

HEAVY = ("torch", "transformers", "pytorch_lightning", "datasets", "wandb")

PROBE = f"""
import sys
from helpsteer2.__main__ import main
code = main()
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def run(*arguments: str, probe: bool = False) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run the command line in a process of its own; with the seconds of CPU it took."""
    start = ["-c", PROBE] if probe else ["-m", "helpsteer2"]
    before = os.times()
    done = subprocess.run(
        [sys.executable, *start, *arguments], capture_output=True, text=True, check=False
    )
    after = os.times()
    spent = after.children_user + after.children_system
    return done, spent - before.children_user - before.children_system


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what Hydra leaves in this process: its logging holds the captured output."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    handlers, level = list(logging.root.handlers), logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def test_help_is_quick_and_names_every_command() -> None:
    done, seconds = run("--help")
    assert done.returncode == 0
    table = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert dict(table) == {
        **{name: command.summary for name, command in CONFIG_COMMANDS.items()},
        **OTHER_COMMANDS,
    }
    assert seconds < 1 * NOISE


def test_wrong_overrides_are_told_before_anything_heavy_is_imported() -> None:
    done, seconds = run("train", "sed=1", "backbone=tny", "trainer.precison=3", probe=True)
    assert done.returncode == 2
    assert done.stderr.startswith("helpsteer2: 3 mistakes")
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith("[]\n")
    assert seconds < 2 * NOISE


def test_check_imports_nothing_heavy() -> None:
    done, seconds = run("check", "train", "experiment=sft/world", probe=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout.startswith("ok helpsteer2 train")
    assert "8 groups" in done.stdout
    assert seconds < 2 * NOISE


def in_process(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["helpsteer2", *arguments])
    return cli.main()


def test_unknown_command_and_no_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process(monkeypatch, "trian") == 2
    assert "no command 'trian'" in capsys.readouterr().err
    assert in_process(monkeypatch) == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError("no such thing"), 1, "helpsteer2: no such thing\n"),
        (ConfigError("two mistakes"), 2, "helpsteer2: two mistakes\n"),
        (KeyboardInterrupt(), 130, "helpsteer2: interrupted\n"),
    ],
)
def test_errors_become_exit_codes_without_traceback(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    said: str,
) -> None:
    def fail(argv: list[str]) -> int:
        raise raised

    monkeypatch.setattr(cli, "dispatch", fail)
    assert in_process(monkeypatch) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("name", ["train", "evaluate", "check"])
def test_hydra_flags_work_under_every_command_with_a_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert in_process(monkeypatch, name, "--cfg", "job", "seed=5") == 0
    assert "\nseed: 5\n" in capsys.readouterr().out
    in_process(monkeypatch, name, "--info", "defaults")
    assert "Defaults List" in capsys.readouterr().out
    assert in_process(monkeypatch, name, "--cfg", "job", "sed=5") == 2
    assert "did you mean seed?" in capsys.readouterr().err


def test_contradicting_flags_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stopped:
        in_process(monkeypatch, "train", "--cfg", "job", "-m")
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("helpsteer2 ", ["train", "evaluate", "check", "score", "data"]),
        ("helpsteer2 ev", ["evaluate"]),
        ("helpsteer2 train backb", ["backbone=", "backbone."]),
        ("helpsteer2 train backbone=ti", ["backbone=tiny"]),
        ("helpsteer2 train -m seed=1 module.opt", ["module.optimizer."]),
        ("helpsteer2 train experiment=s", ["experiment=sft/world"]),
        ("helpsteer2 evaluate mod", ["model="]),
        ("helpsteer2 check ev", ["evaluate"]),
        ("helpsteer2 check evaluate mod", ["model="]),
        ("helpsteer2 check trainer=g", ["trainer=gpu"]),
        ("helpsteer2 data ", ["describe", "validate"]),
        ("helpsteer2 score --", []),
    ],
)
def test_completion(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    expected: list[str],
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    assert in_process(monkeypatch, "-sc", "query=bash") == 0
    answered = capsys.readouterr().out.split()
    assert set(expected) <= set(answered)
    assert all(word.startswith(line.split(" ")[-1]) for word in answered)


def test_completion_takes_the_command_out_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "helpsteer2  train seed=1")
    monkeypatch.setenv("COMP_POINT", "24")
    completion.drop_command_word()
    assert os.environ["COMP_LINE"] == "helpsteer2 seed=1"
    assert os.environ["COMP_POINT"] == "17"


@pytest.mark.parametrize("arguments", [["-sc"], ["train", "-sc"]])
def test_completion_can_be_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert in_process(monkeypatch, *arguments, "install=bash") == 0
    assert capsys.readouterr().out.endswith("-F hydra_bash_completion helpsteer2\n")


@pytest.mark.parametrize("argument", [[], ["instal=bash"], ["bash"]])
def test_completion_that_is_not_known_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: list[str]
) -> None:
    assert in_process(monkeypatch, "-sc", *argument) == 1
    assert "-sc takes install=bash" in capsys.readouterr().err


COMMAND = """
import json
from pathlib import Path
from typing import Any

from helpsteer2.errors import UserError


class Part:
    def __init__(self, sizes: list[int]) -> None:
        if not sizes:
            raise UserError("a part needs sizes")
        self.sizes = sizes


def run(run_dir: str, seed: int, part: Part, config: dict[str, Any]) -> float:
    assert list(Path(run_dir).iterdir()) == [], "something was written before the command"
    if seed == 13:
        raise UserError("thirteen brings no luck")
    kinds = [type(part.sizes).__name__, type(config).__name__, type(config["part"]).__name__]
    content = {"seed": seed, "run_dir": run_dir, "kinds": kinds, "config": config}
    (Path(run_dir) / "written.json").write_text(json.dumps(content))
    return float(seed)
"""

ROOT = """
defaults:
  - _self_
  - hydra_settings
run_dir: runs/one
seed: 1
part: {_target_: cli_fixture.Part, sizes: [1, 2]}
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Launch a command that writes down what it was called with."""
    from helpsteer2.config.compose import conf_dir

    (tmp_path / "cli_fixture.py").write_text(COMMAND)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "root.yaml").write_text(ROOT)
    settings = (conf_dir() / "hydra_settings.yaml").read_text()
    (tmp_path / "conf" / "hydra_settings.yaml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["helpsteer2"])
    fixture = ConfigCommand("fixture", "for tests", "cli_fixture.run", "root")

    def call(*arguments: str) -> int:
        return launch(fixture, [f"--config-path={tmp_path / 'conf'}", *arguments])

    yield call
    sys.modules.pop("cli_fixture", None)


def written(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(folder) / "written.json").read_text())
    return content


def test_a_command_gets_plain_objects_and_its_whole_configuration(command: Any) -> None:
    assert command("seed=4") == 0
    content = written("runs/one")
    assert content["kinds"] == ["list", "dict", "dict"]
    assert content["config"]["seed"] == content["seed"] == 4
    assert content["config"]["part"]["sizes"] == [1, 2]
    assert "hydra" not in content["config"]
    assert [path.name for path in Path("runs/one").iterdir()] == ["written.json"]


def test_a_folder_named_after_the_time_is_made_once(command: Any) -> None:
    # The configuration is composed twice, first to check it and then to run.
    assert command("run_dir='runs/${now:%H%M%S%f}'") == 0
    [folder] = Path("runs").iterdir()
    assert (folder / "written.json").exists()


def test_each_job_of_a_sweep_has_a_folder_of_its_own(command: Any) -> None:
    assert command("-m", "seed=2,3", "run_dir=runs/sweep") == 0
    for number, seed in enumerate((2, 3)):
        content = written(f"runs/sweep/{number}")
        assert content["seed"] == seed
        assert Path(content["run_dir"]) == Path(f"runs/sweep/{number}").absolute()
        assert content["config"]["run_dir"] == content["run_dir"]


def test_one_failing_job_does_not_stop_a_sweep(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"1 of 2 jobs did not finish"):
        command("-m", "seed=13,3", "run_dir=runs/sweep")
    assert "job 0 failed: thirteen" in capsys.readouterr().out
    assert written("runs/sweep/1")["seed"] == 3


def test_a_wrong_sweep_value_is_refused_before_the_first_job(command: Any) -> None:
    with pytest.raises(ConfigError, match="seed: expected int, got 'x'"):
        command("-m", "seed=2,x", "run_dir=runs/sweep")
    assert not Path("runs/sweep").exists()


def test_errors_of_constructors_come_out_as_they_are(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"^a part needs sizes$"):
        command("part.sizes=[]")
    # Nor does Hydra say anything of its own.
    assert capsys.readouterr().err == ""


def test_flags_and_overrides_mix(command: Any) -> None:
    assert command("seed=2", "-m", "run_dir=runs/mixed") == 0
    assert written("runs/mixed/0")["seed"] == 2


def test_a_run_folder_that_cannot_be_made_is_refused(command: Any) -> None:
    with pytest.raises(ConfigError, match=r"conf/root\.yaml is a file, not a folder"):
        command("run_dir=conf/root.yaml/x")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a file system that takes no folders")
def test_a_run_folder_that_the_file_system_refuses_is_told(command: Any) -> None:
    for run_dir in ("/proc/no", "/proc/no/such/place"):
        for mode in ([], ["-m", "seed=1,2"]):
            with pytest.raises(UserError, match=r"run_dir: /proc/no\S* cannot be made"):
                command(*mode, f"run_dir={run_dir}")


def test_targets_of_the_commands_exist() -> None:
    from helpsteer2.config.signatures import read_signature

    for config_command in CONFIG_COMMANDS.values():
        signature = read_signature(config_command.target)
        assert signature is not None
        assert {"run_dir", "config"} <= set(signature.parameters)
        # A seed that decides nothing would be a lie, and would make the same stage twice.
        draws = config_command.name not in {"annotate", "pairs", "reference", "weigh"}
        assert ("seed" in signature.parameters) == draws
