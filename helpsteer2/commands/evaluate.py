"""``helpsteer2 evaluate``: a reward model on every evaluator, tables and ``result.json``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from difflib import get_close_matches
from typing import Any, Literal

from rich.console import Console

from helpsteer2.attributes import AttributeWeights
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.errors import DataError, UserError
from helpsteer2.evaluation.scoring import EvaluationContext, Evaluator, Scorer, model_key
from helpsteer2.records import environment

WIDTH = 100
"""Columns of the tables where the output is no terminal."""


def evaluate(
    run_dir: str,
    seed: int,
    model: str,
    evaluators: Mapping[str, Evaluator],
    weightings: Mapping[str, AttributeWeights],
    dtype: Literal["float32", "bfloat16"],
    attention: Literal["auto", "sdpa", "flex", "flash"],
    tokens_per_microbatch: int,
    optimized_metric: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> float | None:
    """Load a model once, run every evaluator on it, print tables and write ``result.json``.

    Args:
        run_dir: Folder of the result; scores are kept in ``scores`` inside it, and read again if
            the model and the data are the same.
        seed: Seed of the bootstrap.
        model: Folder of a reward model, or its Hub id.
        evaluators: What to run, by name.
        weightings: Weightings that make one reward of the scores.
        dtype: Type of the backbone's weights.
        attention: Attention backend.
        tokens_per_microbatch: Most tokens of one forward pass.
        optimized_metric: Slash-separated place of a figure in the metrics, returned for sweepers:
            ``rewardbench/weightings/uniform/section_mean/value``.
        config: The whole configuration, kept in the result.

    Returns:
        The optimized metric, None if none is named.

    Raises:
        UserError: If the model or the data cannot be used, another process uses the folder, or the
            metric does not exist.
    """
    if not evaluators:
        raise UserError("evaluators: name at least one, for example evaluator=[ratings]")
    started, start = datetime.now(timezone.utc), time.monotonic()
    folder = RunFolder(run_dir)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    with folder.locked():
        scorer = _load(model, dtype, attention, tokens_per_microbatch)
        context = EvaluationContext(
            weightings=tuple(weightings.values()),
            scores_dir=folder.path / "scores",
            model_key=model_key(model, dtype=dtype, attention=attention),
            seed=seed,
            console=console,
        )
        metrics = {
            name: _run(name, evaluator, scorer, context) for name, evaluator in evaluators.items()
        }
        folder.write_result(
            {
                "kind": "evaluate",
                "metrics": metrics,
                "fingerprints": {name: found["fingerprint"] for name, found in metrics.items()},
                "model": _describe(scorer, model),
                "config": config,
                "environment": environment(),
                "started": started.isoformat(timespec="seconds"),
                "wall_seconds": round(time.monotonic() - start, 3),
            }
        )
    console.print(f"wrote {folder.path / 'result.json'}", soft_wrap=True)
    return None if optimized_metric is None else find_metric(metrics, optimized_metric)


def _run(
    name: str, evaluator: Evaluator, scorer: Scorer, context: EvaluationContext
) -> dict[str, Any]:
    """Run one evaluator and show its tables; a message about its data names our own config key."""
    try:
        metrics = evaluator.evaluate(scorer, context)
    except DataError:
        raise
    except UserError as error:
        key = f" evaluators.{name}.data.path="
        raise UserError(str(error).replace(" data.path=", key)) from error
    for table in evaluator.tables(metrics):
        context.console.print(table)
        context.console.print()
    return metrics


def find_metric(metrics: Mapping[str, Any], place: str) -> float:
    """Look up one figure of nested metrics.

    Args:
        metrics: Nested figures.
        place: Its keys, joined by slashes.

    Returns:
        The figure; NaN if it could not be computed.

    Raises:
        UserError: If there is no such figure.
    """
    figures = dict(_leaves(metrics, ""))
    if place not in figures:
        near = get_close_matches(place, figures, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"optimized_metric: there is no figure {place!r}{hint}")
    value = figures[place]
    return float("nan") if value is None else float(value)


def _leaves(node: Any, place: str) -> Iterator[tuple[str, float | None]]:
    """Numbers and unknown values of nested mappings with their places."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{place}/{key}" if place else str(key))
    elif node is None or (isinstance(node, int | float) and not isinstance(node, bool)):
        yield place, node


def _load(model: str, dtype: Any, attention: Any, tokens_per_microbatch: int) -> Scorer:
    """Load the model; torch is imported here and not before."""
    from helpsteer2.rewards.scorer import RewardScorer

    scorer: Scorer = RewardScorer.from_pretrained(
        model,
        dtype=dtype,
        attention=attention,
        tokens_per_microbatch=tokens_per_microbatch,
    )
    return scorer


def _describe(scorer: Any, model: str) -> dict[str, Any]:
    """What the scores depend on beside the weights: the template and the limits, by hash."""
    return {
        "path": model,
        "attribute_names": scorer.attribute_names,
        "template_name": scorer.chat.template_name,
        "template_hash": scorer.chat.template_hash,
        "cuts_in_this_run": asdict(scorer.cuts),
    }
