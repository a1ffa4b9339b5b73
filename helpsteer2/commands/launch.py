"""Running a command through Hydra, after its configuration has been checked."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from helpsteer2.commands.sweep import Job, Sweep
from helpsteer2.config.checked import Checked, check
from helpsteer2.config.command import ConfigCommand
from helpsteer2.config.compose import VERSION_BASE, conf_dir
from helpsteer2.config.signatures import read_signature
from helpsteer2.config.validate import PASSED_BY_CODE, plain, validate
from helpsteer2.errors import ConfigError, UserError

_SHOWS = ("help", "hydra_help", "info", "cfg", "shell_completion")


def parse_arguments(command: ConfigCommand, argv: Sequence[str]) -> argparse.Namespace:
    """Parse Hydra's own flags, the command's and overrides, in any order.

    Args:
        command: Whose arguments they are.
        argv: Arguments after the command's name.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.prog = f"helpsteer2 {command.name}"
    args = parser.parse_intermixed_args([command.flags.get(text, text) for text in argv])
    if sum([args.run, args.cfg is not None, args.multirun, args.info is not None]) > 1:
        parser.error("only one of --run, --multirun, --cfg and --info can be given")
    if args.resolve and args.cfg is None:
        parser.error("--resolve goes with --cfg")
    return args


def check_arguments(command: ConfigCommand, args: argparse.Namespace) -> Checked:
    """Check the configuration that parsed arguments ask for.

    Args:
        command: What the configuration is for.
        args: As made by ``parse_arguments``.

    Raises:
        ConfigError: With every mistake found.
    """
    return check(
        command,
        args.overrides,
        multirun=args.multirun,
        compose_only=is_shown(args),
        conf=Path(args.config_path) if args.config_path else None,
        config_name=args.config_name,
        extra_dir=args.config_dir,
    )


def is_shown(args: argparse.Namespace) -> bool:
    """Whether the arguments ask Hydra to show something, not to run."""
    return any(getattr(args, name) for name in _SHOWS)


def launch(command: ConfigCommand, argv: Sequence[str]) -> int:
    """Check a command's configuration, then run it (or each job of a sweep).

    Args:
        command: What to run.
        argv: Arguments after the command's name.

    Returns:
        The exit code.

    Raises:
        ConfigError: If the configuration is wrong; nothing has run then.
        UserError: As the command raises it.
    """
    args = parse_arguments(command, argv)
    overrides, sweep = list(args.overrides), None
    if not args.shell_completion:
        checked = check_arguments(command, args)
        overrides = checked.overrides
        if checked.sweep_dir is not None and not is_shown(args):
            sweep = Sweep.of(Path(checked.sweep_dir).absolute(), overrides)
            overrides = [*overrides, sweep.location()]
    run_hydra(command, args, overrides, sweep)
    return 0


def run_hydra(
    command: ConfigCommand,
    args: argparse.Namespace,
    overrides: Sequence[str],
    sweep: Sweep | None = None,
) -> None:
    """Hand arguments to Hydra, which composes again and runs or shows what they ask for.

    Args:
        command: What to run.
        args: As made by ``parse_arguments``.
        overrides: In place of those in ``args``.
        sweep: The sweep, if they ask for one.

    Raises:
        UserError: As the command raises it, if a job of the sweep fails, or if the run's folder
            cannot be made.
    """
    import hydra

    typed, began = sys.argv, False
    failed: list[UserError] = []

    def task(job: Any) -> Any:
        nonlocal began
        sys.argv, began = typed, True
        if sweep is not None:
            return sweep.run(job.get("optimized_metric"), partial(_run_job, command, job))
        try:
            return _run_job(command, job)
        except UserError as error:
            # Raised through Hydra it would come with the overrides of the job, printed before it.
            failed.append(error)
            return None

    # Errors come back to us as they are, not as Hydra prints them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [typed[0], *_flags(args), *overrides]
    try:
        with nullcontext() if sweep is None else sweep.opened():
            hydra.main(
                version_base=VERSION_BASE,
                config_path=str(conf_dir()),
                config_name=command.config_name,
            )(task)()
    except OSError as error:
        if began or error.filename is None:
            raise
        # The folder is made before the first job.
        raise UserError(f"run_dir: {error.filename} cannot be made: {error.strerror}") from error
    finally:
        sys.argv = typed
    if failed:
        raise failed[0]


def _flags(args: argparse.Namespace) -> list[str]:
    """Hydra's flags as they were typed, overrides left out."""
    switches = ("help", "hydra_help", "resolve", "run", "multirun", "shell_completion")
    values = ("cfg", "package", "config_path", "config_name", "config_dir", "info")
    flags = [f"--{name.replace('_', '-')}" for name in switches if getattr(args, name)]
    for name in values:
        if getattr(args, name) is not None:
            flags += [f"--{name.replace('_', '-')}={getattr(args, name)}"]
    return flags


def _run_job(command: ConfigCommand, job: Any, of_sweep: Job | None = None) -> Any:
    """Build the objects of one job's configuration and call the command with them."""
    config, mistakes = plain(job)
    if of_sweep is not None:
        _tell_jobs_apart(config, of_sweep)
    # A sweeper may have chosen values that could not be known before.
    mistakes += validate(config, command.target)[1]
    if mistakes:
        unique = dict.fromkeys(f"{mistake.path}: {mistake.message}" for mistake in mistakes)
        raise ConfigError("\n".join(unique))
    arguments = build(config)
    signature = read_signature(command.target)
    if signature is not None:
        arguments.update({key: config for key in PASSED_BY_CODE & set(signature.parameters)})
    module, _, name = command.target.rpartition(".")
    return getattr(import_module(module), name)(**arguments)


def build(config: dict[str, Any]) -> dict[str, Any]:
    """Make the objects that ``_target_`` nodes stand for, all containers plain ones.

    Args:
        config: A configuration without mistakes.

    Returns:
        The same with objects in place of nodes.

    Raises:
        UserError: As a constructor raises it.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        built: dict[str, Any] = instantiate(config, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    return built


def _tell_jobs_apart(config: dict[str, Any], job: Job) -> None:
    """Give a job of a sweep a folder of its own, and in W&B a name of its own in one group."""
    folder = Path(job.folder)
    config["run_dir"] = str(folder)
    if isinstance(config.get("logger"), dict):
        swept = " ".join(f"{key}={value}" for key, value in job.swept.items())
        names = {"group": folder.parent.name, "name": swept or folder.name}
        given = {key: value for key, value in config["logger"].items() if value is not None}
        config["logger"] = {**names, **given}
