"""Cross-validation: the splits of another source, cut again by prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from helpsteer2.data.groups import Group, GroupSource, Message, Report
from helpsteer2.errors import UserError


@dataclass(frozen=True)
class PromptFolds:
    """One of several cuts of a data set into ``train`` and ``validation``.

    A group's fold is decided by the hash of its prompt alone. So groups with the same prompt are
    never on both sides, and adding or removing groups moves no other one. Every group is in
    ``validation`` of exactly one fold.

    Args:
        of: Where the groups come from.
        splits: Splits of ``of`` that are put together, in this order.
        folds: Number of folds, at least 2.
        fold: The fold that is ``validation``, from 0.

    Raises:
        UserError: If ``folds`` or ``fold`` is out of range, or ``splits`` is empty.
    """

    of: GroupSource
    splits: list[str]
    folds: int
    fold: int

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise UserError(f"folds must be at least 2, got {self.folds}")
        if not 0 <= self.fold < self.folds:
            raise UserError(f"fold must be from 0 to {self.folds - 1}, got {self.fold}")
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise UserError(
                f"splits must name at least one split, each once, got {list(self.splits)}"
            )

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the source's attributes."""
        return self.of.attribute_names

    def read(self, split: str, report: Report) -> Iterator[Group]:
        """Stream the groups of ``train`` or ``validation``, reporting every bad row.

        Args:
            split: ``train`` or ``validation``.
            report: Called with every problem, also of rows on the other side.

        Yields:
            The groups in the source's order.

        Raises:
            UserError: If ``split`` is another one.
        """
        return self._side(split, report, self.of.read)

    def prompts(self, split: str, report: Report) -> Iterator[Group]:
        """Stream the prompts of ``train`` or ``validation``, as ``read`` streams the groups."""
        return self._side(split, report, self.of.prompts)

    def fingerprint(self, split: str) -> str:
        """Hash of the source's content and of the cut."""
        self._held_out(split)
        parts = [self.of.fingerprint(part) for part in self.splits]
        cut = json.dumps(["folds", split, self.folds, self.fold, *parts])
        return hashlib.sha256(cut.encode()).hexdigest()

    def _side(
        self, split: str, report: Report, read: Callable[[str, Report], Iterator[Group]]
    ) -> Iterator[Group]:
        """Of what ``read`` streams, the groups of one side."""
        held_out = self._held_out(split)
        for part in self.splits:
            for group in read(part, report):
                if (fold_of(group.prompt, self.folds) == self.fold) == held_out:
                    yield group

    def _held_out(self, split: str) -> bool:
        if split not in ("train", "validation"):
            raise UserError(f"folds have the splits 'train' and 'validation', not {split!r}")
        return split == "validation"


def fold_of(prompt: tuple[Message, ...], folds: int) -> int:
    """Fold of a prompt: its hash modulo the number of folds."""
    text = json.dumps([[message["role"], message["content"]] for message in prompt])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % folds
