"""The one record of the project: a prompt with n responses, and what is known of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, TypedDict

from helpsteer2.errors import DataError, Problem

Role = Literal["system", "user", "assistant"]
Report = Callable[[Problem], None]


class Message(TypedDict):
    """One chat message."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with n responses (a row on disk).

    Attributes:
        id: Unique within its data set.
        source: Where it was read: ``file:line`` of its first row.
        prompt: Chat messages; the last one is from the user.
        responses: n texts.
        attributes: n × A ratings 0–4 in the order of the source's ``attribute_names``, None where
            unknown; None as a whole if nothing is rated.
        annotations: n × A × raters, the ratings of the single annotators; None if not known.
        preference_strength: −3 (the first of two responses is much better) … 3 (the second is);
            None if not known.
    """

    id: str
    source: str
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    attributes: tuple[tuple[float | None, ...], ...] | None = None
    annotations: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    preference_strength: int | None = None


class GroupSource(Protocol):
    """Where groups come from: a Hub data set, local files, or a generator."""

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the A rating columns of every group."""
        ...

    def read(self, split: str, report: Report) -> Iterator[Group]:
        """Stream the groups of a split in a fixed order, reporting every bad row."""
        ...

    def fingerprint(self, split: str) -> str:
        """Hash that changes whenever ``read`` would give something else."""
        ...


def read_all(source: GroupSource, split: str) -> Iterator[Group]:
    """Stream a split and refuse it at its end if any row was bad.

    Args:
        source: Where to read.
        split: ``train``, ``validation``, …

    Yields:
        The good groups, in order. Whatever the caller makes of them must be thrown away if this
        raises.

    Raises:
        DataError: After the last row, with every problem at once; also if there is no group.
    """
    problems: list[Problem] = []
    empty = True
    for group in source.read(split, problems.append):
        empty = False
        yield group
    if empty and not problems:
        place = str(getattr(source, "path", source))
        problems.append(Problem(place, None, None, f"no rows in {split!r}"))
    if problems:
        raise DataError(problems)
