"""From groups to ids: prompts and responses rendered, encoded and cut.

A reward model judges text: every response is encoded from its text and closed, a sampled one too,
finished or not, and of a prompt the texts alone count. A policy is trained on what it did: a
response that it sampled keeps its ids, one that was not finished is not closed, and answers inside
prompts that are marked ``train`` have the ids of responses. A policy also reads the label of a
group, behind its prompt; limits cut the prompt without it, so that they cut the same with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice

import numpy as np
import numpy.typing as npt

from helpsteer2.data.chat import BoundChat
from helpsteer2.data.groups import Group, unmarked
from helpsteer2.data.lengths import CutReport, LengthLimits
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.errors import UserError


@dataclass
class EncodingReport:
    """Where the ids came from.

    Attributes:
        responses_by_ids: Responses whose ids are those that were sampled.
        responses_by_text: Responses that were encoded from their text.
        responses_of_other_ids: Those of them whose sampled ids belong to another tokenizer or
            template.
        responses_empty: Sampled responses without text, encoded as their closing alone.
        turns_trained: Answers inside prompts that are learned, of those that are marked and that
            the limits kept.
        turns_not_trained: The others: the template writes them otherwise than as a response.
        groups_labelled: Groups whose label is read.
    """

    responses_by_ids: int = 0
    responses_by_text: int = 0
    responses_of_other_ids: int = 0
    responses_empty: int = 0
    turns_trained: int = 0
    turns_not_trained: int = 0
    groups_labelled: int = 0

    def counts(self) -> dict[str, int]:
        """The counters by name."""
        return asdict(self)


@dataclass
class GroupEncoder:
    """Encodes groups, many in one call of the tokenizer.

    Args:
        chat: Template and tokenizer.
        limits: Longest prompt and response.
        columns: Column of a group's ratings for each of the A attributes, None where it has none.
        for_policy: Whether a policy will be trained on the ids, or a reward model will read them.
        cuts: Counts what the limits cut.
        report: Counts where the ids came from.
        label_attributes: What the labels are of; those of the first one bind the others.
    """

    chat: BoundChat
    limits: LengthLimits
    columns: Sequence[int | None]
    for_policy: bool
    cuts: CutReport = field(default_factory=CutReport)
    report: EncodingReport = field(default_factory=EncodingReport)
    label_attributes: tuple[str, ...] = ()

    def encode(self, groups: Sequence[Group], first: int) -> Iterator[TokenGroup | UserError]:
        """Encode groups.

        Args:
            groups: The groups.
            first: Position of the first one in its data set.

        Yields:
            Ids and labels of each group, or why it has none.
        """
        groups = [self.as_read(group) for group in groups]
        rendered: list[tuple[list[str], list[str]] | UserError] = []
        for group in groups:
            try:
                rendered.append(self._texts(group))
            except UserError as error:
                rendered.append(error)
        texts = [
            text
            for parts in rendered
            if not isinstance(parts, UserError)
            for part in parts
            for text in part
        ]
        ids = iter(self.chat.encode(texts))
        for index, (group, parts) in enumerate(zip(groups, rendered, strict=True), start=first):
            if isinstance(parts, UserError):
                yield parts
                continue
            pieces, responses = (list(islice(ids, len(part))) for part in parts)
            try:
                yield self._token_group(group, index, pieces, responses)
            except UserError as error:
                yield error

    def as_read(self, group: Group) -> Group:
        """The group as its reader sees it: to a reward model nothing is marked or labelled."""
        return group if self.for_policy else replace(unmarked(group), label=None)

    def _keeps_ids(self, group: Group) -> bool:
        """Whether the sampled ids of a group are taken as they are."""
        return self.for_policy and group.tokenizer == self.chat.ids_hash

    def _texts(self, group: Group) -> tuple[list[str], list[str]]:
        """Texts of the prompt's pieces, and of those responses that are encoded from text."""
        answers = () if self._keeps_ids(group) else group.responses
        prompt, responses = self.chat.split_texts(group.prompt, answers, group.sampled)
        return self.chat.prompt_pieces(group.prompt, prompt), responses

    def _token_group(
        self, group: Group, index: int, pieces: list[list[int]], responses: list[list[int]]
    ) -> TokenGroup:
        """Cut the ids of a group and put its labels in order."""
        prompt_ids, prompt_mask = self._labelled(group, *self._prompt(group, pieces))
        responses = self._responses(group, responses)
        ratings = np.full((len(group.responses), len(self.columns)), np.nan, dtype=np.float32)
        if group.attributes is not None:
            for target, column in enumerate(self.columns):
                if column is not None:
                    values = [row[column] for row in group.attributes]
                    ratings[:, target] = [np.nan if value is None else value for value in values]
        strength = group.preference_strength
        return TokenGroup(
            prompt_ids=np.asarray(prompt_ids, dtype=np.int32),
            response_ids=tuple(np.asarray(ids, dtype=np.int32) for ids in responses),
            attributes=ratings,
            preference_strength=float("nan") if strength is None else float(strength),
            index=index,
            rewards=None if group.rewards is None else np.array(group.rewards, dtype=np.float32),
            prompt_mask=prompt_mask,
        )

    def _prompt(
        self, group: Group, pieces: list[list[int]]
    ) -> tuple[list[int], npt.NDArray[np.bool_] | None]:
        """Ids of the prompt as far as it fits, and which of them are learned."""
        ids, mask = self.chat.join_prompt(pieces)
        kept = self.limits.fit_messages(group.prompt, ids, self.chat, self.cuts)
        if kept is not group.prompt:
            text, _ = self.chat.split_texts(kept, ())
            pieces = self.chat.encode(self.chat.prompt_pieces(kept, text))
            ids, mask = self.chat.join_prompt(pieces)
        trained = len(pieces) // 2
        marked = sum(bool(message.get("train")) for message in kept)
        self.report.turns_trained += trained
        self.report.turns_not_trained += marked - trained
        return ids, mask

    def _labelled(
        self, group: Group, ids: list[int], mask: npt.NDArray[np.bool_] | None
    ) -> tuple[list[int], npt.NDArray[np.bool_] | None]:
        """Put the label behind the prompt; it is not learned."""
        if group.label is None:
            return ids, mask
        names = self.label_attributes = self.label_attributes or group.label.names
        if group.label.names != names:
            raise UserError(
                f"its label is of {', '.join(group.label.names)}, those before it of "
                f"{', '.join(names)}: all labels have to name the same attributes"
            )
        self.report.groups_labelled += 1
        label = self.chat.labels.ids(group.label)
        if mask is not None:
            mask = np.append(mask, np.zeros(len(label), dtype=bool))
        return ids + label, mask

    def _responses(self, group: Group, encoded: list[list[int]]) -> list[list[int]]:
        """Ids of the responses as far as they fit."""
        if self._keeps_ids(group):
            assert group.response_ids is not None  # as the tokenizer is given
            responses = [list(ids) for ids in group.response_ids]
            self.report.responses_by_ids += len(responses)
        else:
            finishes = group.finish_reasons or ("stop",) * len(encoded)
            responses = [
                self._unfinished(ids) if self.for_policy and finish == "length" else ids
                for ids, finish in zip(encoded, finishes, strict=True)
            ]
            self.report.responses_by_text += len(responses)
            self.report.responses_empty += sum(not text.strip() for text in group.responses)
            if self.for_policy and group.response_ids is not None:
                self.report.responses_of_other_ids += len(responses)
        close_cut = not self.for_policy
        return [self.limits.fit_response(ids, self.chat, self.cuts, close_cut) for ids in responses]

    def _unfinished(self, ids: list[int]) -> list[int]:
        """A response without its closing; one without text keeps it, to be anything at all."""
        return ids[: len(ids) - self.chat.closing_count(ids)] or ids
