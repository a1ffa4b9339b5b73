"""The oracle in the place of a reward model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.data.groups import Group
from helpsteer2.world.oracle import rate_answer
from helpsteer2.world.tasks import parse_task


class OracleScorer:
    """Scores answers to prompts of the world by what they deserve; used like ``RewardScorer``."""

    attribute_names = HELPSTEER2_ATTRIBUTES
    model_hash = "oracle of the made-up world"

    def score(self, groups: Iterable[Group]) -> Iterator[npt.NDArray[np.float32]]:
        """Score groups as they come.

        Args:
            groups: Prompts of the world with n ≥ 1 responses each.

        Yields:
            ``(n, 5)`` float32 ratings 0–4 of each group.

        Raises:
            UserError: If a prompt is none of the world.
        """
        for group in groups:
            task = parse_task(group.prompt)
            ratings = [rate_answer(task, response) for response in group.responses]
            yield np.array(ratings, dtype=np.float32)
