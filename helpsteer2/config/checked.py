"""One look at a command's configuration, sweeps included, before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from helpsteer2.config.command import ConfigCommand
from helpsteer2.config.compose import Composer, Composition, composer, conf_dir
from helpsteer2.config.origins import origin
from helpsteer2.config.rules import Settings
from helpsteer2.config.validate import Mistake, plain, validate
from helpsteer2.errors import ConfigError


@dataclass(frozen=True)
class Checked:
    """A configuration without mistakes.

    Attributes:
        overrides: The overrides to give to Hydra.
        jobs: The settings of each job, defaults filled in; one without a sweep.
        sweep_dir: Folder of a sweep; None without one.
    """

    overrides: list[str]
    jobs: list[Settings]
    sweep_dir: str | None = None


def check(
    command: ConfigCommand,
    overrides: Sequence[str],
    *,
    multirun: bool = False,
    compose_only: bool = False,
    conf: Path | None = None,
    config_name: str | None = None,
    extra_dir: str | None = None,
) -> Checked:
    """Compose and validate a command's configuration.

    Args:
        command: What the configuration is for.
        overrides: Overrides as typed.
        multirun: Whether overrides may hold sweeps; every value of each is checked.
        compose_only: Look for wrong overrides alone, not for wrong values.
        conf: Folder of the YAML files; the project's own if None.
        config_name: Root file in place of the command's own.
        extra_dir: Folder of YAML files searched as well.

    Returns:
        The settings of each job.

    Raises:
        ConfigError: With every mistake found.
    """
    config_name = config_name or command.config_name
    folders = [Path(extra_dir)] if extra_dir else []
    folders.append(conf or conf_dir())
    reports: dict[str, None] = {}
    jobs: list[Settings] = []
    with _outside_of_a_job(), composer(config_name, command.target, conf, extra_dir) as hydra:
        compositions = _compositions(hydra, overrides, multirun)
        for composition in compositions:
            mistakes = list(composition.mistakes)
            if composition.config is not None and not compose_only:
                job, found = plain(composition.config)
                settings, wrong = validate(job, command.target)
                mistakes += found + wrong
                jobs.append(settings)
            for mistake in mistakes:
                reports[_report(mistake, folders, config_name, composition)] = None
        is_sweep = multirun or compositions[0].is_multirun
        sweep_dir = _sweep_dir() if is_sweep else None
    if reports:
        raise ConfigError(_message(command, list(reports)))
    return Checked(
        _with_additions(overrides, [c.overrides for c in compositions]),
        jobs,
        sweep_dir,
    )


@contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """Let a job that Hydra runs compose another configuration: Hydra refuses to start twice."""
    instance = GlobalHydra.instance()
    running = instance.hydra
    instance.clear()
    try:
        yield
    finally:
        instance.hydra = running


def _sweep_dir() -> str | None:
    """Where Hydra would put the sweep that was composed last."""
    composed: Any = HydraConfig.instance().cfg
    if composed is None:
        return None
    folder = OmegaConf.select(composed, "hydra.sweep.dir", throw_on_resolution_failure=False)
    return None if folder is None else str(folder)


def _compositions(hydra: Composer, overrides: Sequence[str], multirun: bool) -> list[Composition]:
    """A composition for each job; the mistakes of malformed overrides come with the first."""
    if not multirun:
        first = hydra.compose(overrides)
        if not first.is_multirun:
            return [first]
    well_formed, malformed = hydra.well_formed(overrides)
    first_job = hydra.jobs(well_formed)[0]
    base = hydra.compose(first_job)
    params = [text for text in base.sweeper_params if _key(text) not in map(_key, well_formed)]
    jobs = [hydra.compose(job) for job in hydra.jobs([*params, *well_formed])]
    jobs[0].mistakes.extend(malformed)
    return jobs


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _with_additions(overrides: Sequence[str], jobs: Sequence[Sequence[str]]) -> list[str]:
    """The overrides as typed, ``++`` put before those that some job had to add."""
    added = {_key(text) for job in jobs for text in job if text.startswith("++")}
    return [
        f"++{text}" if _key(text) in added and not text.startswith("+") else text
        for text in overrides
    ]


def _report(
    mistake: Mistake, folders: Sequence[Path], config_name: str, composition: Composition
) -> str:
    place = origin(mistake.path, folders, config_name, composition.choices, composition.overrides)
    return f"{mistake.path}: {mistake.message}{f'  [{place}]' if place else ''}"


def _message(command: ConfigCommand, reports: Sequence[str]) -> str:
    count = "1 mistake" if len(reports) == 1 else f"{len(reports)} mistakes"
    lines = "\n".join(f"  {report}" for report in reports)
    return f"{count} in the configuration of `helpsteer2 {command.name}`:\n{lines}"
