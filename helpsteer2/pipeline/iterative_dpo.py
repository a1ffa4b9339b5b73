"""Iterative DPO as a pipeline: DPO on ratings, then on samples that the reward model has scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from helpsteer2.errors import ConfigError
from helpsteer2.pipeline.alignment import Model, RewardedAlignment
from helpsteer2.pipeline.dpo import DPO
from helpsteer2.pipeline.stages import Output, Stage, overrides_of


@dataclass(frozen=True)
class IterativeDPO(DPO, RewardedAlignment):
    """DPO on pairs of rated responses, then iterations of sampling, scoring and DPO.

    An iteration samples n responses a prompt from the policy so far, scores them by the reward
    model, pairs the best with the worst, and goes on training. Further arguments are those of
    ``DPO`` and ``RewardedAlignment``; the weights decide the pairs alone.

    Args:
        iterations: How many.
        reference: Which policy an iteration is compared with: the one before any DPO, or the one
            that the iteration starts from.
        sample: Settings of ``sample``: which prompts, and how to draw. Neither prompts nor samples
            may be longer than DPO takes them.
        annotate: Settings of ``annotate``.
        scored_pairs: Settings of ``pairs`` in the iterations.
        train_again: Settings of ``train`` in the iterations, where they differ from those of the
            first DPO.

    Source: arXiv 2406.08673, section 4.3. It does not state the reference of its iteration.
    """

    iterations: int = 1
    reference: Literal["initial", "previous"] = "previous"
    sample: dict[str, Any] = field(default_factory=dict)
    annotate: dict[str, Any] = field(default_factory=dict)
    scored_pairs: dict[str, Any] = field(default_factory=dict)
    train_again: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise ConfigError(
                f"pipeline.iterations: has to be 1 or more, got {self.iterations}; without any it "
                "is pipeline=dpo"
            )
        self.check_sampled_lengths("sample", overrides_of(self.sample))

    def stages(self, seed: int) -> Sequence[Stage]:
        """The stages of ``DPO``, ``reward_model``, and those of each iteration.

        Args:
            seed: Seed of every training; iterations draw other samples.
        """
        stages, policy = self.first_stages(seed)
        stages += self.reward_stages(seed)
        for number in range(1, self.iterations + 1):
            suffix = f"_{number}"
            stages += self._scored_pairs(suffix, policy, 1000 * seed + number)
            reference = self.start if self.reference == "initial" else policy
            train = {**overrides_of(self.train), **overrides_of(self.train_again)}
            trained, policy = self.trained(suffix, policy, reference, train, seed)
            stages += trained
        return stages

    def _scored_pairs(self, suffix: str, policy: Model, seed: int) -> list[Stage]:
        """Samples of a policy, their scores, and pairs of them."""

        def groups(stage: str) -> dict[str, Any]:
            return {"data": "groups", "data.path": Output(f"{stage}{suffix}", "groups.jsonl")}

        return [
            Stage(f"sample{suffix}", "sample", {
                "max_prompt_tokens": self.max_prompt_tokens, **overrides_of(self.sample),
                "model": policy, "seed": seed,
            }),
            Stage(f"annotate{suffix}", "annotate", {
                **overrides_of(self.annotate), **groups("sample"), "model": self.scorer,
            }),
            Stage(f"pairs{suffix}", "pairs", {
                "weights": self.weights, **overrides_of(self.scored_pairs), **groups("annotate"),
                "by": "scores", "splits": ["train"],
            }),
        ]  # fmt: skip
