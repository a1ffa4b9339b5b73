"""Groups of text in, attribute scores out: a reward model ready for use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from helpsteer2.data.groups import Group
from helpsteer2.data.lengths import CutReport
from helpsteer2.data.packing import pack
from helpsteer2.data.tokenise import encode_group
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.errors import UserError
from helpsteer2.models.attention import AttentionChoice
from helpsteer2.models.reward import Dtype, RewardModel

if TYPE_CHECKING:
    from helpsteer2.data.chat import BoundChat

Scores = npt.NDArray[np.float32]


class RewardScorer:
    """Scores groups in a stream, with the chat template and the limits the model was trained with.

    Args:
        model: The reward model, on its device and in eval mode.
        chat: Its chat format.
        tokens_per_microbatch: Tokens of one forward pass; a longer group gets a pass of its own.

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
        model, _, chat = RewardModel.from_pretrained(path, dtype, attention, device, base)
        return cls(model, chat, tokens_per_microbatch)

    def score(self, groups: Iterable[Group]) -> Iterator[Scores]:
        """Score groups as they come.

        Args:
            groups: Prompts with n ≥ 1 responses each; ratings are not looked at.

        Yields:
            ``(n, A)`` float32 of each group, in order, at most one micro-batch behind the input.

        Raises:
            UserError: If a group cannot be rendered by the chat template.
        """
        return self.score_encoded(self.encode(group, i) for i, group in enumerate(groups))

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
        waiting: list[TokenGroup] = []
        n_tokens = 0
        for group in groups:
            if waiting and n_tokens + group.n_tokens > self.tokens_per_microbatch:
                yield from self._forward(waiting)
                waiting, n_tokens = [], 0
            waiting.append(group)
            n_tokens += group.n_tokens
        if waiting:
            yield from self._forward(waiting)

    def _forward(self, groups: list[TokenGroup]) -> list[Scores]:
        """Score one micro-batch."""
        batch = pack(groups)
        device = self.model.head.weight.device
        try:
            with torch.inference_mode():
                scores = self.model(batch.to(device)).cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory with {batch.layout.n_tokens} tokens in one pass (budget "
                f"{self.tokens_per_microbatch}): lower tokens_per_microbatch"
            ) from error
        ends = np.cumsum([len(group.response_ids) for group in groups])
        return np.split(scores, ends[:-1])
