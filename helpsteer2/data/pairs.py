"""Which groups a loss on pairs can use: two different responses, one of them preferred."""

from __future__ import annotations

import logging

import numpy as np

from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.errors import UserError

logger = logging.getLogger(__name__)


def decided_pairs(groups: TokenisedGroups, split: str) -> TokenisedGroups:
    """Keep the pairs of which one response is preferred; say and record how many others there were.

    A pair without a winner would take a place in a step and teach nothing. NeMo-Aligner keeps it,
    and its Bradley–Terry loss takes the second response for the better one.

    Args:
        groups: A split.
        split: Its name, for messages.

    Returns:
        The decided pairs. Their report has ``pairs_decided``, ``pairs_undecided`` (strength 0) and
        ``groups_without_preference`` (not known), the last two left out.

    Raises:
        UserError: If no preference is known, none has a winner, or a group with a preference has
            not two responses.
    """
    strength = groups.preference_strength
    unknown, undecided = np.isnan(strength), strength == 0
    if unknown.all():
        raise UserError(
            f"no group of the {split} data has a preference_strength, and none is made up from "
            "ratings: use data that have it, such as data=helpsteer2_preference, "
            "data=hh_rlhf or data=groups"
        )
    not_pairs = np.flatnonzero(~unknown & (groups.n_responses != 2))
    if len(not_pairs):
        first = int(not_pairs[0])
        raise UserError(
            f"group {groups.ids[first]!r} of the {split} data has a preference_strength and "
            f"{groups.n_responses[first]} responses: a preference is between two"
        )
    decided = np.flatnonzero(~unknown & ~undecided)
    counts = {
        "pairs_decided": len(decided),
        "pairs_undecided": int(undecided.sum()),
        "groups_without_preference": int(unknown.sum()),
    }
    if len(decided) == 0:
        raise UserError(
            f"every preference_strength of the {split} data ({counts['pairs_undecided']}) is 0, "
            "neither response is better: there is nothing to learn or to measure"
        )
    if len(decided) < len(groups):
        logger.info(
            "%s: %d decided pairs; %d without a winner (strength 0) and %d groups whose preference "
            "is not known are left out",
            split,
            *counts.values(),
        )
    return groups.select(decided, counts)


def different_pairs(groups: TokenisedGroups, split: str) -> TokenisedGroups:
    """Keep the pairs whose responses differ in their ids; say and record how many do not.

    A policy gives both responses of such a pair the same probability, whatever it learns. Limits of
    length can make one of texts that differ only where they were cut.

    Args:
        groups: A split of groups of two responses each.
        split: Its name, for messages.

    Returns:
        The others. Their report has ``pairs_of_equal_responses``.

    Raises:
        UserError: If none is left.
    """
    lengths = groups.response_lengths.reshape(-1, 2)
    different = np.ones(len(groups), dtype=bool)
    for i in np.flatnonzero(lengths[:, 0] == lengths[:, 1]):
        first, second = groups[int(i)].response_ids
        different[i] = not np.array_equal(first, second)
    n_equal = int((~different).sum())
    if n_equal == len(groups):
        raise UserError(
            f"both responses of every pair of the {split} data have the same ids, so there is "
            "nothing to learn or to measure: raise lengths.max_response_tokens if they were cut, "
            "or use other data"
        )
    if n_equal:
        logger.info(
            "%s: %d pairs are left out, their two responses have the same ids", split, n_equal
        )
    return groups.select(np.flatnonzero(different), {"pairs_of_equal_responses": n_equal})


def rewarded_pairs(groups: TokenisedGroups, split: str) -> TokenisedGroups:
    """Refuse pairs that do not bring the reward of both responses.

    Args:
        groups: A split of groups of two responses each.
        split: Its name, for messages.

    Returns:
        The same groups.

    Raises:
        UserError: If a reward is not known; the first such group is named.
    """
    lacking = np.flatnonzero(np.isnan(groups.rewards.reshape(-1, 2)).any(axis=1))
    if len(lacking):
        raise UserError(
            f"{len(lacking)} of {len(groups)} pairs of the {split} data lack the reward of a "
            f"response, which this loss needs (the first is {groups.ids[int(lacking[0])]!r}): make "
            "pairs that have it with helpsteer2 pairs by=scores or by=ratings, or use module=dpo"
        )
    return groups
