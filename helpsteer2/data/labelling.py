"""Giving labels: to responses by what is known of them, to prompts by labels that others have."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

from helpsteer2.attributes import RATING_MAX, RATING_MIN
from helpsteer2.data.groups import Group, unmarked
from helpsteer2.data.labels import HIGHEST, LOWEST, AttributeLabel
from helpsteer2.data.pairing import with_responses
from helpsteer2.errors import UserError

By = Literal["scores", "ratings", "distribution", "fixed"]

_DRAW_BITS = 64


@dataclass
class LabelCounts:
    """What became of the groups.

    Attributes:
        groups: Groups read.
        labelled_groups: Groups made, each with its label.
        responses: Responses read; none where prompts get labels.
        unknown: Responses left out because a rating that the label needs is unknown.
        unlabelled_answers: Answers inside the prompts that are learned without a label.
        clamped: Values outside 0–4, by attribute.
        labels: Responses by label; prompts where these get labels.
    """

    groups: int = 0
    labelled_groups: int = 0
    responses: int = 0
    unknown: int = 0
    unlabelled_answers: int = 0
    clamped: Counter[str] = field(default_factory=Counter)
    labels: Counter[AttributeLabel] = field(default_factory=Counter)

    def values(self) -> dict[str, list[int]]:
        """By attribute how often the labels ask for 0, 1, 2, 3 and 4."""
        levels: dict[str, list[int]] = {}
        for label, number in self.labels.items():
            for name, value in label.as_dict().items():
                of_attribute = levels.setdefault(name, [0] * (HIGHEST - LOWEST + 1))
                of_attribute[value - LOWEST] += number
        return levels

    def record(self) -> dict[str, Any]:
        """The counts as a run's record has them: of the labels only how many differ."""
        return {
            "groups": self.groups,
            "labelled_groups": self.labelled_groups,
            "responses": self.responses,
            "unknown": self.unknown,
            "unlabelled_answers": self.unlabelled_answers,
            "different_labels": len(self.labels),
            "clamped": dict(self.clamped),
            "values": self.values(),
        }


@dataclass(frozen=True)
class ResponseLabels:
    """Gives every response the label of its own scores or ratings, clipped to 0–4 and rounded.

    Args:
        by: ``scores`` (of a reward model) or ``ratings`` (the groups' attributes).
        names: Attributes of the labels; None takes all that there are.

    Raises:
        UserError: If the names are none, or one is there twice.

    Source: NVIDIA/NeMo-Aligner, examples/nlp/data/steerlm/attribute_annotate.py.
    """

    by: Literal["scores", "ratings"]
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _check_names(self.names)

    def labelled(
        self, groups: Iterable[Group], attribute_names: Sequence[str], counts: LabelCounts
    ) -> Iterator[Group]:
        """Stream the responses with their labels.

        A label belongs to one response. So a group becomes one group for each of its different
        labels, whose ids end in ``/1``, ``/2``, …; with a single label the id stays.

        Args:
            groups: Prompts with n responses each.
            attribute_names: Names of their A ratings.
            counts: Told what became of them.

        Yields:
            Groups whose responses all have the group's label, with whatever was known of them but
            their preference. Answers inside a prompt stay marked in the first one alone, so that
            they are learned once.

        Raises:
            UserError: If a name is not among the scores or ratings, or a group has no scores.
        """
        if self.by == "ratings":
            self._columns(attribute_names, "the ratings of the data")  # before a group is read
        for group in groups:
            counts.groups += 1
            counts.responses += len(group.responses)
            counts.unlabelled_answers += sum(bool(m.get("train")) for m in group.prompt)
            positions: dict[AttributeLabel, list[int]] = {}
            for i, label in enumerate(self._labels(group, attribute_names, counts)):
                if label is None:
                    counts.unknown += 1
                else:
                    positions.setdefault(label, []).append(i)
                    counts.labels[label] += 1
            counts.labelled_groups += len(positions)
            for number, (label, kept) in enumerate(positions.items(), start=1):
                part = replace(with_responses(group, kept), label=label)
                if len(positions) > 1:
                    part = replace(part, id=f"{group.id}/{number}")
                yield part if number == 1 else unmarked(part)

    def _labels(
        self, group: Group, attribute_names: Sequence[str], counts: LabelCounts
    ) -> Iterator[AttributeLabel | None]:
        """The label of each response; None where a value that it needs is unknown."""
        rows: Sequence[Sequence[float | None]]
        if self.by == "scores":
            if group.scores is None:
                raise UserError(
                    f"{group.source}: group {group.id!r} has no scores: `helpsteer2 annotate` "
                    "gives them, and by=ratings does without"
                )
            rows, names = group.scores, group.score_names or ()
            columns = self._columns(names, f"{group.source}: the scores of group {group.id!r}")
        else:
            columns = self._columns(attribute_names, "the ratings of the data")
            rows = group.attributes or [(None,) * len(attribute_names)] * len(group.responses)
        for row in rows:
            values = {name: value for name, k in columns.items() if (value := row[k]) is not None}
            if len(values) < len(columns):
                yield None
                continue
            counts.clamped.update(
                name for name, value in values.items() if not RATING_MIN <= value <= RATING_MAX
            )
            yield AttributeLabel.rounded(list(values), list(values.values()))

    def _columns(self, known: Sequence[str], what: str) -> dict[str, int]:
        """Column of each attribute of the label."""
        wanted = known if self.names is None else self.names
        lacking = [name for name in wanted if name not in known]
        if lacking or not known:
            asked = f"names asks for {', '.join(lacking)}, but " if lacking else ""
            raise UserError(
                f"{asked}{what} are of {', '.join(known) or 'nothing'}: choose among them, or "
                "other data"
            )
        return {name: list(known).index(name) for name in wanted}


@dataclass(frozen=True)
class LabelDistribution:
    """Labels to draw from: whole ones, so that attributes go together as they do in the data.

    Args:
        labels: The different labels. Draws depend on their order, in which ``of`` puts them by
            their text.
        numbers: How often each was found.
    """

    labels: tuple[AttributeLabel, ...]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, groups: Iterable[Group], names: Sequence[str] | None = None) -> LabelDistribution:
        """The labels of some groups, each as often as it has responses.

        Args:
            groups: Groups, some of them with labels.
            names: Attributes to keep of each label; None keeps all.

        Raises:
            UserError: If no group has a label, or a label lacks one of the names.
        """
        _check_names(names)
        found: Counter[AttributeLabel] = Counter()
        for group in groups:
            if group.label is not None:
                found[_of_names(group, group.label, names)] += len(group.responses)
        if not found:
            raise UserError(
                "labels: none of their groups has a label: `helpsteer2 label by=scores` gives "
                "them to the responses of a data set"
            )
        ordered = sorted(found.items(), key=lambda item: item[0].text)
        return cls(tuple(label for label, _ in ordered), tuple(number for _, number in ordered))

    def draw(self, seed: int, identity: str) -> AttributeLabel:
        """A label, decided by the seed and an id alone."""
        digest = hashlib.blake2b(f"{seed}/{identity}".encode(), digest_size=_DRAW_BITS // 8)
        number = int.from_bytes(digest.digest(), "little") * self._ends[-1] >> _DRAW_BITS
        return self.labels[bisect_right(self._ends, number)]

    @cached_property
    def _ends(self) -> list[int]:
        """One past the last number that stands for each label."""
        return list(accumulate(self.numbers))

    def labelled(self, groups: Iterable[Group], seed: int, counts: LabelCounts) -> Iterator[Group]:
        """Stream the prompts of groups, each with a label drawn for it.

        Args:
            groups: Groups, with or without responses.
            seed: Seed of the draws, which do not depend on the groups' order.
            counts: Told of them.

        Yields:
            Groups without responses: those that there were did not come about by the label.
        """
        for group in groups:
            label = self.draw(seed, group.id)
            counts.groups += 1
            counts.labelled_groups += 1
            counts.labels[label] += 1
            yield Group(group.id, group.source, group.prompt, responses=(), label=label)


def _of_names(group: Group, label: AttributeLabel, names: Sequence[str] | None) -> AttributeLabel:
    """A label with some of its attributes."""
    if names is None:
        return label
    ratings = label.as_dict()
    lacking = [name for name in names if name not in ratings]
    if lacking:
        raise UserError(
            f"names asks for {', '.join(lacking)}, but {group.source}: the label of group "
            f"{group.id!r} is of {', '.join(ratings)}: choose among them, or other labels"
        )
    return AttributeLabel.of({name: ratings[name] for name in names})


def _check_names(names: Sequence[str] | None) -> None:
    if names is not None and (not names or len(set(names)) < len(names)):
        raise UserError(
            f"names has to hold at least one attribute, each once, got {list(names)}: null takes "
            "all that there are"
        )
