"""``helpsteer2 label``: attribute labels for responses, or for prompts that shall be answered."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from rich.console import Console
from rich.table import Table

from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.commands.splits import write_splits
from helpsteer2.data.groups import Group, GroupSource, read_all, read_prompts
from helpsteer2.data.labelling import By, LabelCounts, LabelDistribution, ResponseLabels
from helpsteer2.data.labels import HIGHEST, LOWEST, AttributeLabel
from helpsteer2.errors import UserError
from helpsteer2.evaluation.report import named_table
from helpsteer2.records import environment

_OF_RESPONSES = ("scores", "ratings")
"""Ways in which responses get labels; in the others prompts do."""


def label(
    run_dir: str,
    data: GroupSource,
    splits: Sequence[str],
    by: By,
    names: Sequence[str] | None,
    labels: GroupSource | None,
    labels_split: str,
    steering: Mapping[str, int] | None,
    seed: int,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write groups with labels, a file a split.

    By scores or ratings every response gets the label of its own: data for ``module=sft``. By
    distribution or fixed every prompt gets one for a policy to answer by: data for
    ``helpsteer2 sample``. These groups have no responses, whatever the data have.

    Args:
        run_dir: Folder of the groups (``train.jsonl``, ``validation.jsonl``), which is data for
            ``data=groups``, and of the record (``result.json``).
        data: Groups of n responses, or prompts.
        splits: The splits of them to read.
        by: ``scores`` (made by ``helpsteer2 annotate``; they have to be ratings, so those of a
            regression reward model), ``ratings`` of the data, ``distribution`` (drawn from
            ``labels``) or ``fixed`` (``steering`` for all).
        names: Attributes of the labels; None takes all that there are.
        labels: By distribution: groups whose labels are drawn, each as often as it has responses.
        labels_split: The split of them, for all splits of the data.
        steering: By fixed: the rating asked for by attribute, whole numbers 0–4.
        seed: By distribution: seed of the draws. A prompt's label depends on it and on the id of
            its group alone.
        config: The whole configuration, kept in the result.

    Raises:
        DataError: If a row of the data or of the labels is bad.
        UserError: If settings are missing or do not go together, no label is left of a split, what
            a label needs is not in the data, another process uses the folder, or it cannot be
            written. Groups of an earlier run stay then.
    """
    started, start = datetime.now(timezone.utc), time.monotonic()
    _check_settings(splits, by, names, labels, steering)
    folder = RunFolder(run_dir)
    counts = {split: LabelCounts() for split in splits}
    with folder.locked("label"):
        distribution = _distribution(by, names, labels, labels_split, steering)

        def made(split: str) -> Iterator[Group]:
            of = counts[split]
            if by == "scores" or by == "ratings":
                groups = read_all(data, split)
                yield from ResponseLabels(by, names).labelled(groups, data.attribute_names, of)
            elif distribution is not None:
                yield from distribution.labelled(read_prompts(data, split), seed, of)
            if not of.labelled_groups:
                raise UserError(
                    f"no label is left of the split {split!r}: of its {of.responses:,} responses "
                    f"{of.unknown:,} lack a rating that the label needs"
                )

        write_splits(folder.path, {split: made(split) for split in splits}, data.attribute_names)
        folder.write_result(
            {
                "kind": "label",
                "metrics": {split: of.record() for split, of in counts.items()},
                "fingerprints": {split: data.fingerprint(split) for split in splits},
                "labels_fingerprint": None if labels is None else labels.fingerprint(labels_split),
                "config": config,
                "environment": environment(),
                "started": started.isoformat(timespec="seconds"),
                "wall_seconds": round(time.monotonic() - start, 3),
            }
        )
    _show(Console(), counts, by)
    written = ", ".join(f"{split}.jsonl" for split in splits)
    Console().print(f"wrote {written} in {folder.path}", soft_wrap=True)


def _check_settings(
    splits: Sequence[str],
    by: By,
    names: Sequence[str] | None,
    labels: GroupSource | None,
    steering: Mapping[str, int] | None,
) -> None:
    """Refuse what is missing, and what would be without effect."""
    if not splits:
        raise UserError("splits is empty: name at least one, splits=[train] for example")
    if by == "distribution" and labels is None:
        raise UserError(
            "by=distribution draws from the labels of other groups: data@labels=groups "
            "labels.path=FILE"
        )
    if by == "fixed" and not steering:
        raise UserError("by=fixed needs the label: steering={helpfulness: 4, verbosity: 2}")
    for key, given, used_by in (
        ("labels", labels is not None, ("distribution",)),
        ("steering", steering is not None, ("fixed",)),
        ("names", names is not None, ("scores", "ratings", "distribution")),
    ):
        if given and by not in used_by:
            raise UserError(f"{key} is for by={' or by='.join(used_by)}, and this is by={by}")


def _distribution(
    by: By,
    names: Sequence[str] | None,
    labels: GroupSource | None,
    labels_split: str,
    steering: Mapping[str, int] | None,
) -> LabelDistribution | None:
    """What the labels of prompts are drawn from; None where responses get theirs."""
    if by == "fixed" and steering is not None:
        try:
            return LabelDistribution((AttributeLabel.of(steering),), (1,))
        except UserError as error:
            raise UserError(f"steering: {error}") from error
    if by == "distribution" and labels is not None:
        return LabelDistribution.of(read_all(labels, labels_split), names)
    return None


def _show(console: Console, counts: Mapping[str, LabelCounts], by: By) -> None:
    """Print a table a split, and what else was counted."""
    for split, of in counts.items():
        console.print(levels_table(of, split, by))
        what = "responses" if by in _OF_RESPONSES else "prompts"
        console.print(
            f"{of.labels.total():,} {what} in {of.labelled_groups:,} groups, {len(of.labels):,} "
            "different labels"
        )
        if of.unknown:
            console.print(f"{of.unknown:,} responses left out: a rating is unknown")
        if of.unlabelled_answers:
            console.print(
                f"{of.unlabelled_answers:,} answers inside prompts are learned without a label: "
                "data=each_answer data@data.of=NAME makes each a group of its own"
            )


def levels_table(counts: LabelCounts, split: str, by: By) -> Table:
    """How often each level of each attribute is asked for, a row an attribute.

    Args:
        counts: What became of the groups.
        split: Their split.
        by: Where the labels come from.
    """
    levels = list(range(LOWEST, HIGHEST + 1))
    table = named_table(
        f"labels of {split!r} by {by}",
        ["attribute", *map(str, levels), "mean", *(["clipped"] if by == "scores" else [])],
    )
    for name, numbers in counts.values().items():
        mean = sum(map(int.__mul__, levels, numbers)) / sum(numbers)
        clipped = [f"{counts.clamped[name]:,}"] if by == "scores" else []
        table.add_row(name, *(f"{number:,}" for number in numbers), f"{mean:.2f}", *clipped)
    return table
