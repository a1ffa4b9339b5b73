"""DPO as a pipeline: pairs, log-probabilities of the reference, training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from helpsteer2.pipeline.alignment import Alignment, Model
from helpsteer2.pipeline.stages import Output, Stage, overrides_of


@dataclass(frozen=True)
class DPO(Alignment):
    """A policy, pairs of rated responses, and DPO on them.

    Further arguments are those of ``Alignment``; lengths and precision are also those of the
    reference.

    Args:
        pairs: Settings of ``pairs``: which data, and by what a pair is decided.
        train: Settings of ``train`` for the stage ``dpo``; ``module=dpo`` unless ``choose`` names
            another one, or an experiment.
        reference_logprobs: Settings of ``reference``, for every training.
    """

    pairs: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    reference_logprobs: dict[str, Any] = field(default_factory=dict)

    def stages(self, seed: int) -> Sequence[Stage]:
        """The stages ``sft``, ``pairs``, ``reference`` and ``dpo``, and what is asked for besides.

        Args:
            seed: Seed of every training.
        """
        stages, _ = self.first_stages(seed)
        return stages

    def first_stages(self, seed: int) -> tuple[list[Stage], Model]:
        """The stages up to the first DPO.

        Args:
            seed: Seed of every training.

        Returns:
            The stages and the policy that they make.
        """
        pairs = Stage("pairs", "pairs", {**overrides_of(self.pairs), "splits": ["train"]})
        train = overrides_of(self.train)
        trained, policy = self.trained("", self.start, self.start, train, seed)
        return [*self.start_stages(seed), pairs, *trained], policy

    def trained(
        self, suffix: str, start: Model, reference: Model, train: Mapping[str, Any], seed: int
    ) -> tuple[list[Stage], Model]:
        """One DPO training on the pairs of the same suffix, with its reference.

        Args:
            suffix: Ends the names of the stages.
            start: The policy that training goes on from.
            reference: The policy that it is compared with.
            train: Overrides of ``train``.
            seed: Seed of the training.

        Returns:
            The stages and the policy that they make.

        Raises:
            ConfigError: If the training shall validate.
        """
        pairs = {"data": "groups", "data.path": Output(f"pairs{suffix}", "train.jsonl")}
        logprobs = Stage(f"reference{suffix}", "reference", {
            **overrides_of(self.reference_logprobs), **pairs, "model": reference,
            "lengths.max_prompt_tokens": self.max_prompt_tokens,
            "lengths.max_response_tokens": self.max_response_tokens,
            "splits": ["train"], "precision": self.precision,
        })  # fmt: skip
        read = {**pairs, "reference": Output(logprobs.name, "reference")}
        training = self.training(f"dpo{suffix}", "dpo", train, read, start, seed)
        stages, policy = self.followed(training, suffix, seed)
        return [logprobs, *stages], policy
