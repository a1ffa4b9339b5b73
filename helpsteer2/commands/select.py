"""``helpsteer2 select``: of several exports the one that an evaluator likes best."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from helpsteer2.attributes import AttributeWeights
from helpsteer2.commands.evaluate import evaluate, find_metric, short_names
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.errors import UserError
from helpsteer2.evaluation.scoring import Evaluator, model_key
from helpsteer2.pipeline.contents import Contents
from helpsteer2.pipeline.fingerprint import dependencies, fingerprint_of
from helpsteer2.records import environment, write_json_atomic

if TYPE_CHECKING:
    from helpsteer2.generation.sampling import Engine

MARKER = "config.json"
"""File that tells a model's folder from others."""


def select(
    run_dir: str,
    seed: int,
    candidates: str | list[str],
    metric: str,
    mode: Literal["max", "min"],
    evaluators: Mapping[str, Evaluator],
    weightings: Mapping[str, AttributeWeights],
    engine: Engine,
    dtype: Literal["float32", "bfloat16"],
    attention: Literal["auto", "sdpa", "flex", "flash"],
    tokens_per_microbatch: int,
    config: Mapping[str, Any] | None = None,
) -> float:
    """Evaluate every candidate, and put the best one into ``run_dir/export``.

    A candidate that was evaluated before, by the same configuration on the same data, is not
    evaluated again; so the same command goes on where a killed one was.

    Args:
        run_dir: Folder of the export (``export``), of the record (``result.json``, which says what
            was selected on) and of the evaluations (``candidates``).
        seed: Seed of the evaluations.
        candidates: A run with ``exports`` of several steps (``schedule.export_every``), another
            folder of exports, or a list of exports.
        metric: Slash-separated place of the figure in the metrics, the evaluator's name first.
        mode: Whether the highest or the lowest is best. Of equal ones the first is taken.
        evaluators: What to run, by name.
        weightings: Weightings that make one reward of scores.
        engine: What samples from a policy.
        dtype: Type of the weights.
        attention: Attention backend.
        tokens_per_microbatch: Most tokens of one forward pass of a reward model.
        config: The whole configuration, kept in the result.

    Returns:
        The figure of the selected candidate.

    Raises:
        UserError: If there is no candidate or no such figure, if none of the figures is a number,
            or as an evaluation raises it.
    """
    started, start = datetime.now(timezone.utc), time.monotonic()
    evaluator = metric.partition("/")[0]
    if evaluator not in evaluators:
        raise UserError(
            f"metric={metric} has to begin with the name of an evaluator: {', '.join(evaluators)}"
        )
    folder, models = RunFolder(run_dir), candidate_models(candidates)

    def evaluated(name: str, path: Path) -> float:
        of_candidate = RunFolder(folder.path / "candidates" / name)
        evaluate(
            str(of_candidate.path), seed, str(path), evaluators, weightings, engine, dtype,
            attention, tokens_per_microbatch, config=config,
        )  # fmt: skip
        record = of_candidate.result()
        assert record is not None, "an evaluation writes its result"
        return find_metric(record["metrics"], metric, key="metric")

    with folder.locked("select"):
        memory = _Memory.of(folder.path, config)
        values = {name: memory.value(name, path, evaluated) for name, path in models.items()}
        memory.contents.save()
        best = best_of(values, mode, metric)
        _put(models[best], folder.export)
        record = RunFolder(folder.path / "candidates" / best).result() or {"metrics": {}}
        selected_on = {
            "evaluator": evaluator,
            "metric": metric,
            "mode": mode,
            "split": record["metrics"].get(evaluator, {}).get("split"),
            "values": values,
        }
        folder.write_result(
            {
                "kind": "select",
                "metrics": {"value": values[best]},
                "selected": {"name": best, "path": str(models[best])},
                "selected_on": selected_on,
                "config": config,
                "environment": environment(),
                "started": started.isoformat(timespec="seconds"),
                "wall_seconds": round(time.monotonic() - start, 3),
            }
        )
    console = Console()
    console.print(candidates_table(values, best, metric))
    console.print(f"wrote {folder.export}", soft_wrap=True)
    return values[best]


def candidate_models(candidates: str | list[str]) -> dict[str, Path]:
    """Find the models to choose among.

    Args:
        candidates: A run, a folder of exports, or a list of exports.

    Returns:
        Name → folder, in the order of the list or of the names.

    Raises:
        UserError: If there is none, or one of a list is no folder of a model.
    """
    if isinstance(candidates, str):
        folder = Path(candidates).expanduser()
        exports = folder / "exports" if (folder / "exports").is_dir() else folder
        found = sorted(exports.iterdir()) if exports.is_dir() else []
        models = {path.name: path for path in found if (path / MARKER).is_file()}
        if not models:
            raise UserError(
                f"candidates={candidates} has no exports to choose among: train with "
                "schedule.export_every=STEPS, or name exports, candidates=[DIR,DIR]"
            )
        return models
    missing = [path for path in candidates if not (Path(path).expanduser() / MARKER).is_file()]
    if missing or not candidates:
        told = ", ".join(missing) or "an empty list"
        raise UserError(f"candidates: {told}: name folders of models, each with a {MARKER}")
    names = short_names(candidates)
    return {name.replace("/", "_"): Path(path).expanduser() for name, path in names.items()}


def best_of(values: Mapping[str, float], mode: Literal["max", "min"], metric: str) -> str:
    """Name of the candidate with the best value, the first of equal ones; NaN is never the best.

    Args:
        values: Value of each candidate, by name.
        mode: Whether the highest or the lowest is best.
        metric: What they are values of, for the message.

    Raises:
        UserError: If every value is NaN.
    """
    known = {name: value for name, value in values.items() if not math.isnan(value)}
    if not known:
        raise UserError(f"metric={metric} is not a number for any of {', '.join(values)}")
    choose = max if mode == "max" else min
    return choose(known, key=lambda name: known[name])


def candidates_table(values: Mapping[str, float], best: str, metric: str) -> Table:
    """A row a candidate.

    Args:
        values: Value of each, by name.
        best: Name of the selected one.
        metric: What was selected on.
    """
    table = Table(title=f"selected on {metric}")
    table.add_column("candidate")
    table.add_column("value", justify="right")
    for name, value in values.items():
        mark = "bold green" if name == best else ""
        table.add_row(name, f"{value:.4f}", style=mark)
    return table


@dataclass(frozen=True)
class _Memory:
    """Values of candidates that were evaluated before.

    Attributes:
        folder: Holds a folder for each candidate.
        contents: Hashes the data that evaluators read.
        key: What a value depends on beside the candidate; None keeps none.
    """

    folder: Path
    contents: Contents
    key: str | None

    @classmethod
    def of(cls, run_dir: Path, config: Mapping[str, Any] | None) -> _Memory:
        contents = Contents(run_dir / ".contents.json")
        key = None
        if config is not None:
            others = {
                name: value for name, value in config.items() if name not in {"candidates", "mode"}
            }
            key = fingerprint_of(dependencies("select", others, contents))
        return cls(run_dir / "candidates", contents, key)

    def value(self, name: str, model: Path, evaluated: Callable[[str, Path], float]) -> float:
        """The value of a candidate, evaluated if it is not known."""
        key, file = f"{self.key} {model_key(str(model))}", self.folder / name / "selection.json"
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = {}
        if self.key is not None and kept.get("key") == key:
            return math.nan if kept["value"] is None else float(kept["value"])
        value = evaluated(name, model)
        write_json_atomic(file, {"key": key, "value": value})
        return value


def _put(model: Path, export: Path) -> None:
    """Put a model's files into the export, as links where the file system has them."""
    from helpsteer2.models.export import replaced_folder

    with replaced_folder(export, MARKER) as aside:
        shutil.copytree(model, aside, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
