"""Which groups a loss on pairs can use: two responses, one of them preferred."""

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
