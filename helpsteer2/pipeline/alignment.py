"""What recipes that align a policy share: where it starts, what scores it, what follows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from helpsteer2.errors import ConfigError
from helpsteer2.pipeline.stages import Output, Stage, overrides_of, require_one_source

Model = str | Output
"""A given folder (or Hub id), or what a stage makes."""


@dataclass(frozen=True)
class Alignment:
    """A policy to start from, and what becomes of every policy that is trained from it.

    Settings of a stage are keys of its command, nested; ``choose`` holds choices of config groups;
    ``@STAGE/PATH`` stands for an output of an earlier stage.

    Args:
        policy: Folder of the policy to start from; None if ``sft`` trains it.
        sft: Settings of ``train`` for the stage ``sft``; None if ``policy`` is given.
        max_prompt_tokens: Longest prompt of every training behind it.
        max_response_tokens: Longest response likewise.
        precision: Of every training behind it.
        select: Settings of ``select`` that choose among the exports of a training, which needs
            ``schedule.export_every``; None takes the last step.
        evaluate: Settings of ``evaluate`` for every policy, the first included; None for none.
    """

    policy: str | None = None
    sft: dict[str, Any] | None = None
    max_prompt_tokens: int = 2048
    max_response_tokens: int = 2048
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    select: dict[str, Any] | None = None
    evaluate: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        require_one_source("policy", self.policy, self.sft, "sft")

    def check_sampled_lengths(self, key: str, settings: Mapping[str, Any]) -> None:
        """Refuse samples that training would cut, and learn behind another prompt than they had.

        Args:
            key: Where the settings stand in the pipeline.
            settings: Overrides of ``sample``.

        Raises:
            ConfigError: If a limit of theirs is above that of the training.
        """
        limits = {
            "max_prompt_tokens": "max_prompt_tokens",
            "sampling.max_tokens": "max_response_tokens",
        }
        for name, limit in limits.items():
            sampled, most = settings.get(name), getattr(self, limit)
            if isinstance(sampled, int) and sampled > most:
                raise ConfigError(
                    f"pipeline.{key}.{name}: {sampled} is above pipeline.{limit}={most}, so "
                    "training would cut what was sampled: lower the one or raise the other"
                )

    @property
    def start(self) -> Model:
        """The policy that trainings start from."""
        return Output("sft", "export") if self.policy is None else self.policy

    def start_stages(self, seed: int) -> list[Stage]:
        """What makes and evaluates the policy that trainings start from.

        Args:
            seed: Seed of its training.
        """
        stages = []
        if self.sft is not None:
            stages.append(Stage("sft", "train", {**overrides_of(self.sft), "seed": seed}))
        return [*stages, *self.evaluated("sft", self.start, seed)]

    def training(
        self,
        name: str,
        module: str,
        train: Mapping[str, Any],
        read: Mapping[str, Any],
        start: Model,
        seed: int,
    ) -> Stage:
        """A training of a policy on one split of groups.

        Args:
            name: Name of the stage.
            module: What trains it, unless the settings choose another, or an experiment.
            train: Overrides of ``train``.
            read: Overrides that say what it reads; they beat the settings, as limits, precision and
                seed do.
            start: The policy that it goes on from.
            seed: Seed of the training.

        Raises:
            ConfigError: If the training shall validate.
        """
        if train.get("schedule.validate_every") is not None:
            raise ConfigError(
                f"stage {name}: schedule.validate_every: its groups are one split, there is "
                "nothing to validate on; pipeline.select chooses a checkpoint"
            )
        # An override would beat the module that an experiment chooses.
        chosen = {} if train.get("experiment") else {"module": module}
        return Stage(name, "train", {
            "backbone": "local", **chosen, **train, **read,
            "lengths.max_prompt_tokens": self.max_prompt_tokens,
            "lengths.max_response_tokens": self.max_response_tokens,
            "backbone.path": start, "trainer.precision": self.precision,
            "++schedule.validate_every": None, "optimized_metric": None, "seed": seed,
        })  # fmt: skip

    def followed(self, training: Stage, suffix: str, seed: int) -> tuple[list[Stage], Model]:
        """A training, the choice among its exports and its evaluation, as asked for.

        Args:
            training: The training of a policy.
            suffix: Ends the name of the choice.
            seed: Seed of samples.

        Returns:
            The stages and the policy that they make.
        """
        stages, policy = [training], Output(training.name, "export")
        if self.select is not None:
            name = f"select{suffix}"
            candidates = {"candidates": Output(training.name, "exports"), "seed": seed}
            stages.append(Stage(name, "select", {**overrides_of(self.select), **candidates}))
            policy = Output(name, "export")
        return [*stages, *self.evaluated(training.name, policy, seed)], policy

    def evaluated(self, name: str, policy: Model, seed: int) -> list[Stage]:
        """The evaluation of a policy, if one is asked for.

        Args:
            name: What the policy is called.
            policy: The policy.
            seed: Seed of its samples and of the bootstrap.
        """
        if self.evaluate is None:
            return []
        settings = {**overrides_of(self.evaluate), "model": policy, "seed": seed}
        return [Stage(f"evaluate_{name}", "evaluate", settings)]


@dataclass(frozen=True)
class RewardedAlignment(Alignment):
    """A reward model beside the policy. Further arguments are those of ``Alignment``.

    Args:
        reward_model: Folder of the reward model; None if ``reward`` trains it.
        reward: Settings of ``train`` for the stage ``reward_model``; None if that is given.
        weights: Weighting, by its name in the config group, that makes one reward of the scores.
            No reward model is trained again for another one.
    """

    reward_model: str | None = None
    reward: dict[str, Any] | None = None
    weights: str = "helpsteer2_rlhf"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_source("reward_model", self.reward_model, self.reward, "reward")

    @property
    def scorer(self) -> Model:
        """The reward model."""
        if self.reward_model is None:
            return Output("reward_model", "export")
        return self.reward_model

    def reward_stages(self, seed: int) -> list[Stage]:
        """What trains the reward model, unless it is given.

        Args:
            seed: Seed of its training.
        """
        if self.reward is None:
            return []
        return [Stage("reward_model", "train", {**overrides_of(self.reward), "seed": seed})]
