"""The rollouts of an iteration on the disk: groups anyone can open, and what training reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from helpsteer2.data.groups import Group, read_all
from helpsteer2.data.sources.group_files import GroupFiles
from helpsteer2.data.token_store import TokenisedGroups, open_store
from helpsteer2.data.tokens import RolloutTokens, TokenGroup
from helpsteer2.errors import UserError

GROUPS, TOKENS, COLUMNS, RECORD = "groups.jsonl", "tokens", "columns.npy", "record.json"

OF_TOKENS = ("logprobs", "ref_logprobs", "advantages", "counted", "values", "returns")
"""Columns of ``columns.npy``, of which the last two are there with a critic alone."""


def read_record(folder: Path) -> dict[str, Any]:
    """Read what a finished iteration is; see ``Rollouts.record``.

    Args:
        folder: Of the iteration.

    Raises:
        UserError: If there is no such file, or it is damaged.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / RECORD} cannot be read ({error}): restore it, or choose another run_dir"
        ) from error
    return record


class Rollouts:
    """One finished iteration; opening it costs no memory that grows with its size.

    The folder holds ``groups.jsonl`` (prompts with responses, ids, log-probabilities of the
    sampler, scores and rewards: ``data=groups data.path=FILE`` reads it), ``tokens`` and
    ``columns.npy`` (what training reads), and ``record.json``, which is written last.

    Args:
        folder: The folder.

    Attributes:
        record: What the iteration is: ``metrics``, ``kl_coefficient``, ``next_kl_coefficient``,
            ``rate_factor``, ``stops``, and ``seconds`` of its stages.
        lengths: ``(G,)`` int64, tokens of each group.

    Raises:
        UserError: If the folder is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = read_record(folder)
        try:
            self._columns = np.load(folder / COLUMNS, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} cannot be learned from ({error}): restore it") from error
        tokens = open_store(folder / TOKENS, TOKENS)
        if tokens is None:
            raise UserError(f"the tokens in {folder} are missing or damaged: restore them")
        self._tokens: TokenisedGroups = tokens
        self.lengths: npt.NDArray[np.int64] = tokens.lengths
        counts = tokens.n_responses
        in_groups = np.add.reduceat(tokens.response_lengths, np.cumsum(counts) - counts)
        self._starts = np.concatenate([[0], np.cumsum(in_groups)])

    @staticmethod
    def is_whole(folder: Path) -> bool:
        """Whether a folder holds a finished iteration."""
        return (folder / RECORD).is_file()

    @property
    def number(self) -> int:
        """0-based number of the iteration."""
        return int(self.folder.name.rpartition("_")[2])

    @property
    def metrics(self) -> Mapping[str, float]:
        """Figures of the iteration, by name."""
        metrics: dict[str, float] = self.record["metrics"]
        return metrics

    def __len__(self) -> int:
        """Number of groups, G."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenGroup:
        """A group with the columns of its response tokens, as copies in memory."""
        rows = self._columns[self._starts[index] : self._starts[index + 1]]
        columns = {name: np.array(rows[:, i]) for i, name in enumerate(self.names)}
        columns["counted"] = columns["counted"] > 0
        return replace(self._tokens[index], rollout=RolloutTokens(**columns))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns of the tokens."""
        return OF_TOKENS[: self._columns.shape[1]]

    def groups(self) -> Iterator[Group]:
        """The groups as text, with scores and rewards."""
        return read_all(GroupFiles(str(self.folder / GROUPS)), "train")
