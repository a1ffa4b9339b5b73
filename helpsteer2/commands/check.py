"""``helpsteer2 check [COMMAND]``: compose and validate a configuration, run nothing."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands.launch import (
    check_arguments,
    is_shown,
    parse_arguments,
    run_hydra,
)
from helpsteer2.config.annotations import TARGET
from helpsteer2.config.checked import Checked
from helpsteer2.config.rules import Settings

USAGE = """usage: helpsteer2 check [COMMAND] [key=value ...]

Compose and validate the configuration of a command (of train, if none is named) and say what
would run; of a pipeline every stage is looked at. With -m every value of a sweep is checked; --cfg
job prints the configuration, --info says how it was composed. Exit code 2 if there is a mistake;
all of them are listed.
"""


def main(argv: Sequence[str]) -> int:
    """Check a configuration.

    Args:
        argv: Arguments after ``helpsteer2 check``.

    Returns:
        The exit code, 0: mistakes are raised.

    Raises:
        ConfigError: With every mistake found.
    """
    arguments = list(argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    name = arguments.pop(0) if arguments and arguments[0] in CONFIG_COMMANDS else "train"
    command = CONFIG_COMMANDS[name]
    parsed = parse_arguments(command, arguments)
    checked = check_arguments(command, parsed)
    if is_shown(parsed):
        run_hydra(command, parsed, checked.overrides)
    else:
        stages = _stages(parsed, checked) if name == "pipeline" else []
        _print_summary(name, checked, stages)
    return 0


def _stages(parsed: argparse.Namespace, checked: Checked) -> list[str]:
    """Names of the stages of the first job, after a look at those of every job."""
    from helpsteer2.commands.pipeline import PROGRAM, checked_stages
    from helpsteer2.pipeline.plan import Commands

    conf = Path(parsed.config_path) if parsed.config_path else None
    commands = Commands(CONFIG_COMMANDS, PROGRAM, conf, parsed.config_dir)
    stages = [checked_stages(job, commands) for job in checked.jobs]
    return stages[0]


def _print_summary(name: str, checked: Checked, stages: Sequence[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    jobs = "" if len(checked.jobs) == 1 else f", {len(checked.jobs)} jobs; the first:"
    console.print(Text.assemble(("ok", "green"), f" helpsteer2 {name}{jobs}"))
    for key, value in _rows(checked.jobs[0]):
        console.print(Text.assemble((f"  {key:<12}", "bold"), value))
    if stages:
        console.print(Text.assemble(("  stages      ", "bold"), ", ".join(stages)))


def _rows(settings: Settings) -> Iterator[tuple[str, str]]:
    """What would run, line by line; lines whose values the command lacks are left out."""
    yield "run_dir", str(settings["run_dir"])
    for key in ("model", "module"):
        if settings[key] is not None:
            yield key, _named(settings[key])
    if settings["backbone"] is not None:
        yield "backbone", _backbone(settings)
    for key in ("data", "evaluators"):
        if settings[key] is not None:
            yield key, _named(settings[key])
    if settings["batching"] is not None:
        yield "steps", _steps(settings)
        yield "step", _step(settings)


def _backbone(settings: Settings) -> str:
    shape = settings["backbone.config"] or {}
    source = settings["backbone.path"] or (
        f"{shape.get('model_type')}, {shape.get('num_hidden_layers')} layers "
        f"of {shape.get('hidden_size')}"
    )
    return f"{source}, {settings['backbone.init']} weights, {settings['backbone.dtype']}"


def _named(node: object) -> str:
    """A node's class with its path, or the names of the nodes it holds."""
    if not isinstance(node, dict):
        return str(node)
    if TARGET not in node:
        return ", ".join(f"{key} ({_named(value)})" for key, value in node.items())
    inner = (
        node.get("path")
        or node.get("init_from")
        or _named(node.get("of") or node.get("data") or "")
    )
    return f"{node[TARGET].rpartition('.')[2]} {inner}".strip()


def _steps(settings: Settings) -> str:
    if settings["batching.max_steps"] is not None:
        return f"{settings['batching.max_steps']} optimizer steps"
    return f"{settings['batching.epochs']} epochs"


def _step(settings: Settings) -> str:
    devices = settings["trainer.devices"]
    return (
        f"{settings['batching.global_batch']} groups, in micro-batches of at most "
        f"{settings['batching.tokens_per_microbatch']} tokens, devices: {devices}, "
        f"precision: {settings['trainer.precision']}"
    )
