"""What every source that reads rows has in common."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from helpsteer2.data.checks import check_columns
from helpsteer2.data.groups import Group, Report
from helpsteer2.data.rows import Part, Row, digest_part, read_part

SCHEMA_VERSION = 1
"""Raised whenever the same files would give other groups than before."""

MAX_CHARACTERS = 1_000_000
"""Longest text taken by default; a longer one is damage far more often than data."""


class RowSource(ABC):
    """A source that turns rows into groups. Subclasses are dataclasses.

    Attributes:
        path: A Hub id, a folder, or a file.
        max_characters: Longest prompt or response taken.
    """

    path: str
    max_characters: int

    @property
    @abstractmethod
    def schema(self) -> str:
        """Schema of the rows, a key of ``checks.SCHEMAS``."""

    @property
    @abstractmethod
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the A rating columns of every group."""

    @abstractmethod
    def groups(self, rows: Iterable[Row], split: str, report: Report) -> Iterator[Group]:
        """Make the groups of a split from its rows.

        Args:
            rows: What ``rows`` gave for the same split.
            split: ``train``, ``validation``, …
            report: Called with every problem.

        Yields:
            The good groups, in order.
        """

    def parts(self, split: str) -> tuple[Part, ...]:
        """Tables that a split is made of: the one whose rows are read, then any it depends on."""
        return (Part(stem=split, hub_split=split),)

    def rows(self, split: str, report: Report) -> Iterator[Row]:
        """Stream the rows of a split, refusing a file of another schema as a whole."""
        return check_columns(
            read_part(self.path, self.parts(split)[0], report), self.schema, report
        )

    def read(self, split: str, report: Report) -> Iterator[Group]:
        """Stream the groups of a split in a fixed order, reporting every bad row.

        Args:
            split: ``train``, ``validation``, …
            report: Called with every problem.

        Yields:
            The good groups; memory does not grow with their number.

        Raises:
            UserError: If there is nothing at ``path``, or the Hub cannot be reached.
        """
        return self.groups(self.rows(split, report), split, report)

    def prompts(self, split: str, report: Report) -> Iterator[Group]:
        """Stream the prompts of a split for sampling: those of its groups, unless overridden.

        Args:
            split: ``train``, ``validation``, …
            report: Called with every problem.

        Yields:
            Groups, whose responses are not looked at.

        Raises:
            UserError: As ``read`` does.
        """
        return self.read(split, report)

    def fingerprint(self, split: str) -> str:
        """Hash of everything that ``read`` depends on: content, settings, and schema version.

        The path is left out: a moved or copied file keeps its fingerprint.

        Args:
            split: ``train``, ``validation``, …

        Returns:
            A hexadecimal SHA-256.

        Raises:
            UserError: If the data cannot be found.
        """
        names = list(self.attribute_names)
        settings = [SCHEMA_VERSION, self.schema, names, split, self.max_characters]
        contents = [digest_part(self.path, part) for part in self.parts(split)]
        return hashlib.sha256(json.dumps([*settings, *contents]).encode()).hexdigest()


def group_id(split: str, number: int) -> str:
    """Id of the ``number``-th group of a split; unique over the splits of a data set."""
    return f"{split}-{number}"


def place(row: Row) -> str:
    """``file:line`` of a row."""
    return f"{row.file}:{row.line}"
