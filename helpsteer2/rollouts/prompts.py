"""The prompts of on-policy training, and which of them an iteration answers."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from helpsteer2.data.chat import BoundChat
from helpsteer2.data.groups import Group, GroupSource, read_prompts, unmarked
from helpsteer2.errors import UserError

logger = logging.getLogger(__name__)

SHOWN = 5
"""Ids of prompts that a warning names."""


@dataclass(frozen=True)
class Prompts:
    """Prompts in seeded order: every pass over them is another permutation.

    An iteration takes the next so many of a pass; what is left over at the end of one is left out,
    so that no iteration has a prompt twice.

    Args:
        groups: All of them.
        per_iteration: How many an iteration takes.
        seed: Seed of the permutations.

    Raises:
        UserError: If there are fewer than an iteration takes.
    """

    groups: Sequence[Group]
    per_iteration: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.groups) < self.per_iteration:
            raise UserError(
                f"there are {len(self.groups)} prompts, fewer than rollouts.prompts="
                f"{self.per_iteration} of an iteration: lower it"
            )

    @property
    def iterations_per_pass(self) -> int:
        """Iterations in a pass over the prompts."""
        return len(self.groups) // self.per_iteration

    def of_iteration(self, iteration: int) -> list[Group]:
        """The prompts of an iteration, in order.

        Args:
            iteration: 0-based.
        """
        number, place = divmod(iteration, self.iterations_per_pass)
        first = place * self.per_iteration
        order = _permutation(self.seed, number, len(self.groups))
        return [self.groups[i] for i in order[first : first + self.per_iteration]]


@lru_cache(maxsize=2)
def _permutation(seed: int, number: int, n: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, number]).permutation(n).tolist()
    return order


@dataclass(frozen=True)
class PromptReport:
    """What was read.

    Attributes:
        prompts: Prompts that are used.
        prompts_too_long: Those that were left out.
        longest_prompt_tokens: Tokens of the longest one that is used, its label included.
        label_attributes: What the labels behind them are of; none without any label.
        fingerprint: Hash of the used ones, and of what their ids mean.
    """

    prompts: int
    prompts_too_long: int
    longest_prompt_tokens: int
    label_attributes: tuple[str, ...]
    fingerprint: str


def read_training_prompts(
    source: GroupSource, chat: BoundChat, max_prompt_tokens: int
) -> tuple[list[Group], PromptReport]:
    """Read the prompts of ``train``, without those that are too long.

    Args:
        source: Where they are; responses and ratings are not looked at.
        chat: The policy's.
        max_prompt_tokens: Longest prompt.

    Raises:
        DataError: If a row is bad.
        UserError: If two prompts have the same id, or none is short enough.
    """
    fitting: list[Group] = []
    too_long, longest = [], 0
    labels: tuple[str, ...] = ()
    seen = set()
    hashed = hashlib.sha256(chat.ids_hash.encode())
    for group in read_prompts(source, "train"):
        if group.id in seen:
            raise UserError(f"two prompts have the id {group.id!r}, and samples go by it")
        seen.add(group.id)
        if len(chat.prompt_ids(group.prompt)) > max_prompt_tokens:
            too_long.append(group.id)
            continue
        ids = chat.prompt_ids(group.prompt, group.label)
        longest = max(longest, len(ids))
        names = () if group.label is None else group.label.names
        if fitting and names != labels:
            raise UserError(
                f"{group.source}: its label is of {', '.join(names) or 'nothing'}, that of the "
                f"prompts before it of {', '.join(labels) or 'nothing'}: give all the same"
            )
        labels = names
        # What is marked in the prompt's data has no place in the groups that are made of it.
        kept = Group(group.id, group.source, unmarked(group).prompt, (), label=group.label)
        fitting.append(kept)
        hashed.update(repr((group.id, ids)).encode())
    if not fitting:
        raise UserError(
            f"none of the {len(too_long)} prompts has {max_prompt_tokens} tokens or fewer: raise "
            "lengths.max_prompt_tokens"
        )
    if too_long:
        logger.warning(
            "%d of %d prompts are longer than lengths.max_prompt_tokens=%d and left out (%s)",
            *(len(too_long), len(too_long) + len(fitting), max_prompt_tokens),
            ", ".join(too_long[:SHOWN]) + (", …" if len(too_long) > SHOWN else ""),
        )
    fingerprint = hashed.hexdigest()
    return fitting, PromptReport(len(fitting), len(too_long), longest, labels, fingerprint)
