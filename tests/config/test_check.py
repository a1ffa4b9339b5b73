"""Every mistake of a configuration is found, all at once, and told in a way that mends it."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from helpsteer2.config.compose import conf_dir


def test_a_good_configuration_has_no_mistakes(project: Any) -> None:
    checked = project.check("seed=3", "engine=large", "engine.rate=1e-5")
    (job,) = checked.jobs
    assert job["seed"] == 3
    assert job["engine.size"] == "large"
    assert job["engine.rate"] == 1e-5
    assert project.package not in sys.modules


def test_defaults_are_known_without_being_written(project: Any) -> None:
    (job,) = project.check().jobs
    assert job["engine.rate"] == 0.5
    assert job["flag"] is False
    assert job.given("engine.rate") is None


def test_an_argument_that_no_file_names_can_be_set_without_plus(project: Any) -> None:
    checked = project.check("engine.rate=2", "note=hi", "+wheel.count=4", "seed=2")
    assert checked.overrides == ["++engine.rate=2", "++note=hi", "+wheel.count=4", "seed=2"]
    assert checked.jobs[0]["note"] == "hi"


def test_yaml_numbers_without_a_dot_are_numbers(project: Any) -> None:
    project.write(
        "conf/engine/tuned.yaml", "_target_: PACKAGE.parts.Engine\nwidth: 3\nrate: 1e-5\n"
    )
    assert project.check("engine=tuned").jobs[0]["engine.rate"] == 1e-5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sed=1", "sed=1: no such key; did you mean seed?"),
        ("engine.widht=1", "no such key in engine; did you mean width?"),
        ("engin.width=1", "did you mean engine.width"),
        ("width=1", "did you mean engine.width?"),
        ("engine=smal", "no such engine; did you mean small? There are large, open, small"),
        ("engin=small", "no such key; did you mean engine?"),
        ("experiment=deep/fst", "no such experiment; did you mean deep/fast? There are deep/fast"),
        ("+wheel=3", "An item is already at 'wheel'"),
        ("weights.goood=1", "did you mean good? To add it, write +weights.goood=…"),
        ("seed=1,2", "holds several values: add -m"),
        ("seed", "is not of the form key=value"),
        ("note=~/x", """quote its value: note="'~/x'\""""),
        ("+seed=1", "An item is already at 'seed'"),
        ("~nothing", "'nothing' does not exist"),
        ("config={}", "config={}: no such key"),
    ],
)
def test_wrong_overrides(project: Any, override: str, expected: str) -> None:
    (line,) = project.mistakes(override)
    assert line.startswith(f"{override}: ")
    assert expected in line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=abc", "seed: expected int, got 'abc'  [command line]"),
        ("seed=true", "seed: expected int, got True"),
        ("seed=2.0", "got 2.0; did you mean 2?"),
        ("engine.rate='1e-3'", "write the number without quotes"),
        ("note=3", """expected str | None, got 3; text needs quotes of its own: note="'3'\""""),
        ("engine.size=larg", "expected None | 'small' | 'large', got 'larg'; did you mean large?"),
        ("note=null", None),
        ("engine.size=None", "did you mean null?"),
        ("weights.good=abc", "weights.good: expected float, got 'abc'  [command line]"),
        ("+wheel.cuont=3", "wheel.cuont: is unknown to PACKAGE.parts.Wheel; did you mean count?"),
        ("engine._target_=PACKAGE.parts.Motor", "PACKAGE.parts has no 'Motor'"),
        ("engine._target_=PACKAGE.parts.Wheel", "count: is missing: PACKAGE.parts.Wheel needs it"),
        ("wheel._partial_=false", "wheel.count: is missing"),
        ("engine._target_=nowhere.Engine", "no module named 'nowhere' is installed"),
        ("engine=open", "has no value yet: give engine.width=…  [conf/engine/open.yaml:2]"),
        ("seed=${nowhere}", "seed: cannot be resolved: Interpolation key 'nowhere' not found"),
        ("note=${oc.env:NO_SUCH_VARIABLE}", "Environment variable 'NO_SUCH_VARIABLE' not found"),
        ("~seed", "seed: is missing: `helpsteer2 run` needs it"),
        ("+nonsense=3", "nonsense: is unknown to `helpsteer2 run`"),
        ("run_dir=root.yaml/x", "root.yaml is a file, not a folder"),
    ],
)  # fmt: skip
def test_wrong_values(project: Any, override: str, expected: str | None) -> None:
    project.write("root.yaml", "")
    override = override.replace("PACKAGE", project.package)
    if expected is None:
        project.check(override)
        return
    assert expected.replace("PACKAGE", project.package) in "\n".join(project.mistakes(override))


def test_a_value_in_a_file_is_found_at_its_line(project: Any) -> None:
    project.write(
        "conf/experiment/bad.yaml",
        """\
        # @package _global_
        defaults:
          - override /engine: large

        seed: many
        engine:
          widht: 3
        """,
    )
    lines = project.mistakes("experiment=bad")
    assert any("seed: expected int" in x and "[conf/experiment/bad.yaml:5]" in x for x in lines)
    assert any("engine.widht: " in x and "[conf/experiment/bad.yaml:7]" in x for x in lines)
    assert len(lines) == 2


def test_what_another_choice_brings_along_is_found_and_can_be_overridden(project: Any) -> None:
    project.write("conf/driver/wheel.yaml", "_target_: PACKAGE.parts.Wheel\ncuont: 3\n")
    project.write("conf/driver/engine.yaml", "_target_: PACKAGE.parts.Engine\nwidth: 1\n")
    project.write(
        "conf/engine/driven.yaml",
        """\
        defaults:
          - /driver@_global_.driver: wheel

        _target_: PACKAGE.parts.Engine
        width: 3
        """,
    )
    lines = project.mistakes("engine=driven")
    assert any("driver.cuont: " in x and "[conf/driver/wheel.yaml:2]" in x for x in lines)
    (job,) = project.check("engine=driven", "driver=engine", "driver.rate=2").jobs
    assert job["driver.rate"] == 2


def test_all_mistakes_come_together(project: Any) -> None:
    lines = project.mistakes(
        "sed=1", "engine=smal", "engine.widht=1", "seed=abc", "note=3", "a=[1", "weights.good=x"
    )
    starts = [
        "sed=1",
        "engine=smal",
        "engine.widht=1",
        "seed: ",
        "note: ",
        "a=[1",
        "weights.good: ",
    ]
    assert len(lines) == len(starts)
    assert all(any(line.startswith(start) for line in lines) for start in starts)


def test_a_broken_file_is_named(project: Any) -> None:
    project.write("conf/engine/small.yaml", "width: [1, 2\n")
    assert "small.yaml" in "\n".join(project.mistakes())
    project.write("conf/engine/small.yaml", "defaults:\n  - nowhere\n")
    assert "engine/nowhere" in "\n".join(project.mistakes())


def test_every_value_of_a_sweep_is_checked(project: Any) -> None:
    assert len(project.check("seed=1,2", "engine=small,large", multirun=True).jobs) == 4
    lines = project.mistakes("seed=1,2,x", "engine=small,larg", multirun=True)
    assert any("seed: expected int, got 'x'" in line for line in lines)
    assert any(line.startswith("engine=larg: no such engine") for line in lines)
    assert len(lines) == 2


def test_a_sweep_too_large_for_every_combination_still_checks_every_value(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helpsteer2.config.compose.ALL_JOBS", 8)
    lines = project.mistakes("seed=1,2,x", "note=a,3,b", multirun=True)
    assert [line.partition(":")[0] for line in sorted(lines)] == ["note", "seed"]
    assert len(project.check("seed=1,2,3", "note=a,b,c", multirun=True).jobs) == 6


def test_sweeps_written_in_a_file_are_checked(project: Any) -> None:
    project.write(
        "conf/experiment/sweep.yaml",
        """\
        # @package _global_
        hydra:
          mode: MULTIRUN
          sweeper:
            params:
              seed: 1,x
        """,
    )
    assert "seed: expected int, got 'x'" in "\n".join(project.mistakes("experiment=sweep"))
    assert len(project.check("experiment=sweep", "seed=1,2,3").jobs) == 3


def test_an_argument_no_file_names_can_be_swept(project: Any) -> None:
    checked = project.check("engine.rate=1,2", "seed=1,2", multirun=True)
    assert checked.overrides == ["++engine.rate=1,2", "seed=1,2"]
    assert [job["engine.rate"] for job in checked.jobs] == [1, 1, 2, 2]


def test_job_numbers_can_be_interpolated(project: Any) -> None:
    assert project.check("run_dir=out/${hydra:job.num}").jobs[0]["run_dir"] == "out/0"


def test_conf_lies_beside_the_package_or_in_it() -> None:
    assert (conf_dir() / "train.yaml").is_file()
