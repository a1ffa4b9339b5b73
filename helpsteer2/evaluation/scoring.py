"""One scoring pass: groups in, scores out, kept in the run folder and read again by key."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from helpsteer2.attributes import AttributeWeights
from helpsteer2.data.groups import Group
from helpsteer2.errors import UserError
from helpsteer2.evaluation.meaning import OWN_REWARD, ScoreMeaning, single_score
from helpsteer2.records import write_atomic
from helpsteer2.rewards.rewarder import Scorer, Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MIB = 1 << 20

ModelKind = Literal["reward model", "policy"]


@dataclass(frozen=True)
class EvaluationContext:
    """What every evaluator of a run shares.

    Attributes:
        weightings: Weightings that make one reward of the scores.
        scores_dir: Folder that keeps the scores.
        model_key: Hash of the model and of all that its scores depend on; None if it is not known,
            and then nothing kept is read again.
        seed: Seed of the bootstrap.
        console: Where progress is shown.
        meaning: What the model's scores mean.
    """

    weightings: tuple[AttributeWeights, ...]
    scores_dir: Path
    model_key: str | None
    seed: int
    console: Console
    meaning: ScoreMeaning = field(default_factory=ScoreMeaning)


class Evaluator(Protocol):
    """One benchmark."""

    takes: ClassVar[ModelKind]
    """What kind of model it evaluates: a ``Scorer``, or an ``EvaluatedPolicy``."""

    def check(self) -> None:
        """Read all rows, for the models to come: a bad one is told before any model is loaded."""
        ...

    def evaluate(self, model: Any, /, context: EvaluationContext) -> dict[str, Any]:
        """Run the model once and compute every figure, as plain data with a ``fingerprint``."""
        ...

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Show a result of ``evaluate`` within 100 columns."""
        ...

    def headlines(self, result: Mapping[str, Any]) -> dict[str, str]:
        """The main figures of a result of ``evaluate`` as text, by name; for several models."""
        ...


@runtime_checkable
class Plotted(Protocol):
    """An evaluator with plots."""

    def figures(self, results: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Figure]:
        """Plots of the results of one or more models, by file name without suffix."""
        ...


@runtime_checkable
class Paired(Protocol):
    """An evaluator that tells the paired differences of several models."""

    def gains(self, results: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
        """What the own reward of each model but the first gains on the first, by model."""
        ...


def told_together(*readings: Callable[[], object]) -> None:
    """Run all readings, and tell whatever is wrong with any of them at once.

    Raises:
        UserError: With the message of each that failed; the very error if it is one alone.
    """
    errors: list[UserError] = []
    for read in readings:
        try:
            read()
        except UserError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        # Evaluators may share a file, and its rows are bad for each of them.
        raise UserError("\n".join(dict.fromkeys(map(str, errors))))


@dataclass(frozen=True)
class UsableWeightings:
    """The weightings that a model's attributes allow.

    Attributes:
        weightings: Those that can be computed.
        skipped: Why each of the others cannot, by name.
    """

    weightings: tuple[AttributeWeights, ...]
    skipped: dict[str, str]


def usable_weightings(
    weightings: Iterable[AttributeWeights], attribute_names: tuple[str, ...]
) -> UsableWeightings:
    """Choose the weightings that a model can be judged by.

    A model with a single score is judged by that score as well, whatever its name.

    Args:
        weightings: The weightings asked for.
        attribute_names: Names of the model's scores.

    Returns:
        Those that can be computed and why the others cannot.

    Raises:
        UserError: If two weightings have one name, or none can be computed.
    """
    found = _fitting(weightings, attribute_names)
    if len(attribute_names) == 1 and not found.weightings:
        return replace(found, weightings=(single_score(attribute_names),))
    return _any_of(found)


def model_weightings(
    context: EvaluationContext, attribute_names: tuple[str, ...]
) -> UsableWeightings:
    """All weightings that a model is evaluated under: ``OWN_REWARD``, then those asked for.

    Args:
        context: The weightings asked for, and what the model tells of its scores.
        attribute_names: Names of the model's scores.

    Returns:
        Those that can be computed and why the others cannot.

    Raises:
        UserError: If two weightings have one name, or none can be computed.
    """
    own = context.meaning.own_weights(attribute_names)
    first = () if own is None else (replace(own, name=OWN_REWARD),)
    return _any_of(_fitting((*first, *context.weightings), attribute_names))


def _fitting(
    weightings: Iterable[AttributeWeights], attribute_names: tuple[str, ...]
) -> UsableWeightings:
    """The weightings whose attributes the model scores."""
    usable: dict[str, AttributeWeights] = {}
    skipped: dict[str, str] = {}
    for weights in weightings:
        if weights.name in usable or weights.name in skipped:
            raise UserError(f"two weightings are named {weights.name!r}: rename one")
        try:
            weights.vector(attribute_names)
        except UserError as error:
            skipped[weights.name] = str(error)
        else:
            usable[weights.name] = weights
    return UsableWeightings(tuple(usable.values()), skipped)


def _any_of(found: UsableWeightings) -> UsableWeightings:
    """Refuse a model that no weighting fits."""
    if not found.weightings:
        raise UserError("no weighting fits the model:\n" + "\n".join(found.skipped.values()))
    return found


def score_groups(
    name: str,
    data_key: str,
    groups: Callable[[], Iterable[Group]],
    sizes: npt.NDArray[np.int64],
    scorer: Scorer,
    context: EvaluationContext,
) -> Scores:
    """Score every group once, or read the scores of an earlier run of the same model and data.

    Args:
        name: Name of the file that keeps the scores; also shown beside the progress bar.
        data_key: Hash of the texts to score.
        groups: Opens the stream of groups.
        sizes: ``(G,)`` number of responses of each group.
        scorer: The model.
        context: Where scores are kept, and under which key.

    Returns:
        ``(R, A)`` float32 scores of all responses, group by group.

    Raises:
        UserError: If a score is not finite, or the scores cannot be written.
    """
    path = context.scores_dir / f"{name}.npz"
    key = None if context.model_key is None else _digest(context.model_key, data_key)
    shape = (int(sizes.sum()), len(scorer.attribute_names))
    kept = _read_scores(path, key, shape)
    if kept is not None:
        context.console.print(f"{name}: scores of an earlier run of this model, from {path}")
        return kept
    scores = _score(name, groups, sizes, scorer, context.console)
    _write_scores(path, key, scores, sizes, scorer.attribute_names)
    return scores


def _score(
    name: str,
    groups: Callable[[], Iterable[Group]],
    sizes: npt.NDArray[np.int64],
    scorer: Scorer,
    console: Console,
) -> Scores:
    """Run the model over all groups behind a progress bar."""
    scores = np.empty((int(sizes.sum()), len(scorer.attribute_names)), dtype=np.float32)
    done = row = 0
    with group_progress(console) as progress:
        task = progress.add_task(name, total=len(sizes))
        for of_group in scorer.score(groups()):
            if done == len(sizes) or of_group.shape != (sizes[done], scores.shape[1]):
                raise ValueError(f"group {done}: the scorer gave shape {of_group.shape}")
            if not np.isfinite(of_group).all():
                raise UserError(f"{name}: the model's scores of group {done + 1} are not finite")
            scores[row : row + len(of_group)] = of_group
            row, done = row + len(of_group), done + 1
            progress.advance(task)
    if done != len(sizes):
        raise ValueError(f"the scorer gave {done} of {len(sizes)} groups")
    return scores


def group_progress(console: Console) -> Progress:
    """A progress bar that counts groups, with their speed and the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _GroupsPerSecond(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


class _GroupsPerSecond(ProgressColumn):
    """Speed of the pass."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("– groups/s" if speed is None else f"{speed:.1f} groups/s")


def _read_scores(path: Path, key: str | None, shape: tuple[int, int]) -> Scores | None:
    """Scores kept under the key, None if there are none."""
    if key is None or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["key"]) != key or kept["scores"].shape != shape:
                return None
            return np.asarray(kept["scores"], dtype=np.float32)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        # A damaged file costs one more pass, nothing else.
        return None


def _write_scores(
    path: Path,
    key: str | None,
    scores: Scores,
    sizes: npt.NDArray[np.int64],
    attribute_names: tuple[str, ...],
) -> None:
    """Keep the scores with the key that they are found by."""

    def write(file: BinaryIO) -> None:
        np.savez(
            file,
            key=np.array(key or ""),
            scores=scores,
            group_sizes=sizes,
            attribute_names=np.array(attribute_names),
        )

    write_atomic(path, write)


def model_key(path: str, **settings: str) -> str | None:
    """Hash of a model folder and of the settings that its scores depend on.

    Small files are read in full. Of a large one (weights) the size, the time of its last change,
    and its first and last MiB are read, so that the key of a 70B model takes a moment.

    Args:
        path: The model.
        **settings: Whatever else changes scores, such as the dtype.

    Returns:
        The hash; None if the model is no local folder, as a Hub id does not fix its weights.
    """
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        return None
    hashed = hashlib.sha256(repr(sorted(settings.items())).encode())
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        status = file.stat()
        hashed.update(repr((str(file.relative_to(folder)), status.st_size)).encode())
        with file.open("rb") as stream:
            hashed.update(stream.read(_MIB))
            if status.st_size > _MIB:
                stream.seek(-_MIB, os.SEEK_END)
                hashed.update(stream.read())
                hashed.update(str(status.st_mtime_ns).encode())
    return hashed.hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
