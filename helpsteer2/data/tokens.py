"""Groups as token ids: what the packed batch is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

Column = TypeVar("Column")
"""What a column is: an array on the disk or in memory, or a tensor."""

Other = TypeVar("Other")


@dataclass(frozen=True, slots=True)
class RolloutTokens(Generic[Column]):
    """What policy optimisation knows of each of N response tokens, response after response.

    Attributes:
        logprobs: ``(N,)`` float32 nats under the policy that the iteration began with, as training
            computes them.
        ref_logprobs: ``(N,)`` float32 nats under the reference.
        advantages: ``(N,)`` float32, how much better than expected the token was.
        counted: ``(N,)`` bool, whether the token is learned: not where its response is masked.
        values: ``(N,)`` float32, what the critic expected before the token; None without a critic.
        returns: ``(N,)`` float32, what the critic shall learn to expect there; None likewise.
    """

    logprobs: Column
    ref_logprobs: Column
    advantages: Column
    counted: Column
    values: Column | None = None
    returns: Column | None = None

    def map(self, change: Callable[[Column], Other]) -> RolloutTokens[Other]:
        """The same columns, each changed."""
        return RolloutTokens(**{name: change(column) for name, column in self.items()})

    def items(self) -> list[tuple[str, Column]]:
        """Name and content of the columns that are there."""
        columns = ((name, getattr(self, name)) for name in self.__slots__)
        return [(name, column) for name, column in columns if column is not None]


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """The ids of one group.

    Attributes:
        prompt_ids: ``(P,)`` int32, through the generation prompt (BOS once, if the model has one).
        response_ids: n arrays ``(m_i,)`` int32, each with its closing tokens.
        attributes: ``(n, A)`` float32 ratings 0–4, NaN where unknown.
        preference_strength: −3 … 3, NaN if not known.
        index: Position of the group in its data set.
        rewards: ``(n,)`` float32, NaN where unknown; None if none is known.
        ref_logprobs: ``(n,)`` float32 nats, what a reference policy gives each response as a whole,
            NaN where unknown; None if none is known.
        prompt_mask: ``(P,)`` bool, the prompt tokens that supervised fine-tuning learns; None if it
            learns none.
        rollout: What policy optimisation knows of its response tokens; None in other training.
    """

    prompt_ids: npt.NDArray[np.int32]
    response_ids: tuple[npt.NDArray[np.int32], ...]
    attributes: npt.NDArray[np.float32]
    preference_strength: float
    index: int
    rewards: npt.NDArray[np.float32] | None = None
    ref_logprobs: npt.NDArray[np.float32] | None = None
    prompt_mask: npt.NDArray[np.bool_] | None = None
    rollout: RolloutTokens[npt.NDArray[Any]] | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens the group takes in a packed batch: the prompt once, every response once."""
        return len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids)
