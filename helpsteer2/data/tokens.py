"""Groups as token ids: what the packed batch is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


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
    """

    prompt_ids: npt.NDArray[np.int32]
    response_ids: tuple[npt.NDArray[np.int32], ...]
    attributes: npt.NDArray[np.float32]
    preference_strength: float
    index: int
    rewards: npt.NDArray[np.float32] | None = None
    ref_logprobs: npt.NDArray[np.float32] | None = None
    prompt_mask: npt.NDArray[np.bool_] | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens the group takes in a packed batch: the prompt once, every response once."""
        return len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids)
