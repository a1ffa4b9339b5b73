"""DPO as a pipeline: pairs, log-probabilities of the reference, training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from helpsteer2.errors import ConfigError
from helpsteer2.pipeline.stages import Output, Stage, overrides_of, require_one_source

Model = str | Output
"""A given folder (or Hub id), or what a stage makes."""


@dataclass(frozen=True)
class DPO:
    """A policy, pairs of rated responses, and DPO on them.

    Settings of a stage are keys of its command, nested; ``choose`` holds choices of config groups;
    ``@STAGE/PATH`` stands for an output of an earlier stage.

    Args:
        policy: Folder of the policy to start from; None if ``sft`` trains it.
        sft: Settings of ``train`` for the stage ``sft``; None if ``policy`` is given.
        pairs: Settings of ``pairs``: which data, and by what a pair is decided.
        train: Settings of ``train`` for the stage ``dpo``; ``module=dpo`` unless ``choose`` names
            another one, or an experiment.
        reference_logprobs: Settings of ``reference``, for every training.
        max_prompt_tokens: Longest prompt of every DPO training and of its reference.
        max_response_tokens: Longest response likewise.
        precision: Of every DPO training and of its reference.
        select: Settings of ``select`` that choose among the exports of a training, which needs
            ``schedule.export_every``; None takes the last step.
        evaluate: Settings of ``evaluate`` for every policy, the first included; None for none.
    """

    policy: str | None = None
    sft: dict[str, Any] | None = None
    pairs: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    reference_logprobs: dict[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int = 2048
    max_response_tokens: int = 2048
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    select: dict[str, Any] | None = None
    evaluate: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        require_one_source("policy", self.policy, self.sft, "sft")

    def stages(self, seed: int) -> Sequence[Stage]:
        """The stages ``sft``, ``pairs``, ``reference`` and ``dpo``, and what is asked for besides.

        Args:
            seed: Seed of every training.
        """
        stages, _, _ = self.first_stages(seed)
        return stages

    def first_stages(self, seed: int) -> tuple[list[Stage], Model, Model]:
        """The stages up to the first DPO.

        Args:
            seed: Seed of every training.

        Returns:
            The stages, the policy before and the policy after it.
        """
        stages: list[Stage] = []
        start: Model = Output("sft", "export") if self.policy is None else self.policy
        if self.sft is not None:
            stages.append(Stage("sft", "train", {**overrides_of(self.sft), "seed": seed}))
        stages += self.evaluated("sft", start, seed)
        stages.append(Stage("pairs", "pairs", {**overrides_of(self.pairs), "splits": ["train"]}))
        trained, policy = self.trained("", start, start, overrides_of(self.train), seed)
        return [*stages, *trained], start, policy

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
        pairs = {
            "data": "groups",
            "data.path": Output(f"pairs{suffix}", "train.jsonl"),
            "lengths.max_prompt_tokens": self.max_prompt_tokens,
            "lengths.max_response_tokens": self.max_response_tokens,
        }
        logprobs = Stage(f"reference{suffix}", "reference", {
            **overrides_of(self.reference_logprobs), **pairs, "model": reference,
            "splits": ["train"], "precision": self.precision,
        })  # fmt: skip
        name = f"dpo{suffix}"
        if "schedule.validate_every" in train:
            raise ConfigError(
                f"stage {name}: schedule.validate_every: the pairs are one split, there is nothing "
                "to validate on; pipeline.select chooses a checkpoint"
            )
        # An override would beat the module that an experiment chooses.
        module = {} if train.get("experiment") else {"module": "dpo"}
        training = Stage(name, "train", {
            "backbone": "local", **module, **train, **pairs,
            "backbone.path": start, "reference": Output(logprobs.name, "reference"),
            "trainer.precision": self.precision, "++schedule.validate_every": None,
            "optimized_metric": None, "seed": seed,
        })  # fmt: skip
        stages, policy = [logprobs, training], Output(name, "export")
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
