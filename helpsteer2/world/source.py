"""Groups of the world as a data source."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.data.groups import Group, Message, Report
from helpsteer2.errors import UserError
from helpsteer2.functional import agreement
from helpsteer2.world.annotators import Verdict, ask_panel
from helpsteer2.world.answers import best_answer, random_answer
from helpsteer2.world.lexicon import FACTS, NAMES, STYLES, VALUES
from helpsteer2.world.oracle import rate_answer
from helpsteer2.world.tasks import Request, Task

_VALIDATION_SHARE = 8
"""One prompt in so many can only be in the validation split."""


@dataclass(frozen=True)
class WorldSource:
    """Groups made on the spot, the same bytes for the same arguments on every machine.

    Prompts that the annotators dispute are drawn anew, so a split has the size asked for.

    Args:
        groups: Number of groups of ``train``.
        seed: Another seed gives other groups.
        validation_groups: Number of groups of ``validation``; no prompt of it is in the ``train``
            of any seed.
        responses: Responses a prompt; two have a preference.
        ratings: ``annotators`` (whole numbers, aggregated as HelpSteer2's) or ``oracle`` (what each
            text deserves, continuous). The texts are the same.
        marked: Share of the prompts, 0–1, that ask to mark each claim as right or wrong. A language
            model that learns to do so knows how to judge a claim, which is hard to find out from
            ratings of whole answers alone.

    Raises:
        UserError: If a number is below 1, or the share is none.
    """

    groups: int
    seed: int
    validation_groups: int
    responses: int = 2
    ratings: Literal["annotators", "oracle"] = "annotators"
    marked: float = 0.0

    def __post_init__(self) -> None:
        for name in ("groups", "validation_groups", "responses"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.marked <= 1:
            raise UserError(f"data.marked is a share, 0 to 1, got {self.marked}")

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the rating columns."""
        return HELPSTEER2_ATTRIBUTES

    def read(self, split: str, report: Report) -> Iterator[Group]:
        """Make the groups of a split, one after the other.

        Args:
            split: ``train`` or ``validation``.
            report: Never called: what is made here is right.

        Yields:
            Groups, each from a random stream of its own.

        Raises:
            UserError: If the split is another one.
        """
        for group, _ in self.judged(split):
            yield group

    def prompts(self, split: str, report: Report) -> Iterator[Group]:
        """Make the groups of a split, as ``read`` does."""
        return self.read(split, report)

    def judged(self, split: str) -> Iterator[tuple[Group, Verdict]]:
        """The groups of a split with all that the annotators said.

        Args:
            split: ``train`` or ``validation``.

        Yields:
            Groups as ``read`` gives them, with the verdict behind each.

        Raises:
            UserError: If the split is another one.
        """
        for index in range(self._size(split)):
            yield self._judged(split, index)

    def fingerprint(self, split: str) -> str:
        """Hash of the arguments and of the code, since both decide what is made."""
        made_of = (split, self._size(split), self.seed, self.responses, self.ratings, self.marked)
        digest = hashlib.sha256(repr(made_of).encode())
        for file in (*sorted(Path(__file__).parent.glob("*.py")), Path(agreement.__file__)):
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def _size(self, split: str) -> int:
        sizes = {"train": self.groups, "validation": self.validation_groups}
        if split not in sizes:
            raise UserError(f"the made-up data has the splits {', '.join(sizes)}, not {split!r}")
        return sizes[split]

    def _judged(self, split: str, index: int) -> tuple[Group, Verdict]:
        rng = random.Random(f"{self.seed}/{split}/{index}")
        verdict = None
        while verdict is None or not verdict.agrees:
            task = draw_task(rng, self.marked)
            while _held_out(task.messages) != (split == "validation"):
                task = draw_task(rng, self.marked)
            answers: dict[str, tuple[float, ...]] = {}
            while len(answers) < self.responses:
                text = random_answer(rng, task)
                answers[text] = rate_answer(task, text)
            verdict = ask_panel(rng, tuple(answers.values()))
        group = Group(
            id=f"{split}-{index}",
            source=f"world:{index + 1}",
            prompt=task.messages,
            responses=tuple(answers),
            attributes=tuple(answers.values()) if self.ratings == "oracle" else verdict.ratings,
            annotations=verdict.annotations,
            preference_strength=verdict.preference_strength,
        )
        return group, verdict


def draw_task(rng: random.Random, marked: float = 0.0) -> Task:
    """Draw a prompt.

    Args:
        rng: Where chance comes from.
        marked: Probability that it asks for marks.

    Returns:
        One to three properties asked for; three prompts in ten are follow-up questions whose
        earlier turn was answered well.
    """
    entity = rng.choice(NAMES)
    wanted = rng.sample(tuple(VALUES), len(VALUES))
    requests: list[Request] = []
    answers: list[str] = []
    if rng.random() < 0.3:  # HelpSteer2: 29 % of the prompts
        requests.append(Request((wanted.pop(),), rng.choice(tuple(STYLES))))
        answers.append(best_answer(Task(entity, FACTS[entity], tuple(requests))))
    asked, style = tuple(wanted[: rng.randint(1, 3)]), rng.choice(tuple(STYLES))
    requests.append(Request(asked, style, rng.random() < marked))
    return Task(entity, FACTS[entity], tuple(requests), tuple(answers))


def _held_out(prompt: tuple[Message, ...]) -> bool:
    """Whether a prompt belongs to validation, whatever the seed."""
    text = "\n".join(message["content"] for message in prompt)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return number % _VALIDATION_SHARE == 0
