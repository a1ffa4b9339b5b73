"""All methods from one policy and by one reward model, so that they can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from helpsteer2.pipeline.iterative_dpo import IterativeDPO
from helpsteer2.pipeline.on_policy import OnPolicy
from helpsteer2.pipeline.stages import Stage
from helpsteer2.pipeline.steerlm import SteerLM2


@dataclass(frozen=True)
class SideBySide(IterativeDPO, OnPolicy, SteerLM2):
    """Iterative DPO, on-policy methods, SteerLM and SteerLM 2.0; arguments are those of all."""

    def stages(self, seed: int) -> Sequence[Stage]:
        """The stages of ``IterativeDPO``, then those of the other methods.

        Args:
            seed: Seed of every training.
        """
        return [*super().stages(seed), *self.on_policy_stages(seed), *self.all_steered(seed)]
