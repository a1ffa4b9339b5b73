"""A source that holds the groups it is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from helpsteer2.data.groups import Group, Report


@dataclass(frozen=True)
class GivenGroups:
    """The same groups in every split."""

    groups: tuple[Group, ...]
    attribute_names: tuple[str, ...] = ()

    def read(self, split: str, report: Report) -> Iterator[Group]:
        yield from self.groups

    def fingerprint(self, split: str) -> str:
        return str(hash(str(self.groups)))
