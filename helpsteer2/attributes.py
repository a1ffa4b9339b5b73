"""The attributes of HelpSteer2, their range, and weightings that turn them into one reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helpsteer2.errors import UserError

HELPSTEER2_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""The five rated attributes, in the order of the data set's columns and of every score vector."""

STEERLM_ATTRIBUTES = ("quality", "toxicity", "humor", "creativity", *HELPSTEER2_ATTRIBUTES)
"""The nine attributes of SteerLM, in the order of NeMo-Aligner's labels and regression rows.

Source: NVIDIA/NeMo-Aligner at af2b3bd9, examples/nlp/data/steerlm/common.py.
"""

RATING_MIN, RATING_MAX = 0.0, 4.0
"""Range of a rating (Likert 0–4)."""


@dataclass(frozen=True)
class AttributeWeights:
    """A linear weighting of attribute scores: ratings in, one reward out.

    It never touches training: sweeping it leaves the reward model as it is. The weights of the
    regression loss are another thing (``attribute_loss_weights``).

    Args:
        name: Name under which results are reported.
        values: Weight of each attribute; attributes left out weigh 0.

    Raises:
        UserError: If a weight is not finite or every weight is 0.

    Source: arXiv 2406.08673, appendix H (goodness as a dot product of attributes and weights).
    """

    name: str
    values: Mapping[str, float]

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in self.values.values()):
            raise UserError(f"weights {self.name!r}: not every weight is finite: {self.values}")
        if not any(self.values.values()):
            raise UserError(f"weights {self.name!r}: every weight is 0, so every reward would be 0")

    def vector(self, attribute_names: Sequence[str]) -> list[float]:
        """Weights in the order of a model's outputs.

        Args:
            attribute_names: Names of the model's outputs.

        Returns:
            One weight a name.

        Raises:
            UserError: If an attribute with a weight other than 0 is not among the names.
        """
        missing = [a for a, value in self.values.items() if value and a not in attribute_names]
        if missing:
            raise UserError(
                f"weights {self.name!r} need {', '.join(missing)}, but the model scores "
                f"{', '.join(attribute_names)}: choose another weighting"
            )
        return [float(self.values.get(name, 0.0)) for name in attribute_names]

    def reward(self, scores: Any, attribute_names: Sequence[str]) -> Any:
        """Weighted sum over the last axis.

        Args:
            scores: Array or tensor of shape ``(..., A)``, ratings 0–4.
            attribute_names: The A names of the last axis.

        Returns:
            Rewards of shape ``(...)``, of the type that came in.
        """
        weights = self.vector(attribute_names)
        return sum(weight * scores[..., i] for i, weight in enumerate(weights) if weight)
