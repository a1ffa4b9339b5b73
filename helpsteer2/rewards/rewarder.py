"""What gives scores, wherever it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from helpsteer2.data.groups import Group

Scores = npt.NDArray[np.float32]


class Scorer(Protocol):
    """Whatever gives every response of a group one score an attribute."""

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the A scores."""
        ...

    def score(self, groups: Iterable[Group]) -> Iterator[Scores]:
        """Stream the ``(n, A)`` scores of each group, in order."""
        ...


class Rewarder(Scorer, Protocol):
    """A reward model in this process or behind a server, or an oracle."""

    @property
    def model_hash(self) -> str:
        """What tells the model from any other that would score otherwise."""
        ...
