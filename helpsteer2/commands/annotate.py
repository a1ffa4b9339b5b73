"""``helpsteer2 annotate``: groups in, the same groups with the scores of a reward model out."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from helpsteer2.attributes import AttributeWeights
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.data.groups import Group, GroupSource, read_all
from helpsteer2.data.sources.group_files import write_groups
from helpsteer2.errors import UserError
from helpsteer2.evaluation.report import named_table
from helpsteer2.evaluation.scoring import usable_weightings
from helpsteer2.records import append, environment, reason
from helpsteer2.rewards.rewarder import Rewarder, Scorer, Scores
from helpsteer2.rewards.standardise import ScoreStatistics

CHUNK = 256
"""Groups that are scored and stored together.

They are fixed by the order of the data, so that a run that was killed packs the rest as if it had
not been, and gives the same bytes.
"""

SCORES_FILE = "scores.bin"
STATISTICS_FILE = "statistics.json"


def annotate(
    run_dir: str,
    data: GroupSource,
    split: str,
    model: str,
    rewarder: Callable[[], Rewarder],
    weightings: Mapping[str, AttributeWeights],
    config: Mapping[str, Any] | None = None,
) -> None:
    """Score every response; write the groups and what their scores are like.

    The same command goes on where a killed one was.

    Args:
        run_dir: Folder of the groups (``groups.jsonl``), the mean and covariance of their scores
            (``statistics.json``, for ``ScoreStatistics.load``) and the record (``result.json``).
        data: Groups of n responses. Scores that they have are replaced.
        split: The split of them to read.
        model: Folder of the reward model, its Hub id, or the url of its server, for the record.
        rewarder: Opens it.
        weightings: Weightings whose mean reward and standard deviation are reported. They do not
            touch the scores.
        config: The whole configuration, kept in the result.

    Raises:
        DataError: If a row of the data is bad; before the reward model is opened.
        UserError: If the model cannot be used or gives a score that is not finite, the folder holds
            scores of another model or other data, another process uses it, or it cannot be written.
    """
    started, start = datetime.now(timezone.utc), time.monotonic()
    folder, console = RunFolder(run_dir), Console()
    with folder.locked("annotate"):
        sizes = [len(group.responses) for group in read_all(data, split)]
        scorer = rewarder()
        names, fingerprint = scorer.attribute_names, data.fingerprint(split)
        usable = usable_weightings(weightings.values(), names)
        with _Store(folder.path / SCORES_FILE, (scorer.model_hash, fingerprint), names) as store:
            scores, kept = _score_all(lambda: read_all(data, split), sizes, scorer, store, console)
        counts = _Counts()
        path = folder.path / "groups.jsonl"
        annotated = _annotated(read_all(data, split), scores, names, counts)
        write_groups(path, annotated, data.attribute_names)
        statistics = ScoreStatistics.of(scores, names, scorer.model_hash, fingerprint)
        statistics.save(folder.path / STATISTICS_FILE)
        metrics = {
            "groups": len(sizes),
            **vars(counts),
            "attributes": _spread(statistics, _single(names)),
            "weightings": _spread(statistics, usable.weightings),
            "weightings_skipped": usable.skipped,
        }
        folder.write_result(
            {
                "kind": "annotate",
                "metrics": metrics,
                "responses_of_earlier_runs": kept,
                "fingerprint": fingerprint,
                "model": {"path": model, "hash": scorer.model_hash, "attribute_names": names},
                "config": config,
                "environment": environment(),
                "started": started.isoformat(timespec="seconds"),
                "wall_seconds": round(time.monotonic() - start, 3),
            }
        )
    _show(console, metrics)
    console.print(f"wrote {path}", soft_wrap=True)


class _Counts:
    """What the responses are, beside their scores."""

    def __init__(self) -> None:
        self.responses = self.empty_responses = self.unfinished_responses = 0

    def add(self, group: Group) -> None:
        self.responses += len(group.responses)
        self.empty_responses += sum(not text.strip() for text in group.responses)
        self.unfinished_responses += (group.finish_reasons or ()).count("length")


def _single(names: Sequence[str]) -> list[AttributeWeights]:
    """Each attribute as a weighting of its own."""
    return [AttributeWeights(name, {name: 1.0}) for name in names]


def _spread(
    statistics: ScoreStatistics, weightings: Sequence[AttributeWeights]
) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each weighted reward."""
    pairs = {weights.name: statistics.of_reward(weights) for weights in weightings}
    return {name: {"mean": mean, "std": std} for name, (mean, std) in pairs.items()}


def _annotated(
    groups: Iterator[Group], scores: Scores, names: tuple[str, ...], counts: _Counts
) -> Iterator[Group]:
    """The groups with the scores of their responses."""
    for group in groups:
        first = counts.responses
        counts.add(group)
        of_group = tuple(tuple(row) for row in scores[first : counts.responses].tolist())
        # Rewards that are there come from other scores.
        yield replace(group, scores=of_group, score_names=names, rewards=None)


def _score_all(
    groups: Callable[[], Iterator[Group]],
    sizes: Sequence[int],
    scorer: Scorer,
    store: _Store,
    console: Console,
) -> tuple[Scores, int]:
    """``(R, A)`` scores of all responses, and how many of them had been kept."""
    scores = np.empty((sum(sizes), len(scorer.attribute_names)), np.float32)
    stream, row, kept = groups(), 0, 0
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("responses", total=len(scores))
        while chunk := list(islice(stream, CHUNK)):
            end = row + sum(len(group.responses) for group in chunk)
            if end <= len(store.kept):
                kept, scores[row:end] = end, store.kept[row:end]
                progress.advance(task, end - row)
            else:
                found = []
                for group, of_group in zip(chunk, scorer.score(chunk), strict=True):
                    found.append(_finite(of_group, group))
                    progress.advance(task, len(of_group))
                scores[row:end] = np.concatenate(found)
                store.add(scores[row:end], before=row)
            row = end
    return scores, kept


def _finite(scores: Scores, group: Group) -> Scores:
    if not np.isfinite(scores).all():
        raise UserError(f"the model's scores of group {group.id!r} are not finite")
    return scores


class _Store:
    """Scores on the disk: the key of what they belong to, then rows of float32, chunk by chunk.

    Args:
        path: The file. It stays, so that a finished run can be repeated without scoring.
        parts: What the scores depend on.
        names: The A attribute names.

    Attributes:
        kept: ``(R', A)`` scores of earlier runs.

    Raises:
        UserError: If the file holds scores of something else, or cannot be written.
    """

    def __init__(self, path: Path, parts: tuple[str, ...], names: tuple[str, ...]) -> None:
        key = hashlib.sha256(repr((parts, names)).encode()).digest()
        self._path, self._key_size, self._row_size = path, len(key), 4 * len(names)
        content = path.read_bytes() if path.exists() else b""
        if content[: len(key)] != key[: len(content)]:
            raise UserError(
                f"{path} holds scores of another model or other data: choose another run_dir, or "
                "remove that file"
            )
        rows = (len(content) - len(key)) // self._row_size if len(content) > len(key) else 0
        values = np.frombuffer(content, "<f4", rows * len(names), min(len(key), len(content)))
        self.kept: Scores = values.reshape(rows, len(names))
        self._key = key

    def __enter__(self) -> _Store:
        try:
            self._file = self._path.open("ab", buffering=0)
            if self._file.tell() < self._key_size:
                self._file.truncate(0)
                append(self._file, self._key)
        except OSError as error:
            raise self._error(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, scores: Scores, before: int) -> None:
        """Store a chunk for good.

        Args:
            scores: ``(r, A)``.
            before: Number of rows before it; what a killed run left behind them is dropped.
        """
        try:
            self._file.truncate(self._key_size + before * self._row_size)
            append(self._file, scores.astype("<f4").tobytes())
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self._path}: {reason(error)}")


def _show(console: Console, metrics: Mapping[str, Any]) -> None:
    table = named_table(f"scores of {metrics['responses']:,} responses", ["", "mean", "std"])
    for kind in ("attributes", "weightings"):
        for name, spread in metrics[kind].items():
            table.add_row(name, f"{spread['mean']:.3f}", f"{spread['std']:.3f}")
        table.add_section()
    console.print(table)
    for what in ("empty_responses", "unfinished_responses"):
        if metrics[what]:
            console.print(f"{metrics[what]:,} {what.replace('_', ' ')} among them")
