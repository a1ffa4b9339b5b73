"""PPO, RLOO and their kin as a pipeline: each learns from samples of its own, from one policy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from helpsteer2.errors import ConfigError
from helpsteer2.pipeline.alignment import RewardedAlignment
from helpsteer2.pipeline.stages import Output, Stage, overrides_of

_NAME = re.compile(r"\w[\w-]*")
"""What a folder of a stage may begin with, and a key of the command line be."""


@dataclass(frozen=True)
class OnPolicy(RewardedAlignment):
    """A policy, a reward model, and trainings on samples that it has scored.

    Every method starts from the same policy; rewards get mean 0 and standard deviation 1 over a
    data set. Further arguments are those of ``RewardedAlignment``.

    Args:
        methods: Settings of ``train`` by name, which is the stage's name as well; each chooses a
            ``module`` or an experiment. One set to None is left out.
        prompts: Settings that choose the data of every method, of which the prompts are read:
            ``choose: {data: NAME}`` and ``data: {…}``.
        statistics: Settings of ``annotate`` for the stage ``statistics``, whose mean and standard
            deviation the rewards are measured by; over the data of the prompts, unless ``choose``
            names other data.

    Source: arXiv 2406.08673, section 4.3 (the reward of PPO).
    """

    methods: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self._trainings:
            raise ConfigError(
                "pipeline.methods: there is none: +pipeline.methods.ppo.choose.module=ppo would be "
                "one, +pipeline.methods.rloo.choose.module=reinforce another"
            )
        for name, train in self._trainings.items():
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"pipeline.methods.{name}: a stage is named after it: letters, digits, _ and -"
                )
            if not {"module", "experiment"} & train.keys():
                raise ConfigError(
                    f"pipeline.methods.{name}: does not say what it is: add choose.module=ppo or "
                    "reinforce, or choose.experiment=… of one of them"
                )

    @property
    def _trainings(self) -> Mapping[str, dict[str, Any]]:
        """Overrides of ``train``, by the name of the method."""
        return {
            name: overrides_of(settings)
            for name, settings in self.methods.items()
            if settings is not None
        }

    def stages(self, seed: int) -> Sequence[Stage]:
        """The stages ``sft``, ``reward_model``, ``statistics``, and one a method.

        Args:
            seed: Seed of every training.
        """
        return [*self.start_stages(seed), *self.reward_stages(seed), *self.on_policy_stages(seed)]

    def on_policy_stages(self, seed: int) -> list[Stage]:
        """The stage ``statistics``, and those of every method.

        Args:
            seed: Seed of every training.
        """
        prompts, statistics = overrides_of(self.prompts), overrides_of(self.statistics)
        data = {} if "data" in statistics else prompts
        stages = [Stage("statistics", "annotate", {**data, **statistics, "model": self.scorer})]
        for name, train in self._trainings.items():
            training = Stage(name, "train", {
                # What a method may set otherwise, then what all of them share.
                "backbone": "local", "weights": self.weights, **prompts,
                "rollouts.statistics": Output("statistics", "statistics.json"),
                **train,
                "backbone.path": self.start, "reward_model": self.scorer,
                "lengths.max_prompt_tokens": self.max_prompt_tokens,
                "lengths.max_response_tokens": self.max_response_tokens,
                "trainer.precision": self.precision, "seed": seed,
            })  # fmt: skip
            trained, _ = self.followed(training, f"_{name}", seed)
            stages += trained
        return stages
