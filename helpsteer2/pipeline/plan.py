"""Every stage composed, checked and placed before the first one runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpsteer2.config.checked import check
from helpsteer2.config.command import ConfigCommand
from helpsteer2.config.rules import Settings, run_folder_can_be_made
from helpsteer2.errors import ConfigError
from helpsteer2.pipeline.contents import Contents
from helpsteer2.pipeline.fingerprint import STAGE, dependencies, fingerprint_of
from helpsteer2.pipeline.models import model_mistakes
from helpsteer2.pipeline.stages import Output, Stage, check_order, override_text


@dataclass(frozen=True)
class Commands:
    """The commands that stages can be, and where their configurations come from.

    Attributes:
        by_name: The commands that take a configuration.
        program: What a stage's process runs, as arguments of Python.
        conf: Folder of the YAML files in place of the project's own.
        extra_dir: Folder of YAML files searched as well.
    """

    by_name: Mapping[str, ConfigCommand]
    program: Sequence[str]
    conf: Path | None = None
    extra_dir: str | None = None

    def settings(self, command: str, overrides: Sequence[str]) -> tuple[Settings, list[str]]:
        """Compose and check the configuration of one stage.

        Args:
            command: Name of the command.
            overrides: Its overrides.

        Returns:
            The settings with defaults filled in, and the overrides as Hydra takes them.

        Raises:
            ConfigError: With every mistake found.
        """
        checked = check(self.by_name[command], overrides, conf=self.conf, extra_dir=self.extra_dir)
        (settings,) = checked.jobs
        return settings, checked.overrides

    def line(self, command: str, overrides: Sequence[str], devices: Any) -> list[str]:
        """The arguments of a stage's process.

        Args:
            command: Name of the command.
            overrides: Its overrides.
            devices: ``trainer.devices``; several are started by torchrun.
        """
        flags = [] if self.conf is None else [f"--config-path={self.conf}"]
        flags += [] if self.extra_dir is None else [f"--config-dir={self.extra_dir}"]
        launcher = list(_torchrun(devices))
        return [sys.executable, *launcher, *self.program, command, *flags, *overrides]


def _torchrun(devices: Any) -> Sequence[str]:
    """Arguments that start one process a device; none for a single one."""
    count = len(devices) if isinstance(devices, list) else devices
    if str(count) in {"None", "auto", "1"}:
        return ()
    each = "gpu" if str(count) == "-1" else str(count)
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={each}")


@dataclass(frozen=True)
class PlannedStage:
    """A stage with everything known about it before it runs.

    Attributes:
        stage: The stage.
        settings: Its checked configuration, defaults filled in.
        depends_on: What its result depends on, by dotted key.
        fingerprint: Hash of that.
        folder: Where it runs; the same for every pipeline that needs the same stage.
        reads: The stages and outputs that it reads.
        command_line: Arguments of its process.
    """

    stage: Stage
    settings: Settings
    depends_on: Mapping[str, Any]
    fingerprint: str
    folder: Path
    reads: tuple[tuple[PlannedStage, str], ...]
    command_line: tuple[str, ...]

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name


def plan(
    stages: Sequence[Stage], commands: Commands, stages_dir: Path, contents: Contents
) -> list[PlannedStage]:
    """Compose and check every stage, and find out where it belongs.

    Args:
        stages: In the order in which they run.
        commands: What they can be.
        stages_dir: Folder of the stages' folders.
        contents: Hashes what stages read from outside the pipeline, and remembers it.

    Returns:
        The stages, in their order.

    Raises:
        ConfigError: With the mistakes of all stages; if stages could not run in that folder, with
            that alone.
        UserError: If a file outside the pipeline cannot be read.
    """
    wrong = check_order(stages, commands.by_name)
    wrong += [f"stages_dir: {message}" for message in _folder_mistakes(stages_dir)]
    if wrong:
        raise ConfigError("\n".join(wrong))
    planned: dict[str, PlannedStage] = {}
    for stage in stages:
        try:
            planned[stage.name] = _planned(stage, planned, commands, stages_dir, contents)
        except ConfigError as error:
            wrong.append(f"stage {stage.name}: {error}")
            # Later stages are looked at all the same; their fingerprints are not used.
            placeholder = stages_dir / f"{stage.name}-{'0' * 12}"
            unknown = Settings({}, {})
            planned[stage.name] = PlannedStage(stage, unknown, {}, "", placeholder, (), ())
    contents.save()
    wrong = wrong or model_mistakes(planned)
    if wrong:
        raise ConfigError("\n".join(wrong))
    return list(planned.values())


def _folder_mistakes(stages_dir: Path) -> list[str]:
    """Why stages could not run there, told once and not of every stage."""
    settings = Settings({"run_dir": str(stages_dir)}, {})
    return [message for _, message in run_folder_can_be_made(settings)]


def _planned(
    stage: Stage,
    earlier: Mapping[str, PlannedStage],
    commands: Commands,
    stages_dir: Path,
    contents: Contents,
) -> PlannedStage:
    def texts(root: str) -> list[str]:
        """The overrides, with outputs of stages as paths below a root."""

        def path(item: Any) -> Any:
            if isinstance(item, Output):
                return f"{root}{earlier[item.stage].folder.name}/{item.path}"
            return [path(part) for part in item] if isinstance(item, list) else item

        return [override_text(key, path(value)) for key, value in stage.overrides.items()]

    # Nothing has to be there yet: a path is replaced by the folder's name, which stands for the
    # fingerprint of the stage that makes it. Its own folder bears the fingerprint to be found, so
    # the one above stands in for it.
    bare = [*texts(STAGE), override_text("run_dir", str(stages_dir))]
    settings, usable = commands.settings(stage.command, bare)
    depends_on = dependencies(stage.command, settings.filled, contents)
    fingerprint = fingerprint_of(depends_on)
    folder = stages_dir / f"{stage.name}-{fingerprint[:12]}"
    # Hydra wants ++ before keys that no file names.
    overrides = [
        f"++{text}" if asked.startswith("++") and not text.startswith("++") else text
        for asked, text in zip(usable, texts(f"{stages_dir}/"), strict=False)
    ]
    line = commands.line(
        stage.command, [*overrides, override_text("run_dir", str(folder))],
        settings["trainer.devices"],
    )  # fmt: skip
    return PlannedStage(
        stage,
        settings,
        depends_on,
        fingerprint,
        folder,
        tuple((earlier[output.stage], output.path) for output in stage.reads()),
        tuple(line),
    )
