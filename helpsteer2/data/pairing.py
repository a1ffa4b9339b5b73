"""Preference pairs from groups: by their ratings, their preferences, or the scores of a model.

arXiv 2406.08673, section 4.3, makes 7,221 pairs of the 10,162 of HelpSteer2's train split: the
response with the higher helpfulness is chosen, ties are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from helpsteer2.attributes import AttributeWeights
from helpsteer2.data.groups import Group
from helpsteer2.errors import UserError

By = Literal["ratings", "preference", "scores"]

STRONGEST = 3
"""Largest preference strength."""

DECIMALS = 9
"""Of a reward."""

_OF_RESPONSES = (
    "responses", "attributes", "annotations", "response_ids", "finish_reasons", "logprobs",
    "scores", "rewards",
)  # fmt: skip
"""Columns of a group with one entry a response."""


@dataclass
class PairCounts:
    """What became of the groups. Each is counted once, beside the texts dropped inside it.

    Attributes:
        groups: Groups read: the sum of the next five.
        pairs: Groups of which a pair was made.
        ties: Whose responses are all worth the same.
        below_min_gap: Whose best and worst response differ by too little.
        one_response: With fewer than two different responses.
        unknown: With fewer than two different responses whose worth is known: the ratings, scores
            or preference are missing.
        duplicate_texts: Responses left out because the group has their text already.
    """

    groups: int = 0
    pairs: int = 0
    ties: int = 0
    below_min_gap: int = 0
    one_response: int = 0
    unknown: int = 0
    duplicate_texts: int = 0


@dataclass(frozen=True)
class Pairing:
    """Makes a pair of each group: the best response against the worst.

    Args:
        by: What decides: ``ratings`` (the groups' attributes) or ``scores`` (a reward model's),
            weighted to one reward, or ``preference`` (the groups' own, of two responses).
        weights: Weighting of ratings or scores. The score of a model that gives a single one is
            its reward, whatever its name.
        min_gap: Smallest difference between the rewards of a pair, in their unit; by preference,
            the smallest strength. Equal rewards are never a pair.

    Raises:
        UserError: If the gap is negative or not finite.
    """

    by: By
    weights: AttributeWeights
    min_gap: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_gap < math.inf:
            raise UserError(f"min_gap has to be 0 or more, got {self.min_gap}")

    def pairs(
        self, groups: Iterable[Group], attribute_names: Sequence[str], counts: PairCounts
    ) -> Iterator[Group]:
        """Stream the pairs.

        Args:
            groups: Prompts with n responses each.
            attribute_names: Names of their A ratings.
            counts: Told what became of each group.

        Yields:
            Groups of two different responses in the order they came in, with whatever was known of
            them. Their ``preference_strength`` is below 0 if the first is the better one: ±1 by
            scores; by ratings the difference in rating points (weighted mean, weights taken as
            positive), rounded, 1 to 3. By ratings and scores ``rewards`` holds both rewards.

        Raises:
            UserError: If the weighting names an attribute that the groups lack, or a preference is
                not between two responses.
        """
        if self.by == "ratings":
            self._weighing(attribute_names)  # before the first group is read
        for group in groups:
            counts.groups += 1
            different = _different(group)
            counts.duplicate_texts += len(group.responses) - len(different)
            if len(different) < 2:
                counts.one_response += 1
            elif self.by == "preference":
                yield from self._preferred(group, counts)
            else:
                yield from self._best_and_worst(group, different, attribute_names, counts)

    def _preferred(self, group: Group, counts: PairCounts) -> Iterator[Group]:
        """The group itself, if it has a winner."""
        strength = group.preference_strength
        if strength is None:
            counts.unknown += 1
            return
        if len(group.responses) != 2:
            raise UserError(
                f"{group.source}: a preference_strength and {len(group.responses)} responses: a "
                "preference is between two"
            )
        if self._counts_as_pair(abs(strength), counts):
            yield group

    def _best_and_worst(
        self,
        group: Group,
        different: Sequence[int],
        attribute_names: Sequence[str],
        counts: PairCounts,
    ) -> Iterator[Group]:
        """The responses of the highest and the lowest reward; the first ones of equals."""
        rewards = self._rewards(group, different, attribute_names)
        if len(rewards) < 2:
            counts.unknown += 1
            return
        best, worst = max(rewards, key=rewards.__getitem__), min(rewards, key=rewards.__getitem__)
        gap = round(rewards[best] - rewards[worst], DECIMALS)
        if not self._counts_as_pair(gap, counts):
            return
        kept = sorted((best, worst))
        strength = self._strength(gap)
        yield replace(
            with_responses(group, kept),
            preference_strength=-strength if best == kept[0] else strength,
            rewards=tuple(rewards[i] for i in kept),
        )

    def _counts_as_pair(self, gap: float, counts: PairCounts) -> bool:
        if gap == 0:
            counts.ties += 1
        elif gap < self.min_gap:
            counts.below_min_gap += 1
        else:
            counts.pairs += 1
            return True
        return False

    def _rewards(
        self, group: Group, different: Sequence[int], attribute_names: Sequence[str]
    ) -> dict[int, float]:
        """Reward by position, of those responses of which all that weighs anything is known."""
        rows: Sequence[Sequence[float | None]] | None = group.attributes
        names = attribute_names
        if self.by == "scores":
            rows, names = group.scores, group.score_names or ()
        if rows is None:
            return {}
        weighing = self._weighing(names)
        rewards = {}
        for i in different:
            products = [w * value for k, w in weighing if (value := rows[i][k]) is not None]
            if len(products) == len(weighing):
                # Rounding noise shall not tell apart what is worth the same.
                rewards[i] = round(math.fsum(products), DECIMALS)
        return rewards

    def _weighing(self, names: Sequence[str]) -> list[tuple[int, float]]:
        """Column and weight of every attribute that weighs anything."""
        weights = {name: float(weight) for name, weight in self.weights.values.items() if weight}
        if self.by == "scores" and len(names) == 1:
            weights = {names[0]: 1.0}
        lacking = [name for name in weights if name not in names]
        if lacking:
            raise UserError(
                f"weights {self.weights.name!r} need {', '.join(lacking)}, but the {self.by} of "
                f"the data are of {', '.join(names) or 'nothing'}: choose another weighting "
                "(weights=…) or other data"
            )
        return [(names.index(name), weight) for name, weight in weights.items()]

    def _strength(self, gap: float) -> int:
        """How much better the better response is, 1 to 3."""
        if self.by == "scores":
            return 1
        points = gap / math.fsum(map(abs, self.weights.values.values()))
        return min(STRONGEST, max(1, math.floor(points + 0.5)))


def with_responses(group: Group, kept: Sequence[int]) -> Group:
    """A group with some of its responses.

    Args:
        group: A prompt with n responses.
        kept: Their positions, in the order wanted.

    Returns:
        The group with those responses and all that is known of them, without its preference.
    """
    columns = {name: getattr(group, name) for name in _OF_RESPONSES}
    selected: dict[str, Any] = {
        name: None if column is None else tuple(column[i] for i in kept)
        for name, column in columns.items()
    }
    return replace(group, **selected, preference_strength=None)


def _different(group: Group) -> list[int]:
    """Positions of the responses whose text was not there before."""
    first: dict[str, int] = {}
    for position, text in enumerate(group.responses):
        first.setdefault(text, position)
    return list(first.values())
