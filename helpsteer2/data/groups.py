"""The one record of the project: a prompt with n responses, and what is known of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypedDict

from helpsteer2.data.labels import AttributeLabel
from helpsteer2.errors import DataError, Problem

Role = Literal["system", "user", "assistant"]
Report = Callable[[Problem], None]


FinishReason = Literal["stop", "length"]
"""Why a sampled response ends: its end-of-turn token, or the limit of its length."""


class _Text(TypedDict):
    """What every message has."""

    role: Role
    content: str


class Message(_Text, total=False):
    """One chat message.

    ``train`` marks an answer inside a prompt that supervised fine-tuning learns too. A policy reads
    it with the ids of a response; no other training learns it, and a reward model sees no mark.
    """

    train: bool


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with n responses (a row on disk).

    Attributes:
        id: Unique within its data set.
        source: Where it was read: ``file:line`` of its first row.
        prompt: Chat messages; the last one is from the user.
        responses: n texts; none only where the prompts of a source are read, for sampling.
        attributes: n × A ratings 0–4 in the order of the source's ``attribute_names``, None where
            unknown; None as a whole if nothing is rated.
        annotations: n × A × raters, the ratings of the single annotators; None if not known.
        preference_strength: −3 (the first of two responses is much better) … 3 (the second is);
            None if not known.
        response_ids: n lists of ids as a policy sampled them: the last one is the end-of-turn token
            if the response was finished; None if they were not sampled.
        tokenizer: ``BoundChat.ids_hash`` of the chat that the ids belong to; there if and only if
            the ids are.
        finish_reasons: Why each sampled response ends.
        logprobs: Nats of each of the ``response_ids`` under the policy that sampled them, at
            temperature 1 and with nothing cut from its distribution.
        scores: n × A numbers of a reward model, in the order of ``score_names``.
        score_names: Names of the scores; there if and only if they are.
        rewards: One number a response.
        label: What the responses shall be like: ratings that a policy reads behind the prompt. A
            reward model does not see them. None without one.
    """

    id: str
    source: str
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    attributes: tuple[tuple[float | None, ...], ...] | None = None
    annotations: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    preference_strength: int | None = None
    response_ids: tuple[tuple[int, ...], ...] | None = None
    tokenizer: str | None = None
    finish_reasons: tuple[FinishReason, ...] | None = None
    logprobs: tuple[tuple[float, ...], ...] | None = None
    scores: tuple[tuple[float, ...], ...] | None = None
    score_names: tuple[str, ...] | None = None
    rewards: tuple[float, ...] | None = None
    label: AttributeLabel | None = None

    @property
    def sampled(self) -> bool:
        """Whether a policy wrote the responses: only then may one be empty."""
        return self.response_ids is not None or self.finish_reasons is not None


def unmarked(group: Group) -> Group:
    """The group without ``train`` marks."""
    prompt = tuple(Message(role=m["role"], content=m["content"]) for m in group.prompt)
    return replace(group, prompt=prompt)


class GroupSource(Protocol):
    """Where groups come from: a Hub data set, local files, or a generator."""

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the A rating columns of every group."""
        ...

    def read(self, split: str, report: Report) -> Iterator[Group]:
        """Stream the groups of a split in a fixed order, reporting every bad row."""
        ...

    def prompts(self, split: str, report: Report) -> Iterator[Group]:
        """Stream what a policy can answer: groups whose responses, if any, are of no interest."""
        ...

    def fingerprint(self, split: str) -> str:
        """Hash that changes whenever ``read`` would give something else."""
        ...


@dataclass(frozen=True)
class Unlabelled:
    """The groups of a source without their labels.

    Args:
        of: The source.
    """

    of: GroupSource

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the rating columns."""
        return self.of.attribute_names

    def read(self, split: str, report: Report) -> Iterator[Group]:
        """Stream the groups of a split."""
        return (replace(group, label=None) for group in self.of.read(split, report))

    def prompts(self, split: str, report: Report) -> Iterator[Group]:
        """Stream the prompts of a split."""
        return (replace(group, label=None) for group in self.of.prompts(split, report))

    def fingerprint(self, split: str) -> str:
        """Hash that changes whenever ``read`` would give something else."""
        return f"unlabelled/{self.of.fingerprint(split)}"


def read_all(source: GroupSource, split: str) -> Iterator[Group]:
    """Stream a split and refuse it at its end if any row was bad.

    Args:
        source: Where to read.
        split: ``train``, ``validation``, …

    Yields:
        The good groups, in order. Whatever the caller makes of them must be thrown away if this
        raises.

    Raises:
        DataError: After the last row, with every problem at once; also if there is no group.
    """
    return _refusing(source, split, source.read)


def read_prompts(source: GroupSource, split: str) -> Iterator[Group]:
    """Stream the prompts of a split as ``read_all`` streams its groups.

    Args:
        source: Where to read.
        split: ``train``, ``validation``, …

    Yields:
        The good groups, with or without responses.

    Raises:
        DataError: After the last row, with every problem at once; also if there is no prompt.
    """
    return _refusing(source, split, source.prompts)


def _refusing(
    source: GroupSource, split: str, read: Callable[[str, Report], Iterator[Group]]
) -> Iterator[Group]:
    """What ``read`` streams, and all that it reports as an error at the end."""
    problems: list[Problem] = []
    empty = True
    for group in read(split, problems.append):
        empty = False
        yield group
    if empty and not problems:
        place = str(getattr(source, "path", source))
        problems.append(Problem(place, None, None, f"no rows in {split!r}"))
    if problems:
        raise DataError(problems)
