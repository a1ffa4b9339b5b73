"""Errors that a user can mend: printed without a traceback, with what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class UserError(Exception):
    """A mistake outside the code, told in full by its message.

    The command line prints the message alone and exits with ``exit_code``.
    """

    exit_code = 1


class ConfigError(UserError):
    """The configuration is wrong; the message lists every mistake found."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in one place of a data file.

    Attributes:
        file: Path of the file, or a Hub id with its split.
        line: 1-based line (row for Parquet), or None for the file as a whole.
        field: Name of the column, or None for the row as a whole.
        message: What is wrong and what was expected.
    """

    file: str
    line: int | None
    field: str | None
    message: str

    def __str__(self) -> str:
        """Render as ``file:line: field: message``, the form editors can jump to."""
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(filter(None, [place, self.field, self.message]))


class DataError(UserError):
    """Data files hold rows that cannot be used.

    Args:
        problems: Every problem found, in file order.
    """

    SHOWN = 20

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems[: self.SHOWN]]
        hidden = len(self.problems) - len(lines)
        if hidden > 0:
            lines.append(f"… and {hidden} more; `helpsteer2 data validate PATH` lists them all")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[DataError], tuple[tuple[Problem, ...]]]:
        """Pickle by the problems, so that the error survives the way back from a worker."""
        return DataError, (self.problems,)
