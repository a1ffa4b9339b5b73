"""REINFORCE, RLOO and GRPO's advantages: whole responses against a baseline, and no critic."""

from __future__ import annotations

from helpsteer2.modules.on_policy import OnPolicyModule


class ReinforceModule(OnPolicyModule):
    """Makes responses likelier by as much as they earn more than the baseline.

    There is nothing beside the policy. ``advantages`` says which baseline: leave-one-out over the
    responses to a prompt is RLOO, the paper's choice with 4 of them. Arguments are those of
    ``OnPolicyModule``.

    Source: arXiv 2402.14740; arXiv 2410.01257 (HelpSteer2-Preference).
    """

    def set_up(self, seed: int) -> None:
        """Nothing trains beside the policy."""
