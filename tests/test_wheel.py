"""The package as others get it: built, installed beside nothing of the checkout, and run."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
# Other files belong to those who work on the project, not to those who read or test it.
NOT_SHIPPED = {".gitattributes"}


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a source archive, and a wheel made from that archive alone."""
    pytest.importorskip("build", reason="needs the extra dev")
    pytest.importorskip("hatchling", reason="needs the extra dev")
    folder = tmp_path_factory.mktemp("dist")
    made = run(sys.executable, "-m", "build", "--no-isolation", "-o", folder, ROOT, cwd=folder)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of a second environment: the wheel, and third-party packages of this one."""
    environment = tmp_path_factory.mktemp("second")
    made = run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=built)
    assert made.returncode == 0, made.stderr
    programs = environment / "bin"
    (wheel,) = built.glob("*.whl")
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    made = run(sys.executable, "-m", "pip", "--python", programs / "python", *install, cwd=built)
    assert made.returncode == 0, made.stderr
    # Path files inside this folder are not followed, so the checkout stays unknown.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "first.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return programs


def tracked() -> set[str]:
    listed = run("git", "ls-files", cwd=ROOT)
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("not a git checkout")
    return set(listed.stdout.splitlines())


def test_source_archive_holds_everything_that_is_tracked(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert tracked() - names - NOT_SHIPPED == set()


def test_wheel_holds_the_package_and_its_configuration_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {name for name in tracked() if name.startswith("helpsteer2/")}
    conf = {f"helpsteer2/{name}" for name in tracked() if name.startswith("conf/")}
    assert code | conf <= names
    assert {name.split("/")[0] for name in names} == {"helpsteer2"}


def test_installed_package_is_the_wheel_and_not_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    code = "import helpsteer2; print(helpsteer2.__file__)"
    shown = run(installed / "python", "-c", code, cwd=tmp_path)
    assert Path(shown.stdout.strip()).is_relative_to(installed.parent)


def test_help_answers_from_another_folder(installed: Path, tmp_path: Path) -> None:
    shown = run(installed / "helpsteer2", "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "train" in shown.stdout


def test_configuration_comes_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    checked = run(installed / "helpsteer2", "check", "experiment=sft/world", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr

    # An experiment that only the installed folder has.
    (conf,) = installed.parent.glob("lib/python*/site-packages/helpsteer2/conf")
    only_here = conf / "experiment" / "only_here.yaml"
    only_here.write_text("# @package _global_\nseed: 4711\n")
    shown = run(
        installed / "helpsteer2", "check", "--cfg", "job", "experiment=only_here", cwd=tmp_path
    )
    only_here.unlink()
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "seed: 4711" in shown.stdout
    assert list(tmp_path.iterdir()) == [], "checking leaves nothing behind"
