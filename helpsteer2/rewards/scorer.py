"""Groups of text in, attribute scores out: a reward model ready for use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from helpsteer2.data.groups import Group
from helpsteer2.data.lengths import CutReport
from helpsteer2.data.packing import PackedBatch, pack
from helpsteer2.data.tokenise import encode_group
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.errors import UserError
from helpsteer2.models.attention import AttentionChoice
from helpsteer2.models.export import no_progress_bar
from helpsteer2.models.reward import Dtype, RewardModel

if TYPE_CHECKING:
    from helpsteer2.data.chat import BoundChat

Scores = npt.NDArray[np.float32]

WAITING_GROUPS = 1024
"""Most groups of one pass, as equal ones take no tokens."""


class RewardScorer:
    """Scores groups in a stream, with the chat template and the limits the model was trained with.

    Within a pass a prompt is computed once, and so is each of its responses, however many groups
    hold them. ``AttributeWeights.reward`` makes one reward of the scores.

    Args:
        model: The reward model, on its device and in eval mode.
        chat: Its chat format.
        tokens_per_microbatch: Tokens of one forward pass. A longer group gets passes of its own,
            each the prompt with some of its responses; at least one, however long.

    Attributes:
        attribute_names: Names of the A scores.
        cuts: What was cut so far.
    """

    def __init__(
        self, model: RewardModel, chat: BoundChat, tokens_per_microbatch: int = 8192
    ) -> None:
        if tokens_per_microbatch < 1:
            raise UserError(
                f"tokens_per_microbatch must be at least 1, got {tokens_per_microbatch}"
            )
        self.model = model
        self.chat = chat
        self.tokens_per_microbatch = tokens_per_microbatch
        self.attribute_names = model.spec.attribute_names
        self.cuts = CutReport()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: Dtype = "float32",
        attention: AttentionChoice = "auto",
        tokens_per_microbatch: int = 8192,
        device: torch.device | str = "auto",
        base: str | Path | None = None,
    ) -> RewardScorer:
        """Load an export, its adapter alone, or any decoder sequence classifier of transformers.

        Args:
            path: Folder or Hub id.
            dtype: Of the backbone; the head is always fp32.
            attention: Attention backend.
            tokens_per_microbatch: Tokens of one forward pass.
            device: ``auto`` is the first GPU, or else the CPU.
            base: Folder or Hub id of an adapter's base, if it has moved since the training.

        Raises:
            UserError: If the folder cannot be trusted to score right.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        with no_progress_bar():
            model, _, chat = RewardModel.from_pretrained(path, dtype, attention, device, base)
        return cls(model, chat, tokens_per_microbatch)

    @cached_property
    def model_hash(self) -> str:
        """SHA-256 of the weights, and of the template, tokenizer and limits that scores rest on."""
        spec = self.model.spec
        parts = (
            spec.attribute_names,
            (spec.template_hash, spec.system_prompt, spec.tokenizer_hash),
            (spec.limits.max_prompt_tokens, spec.limits.max_response_tokens),
        )
        hashed = hashlib.sha256(repr(parts).encode())
        for name, tensor in self.model.state_dict().items():
            hashed.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
            hashed.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return hashed.hexdigest()

    def score(self, groups: Iterable[Group]) -> Iterator[Scores]:
        """Score groups as they come.

        Args:
            groups: Prompts with n ≥ 1 responses each; ratings are not looked at.

        Yields:
            ``(n, A)`` float32 of each group, in order, at most one micro-batch behind the input.

        Raises:
            UserError: If a group cannot be rendered by the chat template; names the group.
        """
        return self.score_encoded(self._encoded(groups))

    def _encoded(self, groups: Iterable[Group]) -> Iterator[TokenGroup]:
        for index, group in enumerate(groups):
            try:
                yield self.encode(group, index)
            except UserError as error:
                raise UserError(f"group {group.id!r} ({group.source}): {error}") from error

    def encode(self, group: Group, index: int = 0) -> TokenGroup:
        """Turn a group into ids, under the limits the model was trained with.

        Args:
            group: A prompt with its responses.
            index: Its position, for messages.

        Raises:
            UserError: If the chat template cannot render it.
        """
        limits = self.model.spec.limits
        return encode_group(group, index, self.chat, limits, (), (), self.cuts)

    def score_encoded(self, groups: Iterable[TokenGroup]) -> Iterator[Scores]:
        """Score groups of ids; see ``score``."""
        waiting = _Pass()
        for group in groups:
            if waiting.is_full_with(group, self.tokens_per_microbatch):
                yield from self._forward(waiting)
                waiting = _Pass()
            waiting.add(group)
        if waiting.members:
            yield from self._forward(waiting)

    def _forward(self, waiting: _Pass) -> Iterator[Scores]:
        """Score one micro-batch, in several passes if a single group is longer than one."""
        groups, rows = waiting.distinct()
        passes = [groups]
        if len(groups) == 1:
            passes = [[part] for part in _parts(groups[0], self.tokens_per_microbatch)]
        scores = np.concatenate([self._pass_scores(pack(groups)) for groups in passes])
        for of_group in rows:
            yield scores[of_group]

    def _pass_scores(self, batch: PackedBatch) -> Scores:
        """Scores ``(R, A)`` of one forward pass."""
        device = self.model.head.weight.device
        try:
            with torch.inference_mode():
                scores: Scores = self.model(batch.to(device)).cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory with {batch.layout.n_tokens} tokens in one pass (budget "
                f"{self.tokens_per_microbatch}): lower tokens_per_microbatch (--batch-tokens)"
            ) from error
        return scores


class _Pass:
    """Groups that go through the model together: ids as bytes, so that equal ones are found."""

    def __init__(self) -> None:
        self.members: list[tuple[bytes, list[bytes]]] = []
        self._responses: dict[bytes, dict[bytes, None]] = {}  # sets by prompt, in order
        self._n_tokens = 0

    def is_full_with(self, group: TokenGroup, budget: int) -> bool:
        """Whether a group has to wait for the next pass."""
        if not self.members:
            return False
        prompt, responses = _as_bytes(group)
        new = self._n_tokens + self._new_bytes(prompt, responses) // group.prompt_ids.itemsize
        return new > budget or len(self.members) == WAITING_GROUPS

    def add(self, group: TokenGroup) -> None:
        """Take a group in."""
        prompt, responses = _as_bytes(group)
        self._n_tokens += self._new_bytes(prompt, responses) // group.prompt_ids.itemsize
        self._responses.setdefault(prompt, {}).update(dict.fromkeys(responses))
        self.members.append((prompt, responses))

    def _new_bytes(self, prompt: bytes, responses: list[bytes]) -> int:
        """Bytes of ids that are not in the pass yet."""
        known = self._responses.get(prompt)
        new = set(responses).difference(known or ())
        return (0 if known else len(prompt)) + sum(map(len, new))

    def distinct(self) -> tuple[list[TokenGroup], list[list[int]]]:
        """Each prompt with its different responses, and the rows of every member's responses."""
        groups: list[TokenGroup] = []
        row_of: dict[tuple[bytes, bytes], int] = {}
        for prompt, responses in self._responses.items():
            groups.append(
                TokenGroup(
                    prompt_ids=np.frombuffer(prompt, np.int32),
                    response_ids=tuple(np.frombuffer(ids, np.int32) for ids in responses),
                    attributes=np.empty((len(responses), 0), np.float32),
                    preference_strength=float("nan"),
                    index=len(groups),
                )
            )
            for ids in responses:
                row_of[prompt, ids] = len(row_of)
        rows = [[row_of[prompt, ids] for ids in responses] for prompt, responses in self.members]
        return groups, rows


def _as_bytes(group: TokenGroup) -> tuple[bytes, list[bytes]]:
    return group.prompt_ids.tobytes(), [ids.tobytes() for ids in group.response_ids]


def _parts(group: TokenGroup, budget: int) -> Iterator[TokenGroup]:
    """The prompt of a group with as many of its responses as fit into a pass, and so on."""
    first, n_tokens = 0, len(group.prompt_ids)
    for i, ids in enumerate(group.response_ids):
        if i > first and n_tokens + len(ids) > budget:
            yield _part(group, slice(first, i))
            first, n_tokens = i, len(group.prompt_ids)
        n_tokens += len(ids)
    yield _part(group, slice(first, None))


def _part(group: TokenGroup, rows: slice) -> TokenGroup:
    return replace(group, response_ids=group.response_ids[rows], attributes=group.attributes[rows])
