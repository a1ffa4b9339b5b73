"""Simulated annotators, and the panels of HelpSteer2 and HelpSteer2-Preference.

Everybody on a panel rates all responses of a prompt. Each attribute is seen through the rater's
bias, taste and noise, and helpfulness also decides which response is preferred.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES, RATING_MAX, RATING_MIN
from helpsteer2.functional.agreement import (
    ADDED_RATERS,
    FIRST_RATERS,
    LARGEST_SPREAD,
    aggregate_preference,
    aggregate_ratings,
    most_agreeing,
    spread,
)

REJECTED_SHARE = 0.25
"""Share of the added raters whose work fails review. With all five there, the closest three of
them never differ by more than 2 on a scale of 0–4, and no prompt would ever be left out."""

STRENGTH_BOUNDS = (1.0, 2.0)
"""Perceived differences of helpfulness above which a preference is 2, and 3."""

_HELPFULNESS = HELPSTEER2_ATTRIBUTES.index("helpfulness")


@dataclass(frozen=True)
class Rater:
    """A simulated annotator.

    Attributes:
        bias: Added to every rating of helpfulness and correctness.
        noise: Standard deviation of each rating around what the rater means.
        dislikes_length: Helpfulness taken off for each step of verbosity above 2.
        likes_plain: Helpfulness taken off for each step of complexity above 2.
    """

    bias: float
    noise: float
    dislikes_length: float
    likes_plain: float

    def perceive(self, rng: random.Random, truth: Sequence[float]) -> tuple[float, ...]:
        """What the rater makes of a response, before rounding.

        Args:
            rng: Where the noise comes from.
            truth: The oracle's five ratings.

        Returns:
            Five numbers, in no range.
        """
        _, _, _, complexity, verbosity = truth
        taste = self.dislikes_length * max(0.0, verbosity - 2)
        taste += self.likes_plain * max(0.0, complexity - 2)
        shifts = (self.bias - taste, self.bias, 0.0, 0.0, 0.0)
        return tuple(
            rating + shift + rng.gauss(0.0, self.noise)
            for rating, shift in zip(truth, shifts, strict=True)
        )


def _rater(number: int) -> Rater:
    rng = random.Random(f"rater {number}")
    return Rater(
        bias=rng.gauss(0.0, 0.3),
        noise=rng.uniform(0.5, 1.3),
        dislikes_length=rng.choice((0.0, 0.0, 0.0, 0.5)),
        likes_plain=rng.choice((0.0, 0.0, 0.0, 0.25)),
    )


POOL = tuple(_rater(number) for number in range(40))
"""The annotators of the world."""


Annotations = tuple[tuple[int, ...], ...]
"""Ratings of one response, A × raters."""


@dataclass(frozen=True)
class Verdict:
    """What a panel found.

    Attributes:
        annotations: n × A × raters: three, and up to two more where those disagreed on the
            helpfulness of any response.
        ratings: n × A whole ratings: the rounded mean of the three raters who agree most.
        agrees: Whether those three differ by at most 2 on the helpfulness of every response, and
            on the preference: HelpSteer2 leaves other prompts out.
        preferences: Of two responses, each rater's −3 … 3 without 0; else empty.
        most_similar: Of those, the three that agree most.
        preference_strength: Their rounded mean, which may be 0; None unless there are two
            responses on whose preference the raters agree.
    """

    annotations: tuple[Annotations, ...]
    ratings: tuple[tuple[float, ...], ...]
    agrees: bool
    preferences: tuple[int, ...] = ()
    most_similar: tuple[int, ...] = ()
    preference_strength: int | None = None


def ask_panel(rng: random.Random, truths: Sequence[Sequence[float]]) -> Verdict:
    """Have the responses of a prompt rated by a panel drawn from the pool.

    Args:
        rng: Draws the panel and its noise.
        truths: The oracle's ratings of the n responses, n × A.

    Returns:
        The single ratings and what they are aggregated to.

    Source: arXiv 2406.08673, section 2.1 and appendix G (ratings); arXiv 2410.01257 (preferences).
    """
    panel = rng.sample(POOL, FIRST_RATERS)
    added = rng.sample([rater for rater in POOL if rater not in panel], ADDED_RATERS)
    panel += [rater for rater in added if rng.random() >= REJECTED_SHARE]
    # rater × response × attribute
    seen = [[rater.perceive(rng, truth) for truth in truths] for rater in panel]
    annotations = _ratings_given(seen)
    aggregates = [aggregate_ratings(given, _HELPFULNESS) for given in annotations]
    ratings = tuple(tuple(map(float, aggregate.labels)) for aggregate in aggregates)
    agrees = all(aggregate.agrees for aggregate in aggregates)
    if len(truths) != 2:
        return Verdict(annotations, ratings, agrees)
    preferences = _asked(
        [_preference(second[_HELPFULNESS] - first[_HELPFULNESS]) for first, second in seen]
    )
    similar = tuple(preferences[i] for i in most_agreeing(preferences))
    strength = aggregate_preference(preferences)
    agrees = agrees and strength is not None
    return Verdict(annotations, ratings, agrees, preferences, similar, strength)


def _ratings_given(seen: Sequence[Sequence[Sequence[float]]]) -> tuple[Annotations, ...]:
    """Of each response the ratings A × raters; who is added rates all responses of the prompt."""
    rated = [[[_likert(rating) for rating in response] for response in rater] for rater in seen]
    by_response = list(zip(*rated, strict=True))
    raters = max(len(_asked([one[_HELPFULNESS] for one in given])) for given in by_response)
    return tuple(tuple(zip(*given[:raters], strict=True)) for given in by_response)


def _asked(given: Sequence[int]) -> tuple[int, ...]:
    """What the raters say who are asked: the first three, and all if those disagree."""
    disagree = spread(given[:FIRST_RATERS]) > LARGEST_SPREAD
    return tuple(given if disagree else given[:FIRST_RATERS])


def _likert(rating: float) -> int:
    """The nearest whole rating 0–4."""
    return math.floor(min(RATING_MAX, max(RATING_MIN, rating)) + 0.5)


def _preference(difference: float) -> int:
    """Strength of a preference for the second response; there is no option to abstain."""
    strength = 1 + sum(abs(difference) > bound for bound in STRENGTH_BOUNDS)
    return strength if difference > 0 else -strength
