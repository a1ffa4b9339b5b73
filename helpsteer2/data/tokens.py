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
    """

    prompt_ids: npt.NDArray[np.int32]
    response_ids: tuple[npt.NDArray[np.int32], ...]
    attributes: npt.NDArray[np.float32]
    preference_strength: float
    index: int

    @property
    def n_tokens(self) -> int:
        """Tokens the group takes in a packed batch: the prompt once, every response once."""
        return len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids)
