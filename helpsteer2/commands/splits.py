"""Files of groups that a command makes, one a split: all of them, or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from helpsteer2.data.groups import Group
from helpsteer2.data.rows import SPLITS
from helpsteer2.data.sources.group_files import write_groups


def write_splits(folder: Path, splits: Mapping[str, Iterable[Group]], names: Sequence[str]) -> None:
    """Put the files of all splits in place once each is whole; those of other splits go.

    Args:
        folder: Where ``train.jsonl``, ``validation.jsonl``, … stand.
        splits: The groups of each, streamed.
        names: Names of their A ratings.

    Raises:
        UserError: If a file cannot be written. Whatever the streams raise is raised as well; the
            files that were there stay then.
    """
    aside = {split: folder / f".{split}.jsonl" for split in splits}
    try:
        for split, groups in splits.items():
            write_groups(aside[split], groups, names)
        for split, path in aside.items():
            path.replace(folder / f"{split}.jsonl")
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)
    for split in set(SPLITS).difference(splits):  # it would be of other settings
        (folder / f"{split}.jsonl").unlink(missing_ok=True)
