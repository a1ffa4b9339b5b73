"""``helpsteer2 pipeline``: a recipe of several commands, of which nothing is done twice."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands.launch import build
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.config.compose import conf_dir
from helpsteer2.config.rules import Settings
from helpsteer2.errors import UserError
from helpsteer2.pipeline.contents import Contents
from helpsteer2.pipeline.plan import Commands, PlannedStage, plan
from helpsteer2.pipeline.process import StageProcess
from helpsteer2.pipeline.record import Status
from helpsteer2.pipeline.runner import Runner, refuse_edited, statuses_of
from helpsteer2.pipeline.stages import Pipeline
from helpsteer2.records import environment, write_json_atomic

PROGRAM: Sequence[str] = ("-m", "helpsteer2")
"""What the process of a stage runs, as arguments of Python."""

WIDTH = 120
"""Columns of the table where the output is no terminal."""

STYLES = {"done": "green", "unneeded": "green", "run": "yellow", "edited": "red"}
WORDS = {"done": "done", "unneeded": "not needed", "run": "would run", "edited": "edited"}


def pipeline(
    run_dir: str,
    seed: int,
    pipeline: Pipeline,
    stages_dir: str,
    dry_run: bool = False,
    optimized_metric: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> float | None:
    """Run the stages of a recipe in order, each in a process and a folder of its own.

    A stage's folder is named after everything that its result depends on, so whatever needs the
    same stage, another job of a sweep or another recipe, finds it done. The same command goes on
    after a failure, a signal or a kill.

    Args:
        run_dir: Folder of ``manifest.json`` (what ran, with which inputs and outputs) and of the
            record (``result.json``).
        seed: Seed of every stage.
        pipeline: The recipe.
        stages_dir: Folder of the stages' folders.
        dry_run: Show what would run, and why; run nothing.
        optimized_metric: Slash-separated place of a figure in the metrics, after the stage's name,
            returned for sweepers.
        config: The whole configuration, kept in the result.

    Returns:
        The optimized metric, None if none is named.

    Raises:
        ConfigError: If the configuration of any stage is wrong; nothing has run then.
        UserError: If a stage fails, somebody edited its outputs, or a folder cannot be written.
        SystemExit: With 128 + the signal's number, after a signal asked to stop.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "every rank would run the whole pipeline: start it without torchrun; a stage with "
            "trainer.devices > 1 starts its own ranks"
        )
    started, start = datetime.now(timezone.utc), time.monotonic()
    folder, console = RunFolder(run_dir), Console()
    stages, contents = planned(pipeline, seed, stages_dir, commands_of_run())
    if dry_run:
        statuses = statuses_of(stages, contents)
        shown = console if console.is_terminal else Console(width=WIDTH)
        shown.print(stages_table(stages, statuses))
        refuse_edited(stages, statuses)
        _remove_if_empty(folder.path)
        return None
    manifest = folder.path / "manifest.json"

    def write_manifest(entries: Sequence[Mapping[str, Any]]) -> None:
        name = type(pipeline).__name__
        write_json_atomic(manifest, {"pipeline": name, "seed": seed, "stages": entries})

    with folder.locked("pipeline"), StageProcess() as process:
        entries = Runner(stages, contents, process, console, write_manifest).run()
        write_manifest(entries)
        metrics = _metrics(stages)
        folder.write_result(
            {
                "kind": "pipeline",
                "metrics": metrics,
                "fingerprints": {stage.name: stage.fingerprint for stage in stages},
                "folders": {stage.name: str(stage.folder) for stage in stages},
                "config": config,
                "environment": environment(),
                "started": started.isoformat(timespec="seconds"),
                "wall_seconds": round(time.monotonic() - start, 3),
            }
        )
    console.print(f"wrote {manifest}", soft_wrap=True)
    if optimized_metric is None:
        return None
    from helpsteer2.commands.evaluate import find_metric

    return find_metric(metrics, optimized_metric)


def planned(
    pipeline: Pipeline, seed: int, stages_dir: str, commands: Commands
) -> tuple[list[PlannedStage], Contents]:
    """Compose and check every stage.

    Args:
        pipeline: The recipe.
        seed: Seed of every stage.
        stages_dir: Folder of the stages' folders.
        commands: What stages can be.

    Returns:
        The plan, and what knows the hashes of files.

    Raises:
        ConfigError: With the mistakes of all stages.
        UserError: If a file that a stage reads cannot be read.
    """
    folder = Path(stages_dir).expanduser().absolute()
    contents = Contents(folder / ".contents.json")
    return plan(pipeline.stages(seed), commands, folder, contents), contents


def checked_stages(job: Settings, commands: Commands) -> list[str]:
    """Names of the stages that a configuration asks for, after a look at each.

    Args:
        job: Checked settings of ``helpsteer2 pipeline``.
        commands: What stages can be.

    Raises:
        ConfigError: With the mistakes of all stages.
        UserError: If a file that a stage reads cannot be read.
    """
    pipeline = build({"pipeline": job.given("pipeline")})["pipeline"]
    stages, _ = planned(pipeline, job["seed"], job["stages_dir"], commands)
    return [stage.name for stage in stages]


def stages_table(stages: Sequence[PlannedStage], statuses: Mapping[str, Status]) -> Table:
    """A row a stage: what would be done about it, and why.

    Args:
        stages: The plan.
        statuses: Of each stage, by name.
    """
    table = Table(title="stages of the pipeline")
    for column in ("stage", "command", "", "why", "folder"):
        table.add_column(column, overflow="fold")
    for stage in stages:
        status = statuses[stage.name]
        word = f"[{STYLES[status.kind]}]{WORDS[status.kind]}[/]"
        table.add_row(
            stage.name, stage.stage.command, word, escape(status.why), escape(stage.folder.name)
        )
    return table


def commands_of_run() -> Commands:
    """What stages can be, with the folders of YAML files that Hydra was told to use."""
    from hydra.core.hydra_config import HydraConfig

    sources = {
        source.provider: Path(source.path)
        for source in HydraConfig.get().runtime.config_sources
        if source.schema == "file"
    }
    main = sources.get("main")
    return Commands(
        CONFIG_COMMANDS,
        PROGRAM,
        None if main is None or main.resolve() == conf_dir().resolve() else main,
        str(sources["command-line"]) if "command-line" in sources else None,
    )


def _metrics(stages: Sequence[PlannedStage]) -> dict[str, Any]:
    """Metrics of the stages that no other one reads, by name."""
    read = {earlier.name for stage in stages for earlier, _ in stage.reads}
    metrics = {}
    for stage in stages:
        result = RunFolder(stage.folder).result()
        if stage.name not in read and result is not None:
            metrics[stage.name] = result.get("metrics")
    return metrics


def _remove_if_empty(folder: Path) -> None:
    """Take back the folder that Hydra has made for a run that did not happen."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
