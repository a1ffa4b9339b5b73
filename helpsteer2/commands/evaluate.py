"""``helpsteer2 evaluate``: reward models or policies on evaluators, tables and ``result.json``."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from helpsteer2.attributes import AttributeWeights
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.errors import DataError, UserError
from helpsteer2.evaluation.meaning import OWN_REWARD, ScoreMeaning
from helpsteer2.evaluation.policies import EvaluatedPolicy
from helpsteer2.evaluation.report import side_by_side_table, with_interval
from helpsteer2.evaluation.scoring import (
    EvaluationContext,
    Evaluator,
    ModelKind,
    Paired,
    Plotted,
    model_key,
    told_together,
)
from helpsteer2.plots import save
from helpsteer2.records import environment
from helpsteer2.rewards.rewarder import Scorer

if TYPE_CHECKING:
    from helpsteer2.generation.sampling import Engine

WIDTH = 100
"""Columns of the tables where the output is no terminal."""


def evaluate(
    run_dir: str,
    seed: int,
    model: str | list[str],
    evaluators: Mapping[str, Evaluator],
    weightings: Mapping[str, AttributeWeights],
    engine: Engine,
    dtype: Literal["float32", "bfloat16"],
    attention: Literal["auto", "sdpa", "flex", "flash"],
    tokens_per_microbatch: int,
    optimized_metric: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> float | None:
    """Run every evaluator on a model, or on several; print tables and write ``result.json``.

    Args:
        run_dir: Folder of the result; scores are kept in ``scores`` inside it, and read again if
            the model and the data are the same.
        seed: Seed of the bootstrap and, by way of its evaluator, of a policy's samples.
        model: Folder of a reward model or a policy, whichever the evaluators take, or its Hub id; a
            list of them is shown side by side, and their figures are recorded by what tells their
            names apart.
        evaluators: What to run, by name.
        weightings: Weightings that make one reward of the scores.
        engine: What samples from a policy.
        dtype: Type of the backbone's weights.
        attention: Attention backend.
        tokens_per_microbatch: Most tokens of one forward pass of a reward model.
        optimized_metric: Slash-separated place of a figure in the metrics, returned for sweepers:
            ``rewardbench/weightings/uniform/section_mean/value``, after the model's name if there
            are several.
        config: The whole configuration, kept in the result.

    Returns:
        The optimized metric, None if none is named.

    Raises:
        UserError: If a model or the data cannot be used, or is not of the kind that the evaluators
            take, another process uses the folder, or the metric does not exist. Whatever is wrong
            with the data of any evaluator is told at once, before a model is loaded.
    """
    kind = _kind_of(evaluators)
    models = {model: model} if isinstance(model, str) else short_names(model)
    told_together(
        *(partial(_check_kind, path, kind, evaluators) for path in models.values()),
        *(partial(_check_data, name, evaluator) for name, evaluator in evaluators.items()),
    )
    started, start = datetime.now(timezone.utc), time.monotonic()
    folder = RunFolder(run_dir)
    settings = {"dtype": dtype, "attention": attention}

    def load(path: str) -> Scorer | EvaluatedPolicy:
        if kind == "policy":
            return EvaluatedPolicy(path, engine, dtype, attention)
        return _reward_model(path, tokens_per_microbatch, settings)

    evaluation = _Evaluation(
        evaluators, tuple(weightings.values()), seed, load, settings, folder.path
    )
    with folder.locked("evaluate"):
        if isinstance(model, str):
            record = evaluation.of(model, folder.path / "scores")
            evaluation.draw({"policy": record["metrics"]})
        else:
            record = evaluation.side_by_side(models)
        record |= {
            "config": config,
            "environment": environment(),
            "started": started.isoformat(timespec="seconds"),
            "wall_seconds": round(time.monotonic() - start, 3),
        }
        folder.write_result({"kind": "evaluate", **record})
    evaluation.console.print(f"wrote {folder.path / 'result.json'}", soft_wrap=True)
    return None if optimized_metric is None else find_metric(record["metrics"], optimized_metric)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


@dataclass(frozen=True)
class _Evaluation:
    """What every model of a run is evaluated by.

    Attributes:
        load: Loads a model.
        settings: Whatever its scores depend on beside the folder.
        run_dir: Folder of scores and plots.
    """

    evaluators: Mapping[str, Evaluator]
    weightings: tuple[AttributeWeights, ...]
    seed: int
    load: Callable[[str], Scorer | EvaluatedPolicy]
    settings: Mapping[str, str]
    run_dir: Path
    console: Console = field(default_factory=_console)

    def of(self, path: str, scores_dir: Path) -> dict[str, Any]:
        """Load a model once, run every evaluator on it and show its tables."""
        model = self.load(path)
        meaning = ScoreMeaning()
        if not isinstance(model, EvaluatedPolicy):
            meaning = _meaning(model)
            self.console.print(_own_reward_line(meaning, model.attribute_names))
        context = EvaluationContext(
            weightings=self.weightings,
            scores_dir=scores_dir,
            model_key=model_key(path, **self.settings),
            seed=self.seed,
            console=self.console,
            meaning=meaning,
        )
        metrics = {
            name: _run(evaluator, model, context) for name, evaluator in self.evaluators.items()
        }
        return {
            "metrics": metrics,
            "fingerprints": {name: found["fingerprint"] for name, found in metrics.items()},
            "model": _describe(model, path, meaning),
        }

    def side_by_side(self, models: Mapping[str, str]) -> dict[str, Any]:
        """Evaluate one model after the other, then show them in one table an evaluator."""
        records = {}
        for name, path in models.items():
            self.console.rule(name)
            scores_dir = self.run_dir / "scores" / re.sub(r"[^\w.-]", "_", name)
            records[name] = self.of(path, scores_dir)
        self.console.rule("side by side")
        metrics = {name: record["metrics"] for name, record in records.items()}
        gains = {}
        for name, evaluator in self.evaluators.items():
            results = {model: found[name] for model, found in metrics.items()}
            columns = {model: evaluator.headlines(result) for model, result in results.items()}
            if isinstance(evaluator, Paired) and len(results) > 1:
                gains[name] = evaluator.gains(results, self.seed)
                _add_gains(columns, gains[name])
            self.console.print(side_by_side_table(name, columns))
        self.draw(metrics)
        return {
            "metrics": metrics,
            # Of the own reward, on the first model.
            "gains": gains,
            # Of the data: the same for every model.
            "fingerprints": next(iter(records.values()))["fingerprints"],
            "models": {name: record["model"] for name, record in records.items()},
        }

    def draw(self, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the plots of those evaluators that have any, all models in one.

        Args:
            metrics: By model and evaluator.
        """
        for name, evaluator in self.evaluators.items():
            if not isinstance(evaluator, Plotted):
                continue
            results = {model: found[name] for model, found in metrics.items()}
            for plot, figure in evaluator.figures(results).items():
                save(figure, self.run_dir / "plots" / f"{name}_{plot}.png")


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Name models by the part of their paths that tells them apart.

    Args:
        models: Folders or Hub ids.

    Returns:
        Name → model: ``outputs/a/export`` and ``outputs/b/export`` are called ``a`` and ``b``.

    Raises:
        UserError: If there is none, or one is there twice.
    """
    parts = [Path(model).parts for model in models]
    if not models or len(set(parts)) < len(parts):
        raise UserError(f"model: name one or more models, each once, got {list(models)}")
    head, tail, shortest = 0, 0, min(map(len, parts)) - 1
    while head < shortest and len({of[head] for of in parts}) == 1:
        head += 1
    while tail < shortest - head and len({of[-1 - tail] for of in parts}) == 1:
        tail += 1
    names = ("/".join(of[head : len(of) - tail]) for of in parts)
    return dict(zip(names, models, strict=True))


def _kind_of(evaluators: Mapping[str, Evaluator]) -> ModelKind:
    """The one kind of model that all evaluators take."""
    if not evaluators:
        raise UserError("evaluators: name at least one, for example evaluator=[ratings]")
    kinds = {name: evaluator.takes for name, evaluator in evaluators.items()}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{name} takes a {kind}" for name, kind in kinds.items())
        raise UserError(f"evaluators: {told}: run them apart, each kind with its own model=…")
    return next(iter(kinds.values()))


def _check_kind(path: str, kind: ModelKind, evaluators: Mapping[str, Evaluator]) -> None:
    """Refuse an export of the other kind before anything is loaded."""
    from helpsteer2.models.spec import POLICY_FILE, SPEC_FILE

    other: dict[ModelKind, tuple[str, ModelKind, str]] = {
        "reward model": (POLICY_FILE, "policy", "world_policy"),
        "policy": (SPEC_FILE, "reward model", "ratings"),
    }
    file, found, instead = other[kind]
    if (Path(path).expanduser() / file).is_file():
        raise UserError(
            f"model={path} is a {found}, but {', '.join(evaluators)} takes a {kind}: give one, or "
            f"choose other evaluators, evaluator=[{instead}] for example"
        )


def _check_data(name: str, evaluator: Evaluator) -> None:
    """Read an evaluator's data; a message about them names our own config key."""
    try:
        evaluator.check()
    except DataError:
        raise
    except UserError as error:
        key = f" evaluators.{name}.data.path="
        raise UserError(str(error).replace(" data.path=", key)) from error


def _run(
    evaluator: Evaluator, model: Scorer | EvaluatedPolicy, context: EvaluationContext
) -> dict[str, Any]:
    """Run one evaluator and show its tables."""
    metrics = evaluator.evaluate(model, context)
    for table in evaluator.tables(metrics):
        context.console.print(table)
        context.console.print()
    return metrics


def find_metric(metrics: Mapping[str, Any], place: str, key: str = "optimized_metric") -> float:
    """Look up one figure of nested metrics.

    Args:
        metrics: Nested figures.
        place: Its keys, joined by slashes.
        key: Setting that holds the place, for the message.

    Returns:
        The figure; NaN if it could not be computed.

    Raises:
        UserError: If there is no such figure.
    """
    figures = dict(_leaves(metrics, ""))
    if place not in figures:
        near = get_close_matches(place, figures, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"{key}: there is no figure {place!r}{hint}")
    value = figures[place]
    return float("nan") if value is None else float(value)


def _leaves(node: Any, place: str) -> Iterator[tuple[str, float | None]]:
    """Numbers and unknown values of nested mappings with their places."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{place}/{key}" if place else str(key))
    elif node is None or (isinstance(node, int | float) and not isinstance(node, bool)):
        yield place, node


def _reward_model(path: str, tokens_per_microbatch: int, settings: Mapping[str, Any]) -> Scorer:
    """Load a reward model; torch is imported here and not before."""
    from helpsteer2.rewards.scorer import RewardScorer

    scorer: Scorer = RewardScorer.from_pretrained(
        path, tokens_per_microbatch=tokens_per_microbatch, **settings
    )
    return scorer


def _meaning(scorer: Any) -> ScoreMeaning:
    """What the export of a loaded reward model tells of its scores."""
    return ScoreMeaning.of(scorer.model.spec)


def _own_reward_line(meaning: ScoreMeaning, attribute_names: tuple[str, ...]) -> str:
    """What stands in the row that models share."""
    if meaning.weights is not None:
        return f"{OWN_REWARD}: weighted by {meaning.weights.name}, which is stored with the model"
    if len(attribute_names) == 1:
        return f"{OWN_REWARD}: the model's only score, {attribute_names[0]}"
    return f"{OWN_REWARD}: none, as the model has several scores and no weighting stored with it"


def _add_gains(columns: Mapping[str, dict[str, str]], gains: Mapping[str, Any]) -> None:
    """Add a row: what the own reward of each model gains on that of the first."""
    row = f"{OWN_REWARD}, points over {next(iter(columns))}"
    for model, gain in gains.items():
        columns[model][row] = with_interval(gain, 1, 100.0)


def _describe(model: Any, path: str, meaning: ScoreMeaning) -> dict[str, Any]:
    """What figures depend on beside the weights: the template and the limits, by hash."""
    of_rewards = (
        {}
        if isinstance(model, EvaluatedPolicy)
        else {
            "attribute_names": model.attribute_names,
            "own_reward": meaning.own_weights(model.attribute_names),
            "scores_are_ratings": meaning.are_ratings,
            "cuts_in_this_run": asdict(model.cuts),
        }
    )
    return {
        "path": path,
        "template_name": model.chat.template_name,
        "template_hash": model.chat.template_hash,
        **of_rewards,
    }
