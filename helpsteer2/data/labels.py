"""Attribute labels: what a policy is told about the answer that it shall give (SteerLM).

The one place where a label becomes text and text becomes a label. ``BoundChat.label_ids`` puts the
text behind the prompt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from helpsteer2.attributes import RATING_MAX, RATING_MIN, STEERLM_ATTRIBUTES
from helpsteer2.errors import UserError

LOWEST, HIGHEST = int(RATING_MIN), int(RATING_MAX)

INFERENCE_VALUES: Mapping[str, int] = {
    "quality": 4,
    "toxicity": 0,
    "humor": 0,
    "creativity": 0,
    "helpfulness": 4,
    "correctness": 4,
    "coherence": 4,
    "complexity": 2,
    "verbosity": 2,
}
"""What answers are asked to be where nobody says otherwise.

Source: arXiv 2406.08673, section 4.5 (the last five: SteerLM and SteerLM 2.0 at inference);
NVIDIA/NeMo-Aligner at af2b3bd9, docs/user-guide/steerlm.rst (the first four).
"""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class AttributeLabel:
    """Whole ratings 0–4 by attribute, in one order: that of ``STEERLM_ATTRIBUTES``, then by name.

    Args:
        names: The attributes, in that order (``of`` puts them there).
        values: The rating of each.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]

    @classmethod
    def of(cls, ratings: Mapping[str, Any]) -> AttributeLabel:
        """A label of some ratings.

        Args:
            ratings: Whole numbers 0–4 by attribute, at least one.

        Raises:
            UserError: If there is none, a name cannot stand in a label, or a value is no whole
                number 0–4; all that is wrong is named.
        """
        wrong = [
            f"{name!r} is no name of an attribute"
            for name in ratings
            if not isinstance(name, str) or not _NAME.fullmatch(name)
        ]
        wrong += [
            f"{name} is {value!r}, must be a whole number {LOWEST} to {HIGHEST}"
            for name, value in ratings.items()
            if not _is_level(value)
        ]
        if not ratings:
            wrong = ["it names no attribute"]
        if wrong:
            raise UserError(f"attribute label: {'; '.join(wrong)}")
        names = in_order(ratings)
        return cls(names, tuple(int(ratings[name]) for name in names))

    @classmethod
    def parse(cls, text: str) -> AttributeLabel:
        """Read ``helpfulness:4,correctness:4`` back, in whatever order.

        Raises:
            UserError: If the text is no label.
        """
        ratings: dict[str, int] = {}
        for part in text.strip().split(","):
            name, colon, value = part.partition(":")
            if not colon or name in ratings or not re.fullmatch(r"[0-9]{1,9}", value):
                raise UserError(
                    f"attribute label {text!r}: expected NAME:RATING,NAME:RATING… with every name "
                    f"once, got {part!r}"
                )
            ratings[name] = int(value)
        return cls.of(ratings)

    @classmethod
    def rounded(cls, names: Sequence[str], ratings: Sequence[float]) -> AttributeLabel:
        """The label nearest to some ratings: clipped to 0–4 and rounded, halves to even.

        Args:
            names: The attributes.
            ratings: A rating of each.

        Raises:
            UserError: If a rating is not finite, or a name cannot stand in a label.

        Source: NVIDIA/NeMo-Aligner at af2b3bd9, examples/nlp/data/steerlm/attribute_annotate.py
        (clip, then Python's ``round``).
        """
        if not all(map(math.isfinite, ratings)):
            raise UserError(f"attribute label: not every rating is finite: {list(ratings)}")
        clipped = (min(RATING_MAX, max(RATING_MIN, rating)) for rating in ratings)
        return cls.of({name: round(rating) for name, rating in zip(names, clipped, strict=True)})

    @property
    def text(self) -> str:
        """As a policy reads it: ``helpfulness:4,correctness:4,coherence:4``."""
        return ",".join(f"{name}:{value}" for name, value in self.as_dict().items())

    def __str__(self) -> str:
        """The text."""
        return self.text

    def as_dict(self) -> dict[str, int]:
        """Rating by attribute."""
        return dict(zip(self.names, self.values, strict=True))

    def completed(self, known: Sequence[str]) -> AttributeLabel:
        """The label with every attribute that a policy was trained with.

        Args:
            known: Those attributes.

        Returns:
            The label; attributes that it left out have their ``INFERENCE_VALUES``.

        Raises:
            UserError: If it names an attribute that the policy does not know, or leaves out one
                that has no usual value.
        """
        unknown = [name for name in self.names if name not in known]
        if unknown:
            raise UserError(
                f"the policy was not trained with {', '.join(unknown)}: its labels are of "
                f"{', '.join(known)}"
            )
        missing = [name for name in known if name not in {*self.names, *INFERENCE_VALUES}]
        if missing:
            raise UserError(
                f"the label says nothing of {', '.join(missing)}, which the policy was trained "
                "with and which has no usual value: name it"
            )
        usual = {name: INFERENCE_VALUES[name] for name in known if name not in self.names}
        return AttributeLabel.of({**usual, **self.as_dict()})


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Attributes in the order of labels: SteerLM's nine in theirs, then others by name."""
    places = {name: place for place, name in enumerate(STEERLM_ATTRIBUTES)}
    return tuple(sorted(names, key=lambda name: (places.get(name, len(places)), name)))


def _is_level(value: Any) -> bool:
    """Whether a value is one of the levels; 4.0 is one, True is none."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and value in range(LOWEST, HIGHEST + 1)
