"""SteerLM and SteerLM 2.0 as pipelines: a policy that answers as a label asks, then better so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from helpsteer2.errors import ConfigError
from helpsteer2.pipeline.alignment import Model, RewardedAlignment
from helpsteer2.pipeline.stages import Output, Stage, overrides_of

BOOTSTRAP = ("sample", "annotate", "label", "train")
"""Commands of the second round of SteerLM, by which its settings go."""


@dataclass(frozen=True)
class SteerLM(RewardedAlignment):
    """Fine-tuning on answers behind labels of what they are like, as the reward model sees them.

    The reward model stands for SteerLM's generative attribute prediction model. Further arguments
    are those of ``RewardedAlignment``.

    Args:
        annotate_sft: Settings of ``annotate``: which answers are labelled and learned.
        label: Settings of ``label`` for them.
        steerlm: Settings of ``train`` for the stage ``steerlm``; it starts from the policy.
        bootstrap: Settings by stage (``sample``, ``annotate``, ``label``, ``train``) of a second
            round, on what the policy answers to its labels itself; None leaves it out.

    Source: arXiv 2310.05344 (its steps 2 to 4); arXiv 2406.08673, section 4.
    """

    annotate_sft: dict[str, Any] = field(default_factory=dict)
    label: dict[str, Any] = field(default_factory=dict)
    steerlm: dict[str, Any] = field(default_factory=dict)
    bootstrap: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.bootstrap or {} if name not in BOOTSTRAP]
        if unknown:
            raise ConfigError(
                f"pipeline.bootstrap: has no stage {', '.join(map(repr, unknown))}, only "
                f"{', '.join(BOOTSTRAP)}"
            )
        sample = overrides_of((self.bootstrap or {}).get("sample") or {})
        self.check_sampled_lengths("bootstrap.sample", sample)

    def stages(self, seed: int) -> Sequence[Stage]:
        """The stages ``sft``, ``reward_model``, ``annotate_sft``, ``label`` and ``steerlm``.

        Args:
            seed: Seed of every training.
        """
        stages, _ = self.steered_stages(seed)
        return [*self.start_stages(seed), *self.reward_stages(seed), *stages]

    def steered_stages(self, seed: int) -> tuple[list[Stage], Model]:
        """The stages behind the policy to start from and the reward model.

        Args:
            seed: Seed of every training.

        Returns:
            The stages and the policy that they make.
        """
        stages = [
            Stage("annotate_sft", "annotate", {
                **overrides_of(self.annotate_sft), "model": self.scorer,
            }),
            _labelled("label", "annotate_sft", overrides_of(self.label), seed),
        ]  # fmt: skip
        train = overrides_of(self.steerlm)
        trained, policy = self._conditioned("steerlm", "", "label", self.start, train, seed)
        stages += trained
        if self.bootstrap is not None:
            again, policy = self._bootstrapped(policy, seed)
            stages += again
        return stages, policy

    def _bootstrapped(self, policy: Model, seed: int) -> tuple[list[Stage], Model]:
        """Samples of the policy behind its labels, labelled as they turned out, and learned."""
        settings = {
            name: overrides_of((self.bootstrap or {}).get(name) or {}) for name in BOOTSTRAP
        }
        stages = [
            Stage("bootstrap_sample", "sample", {
                **groups_of("label", "train.jsonl"), "max_prompt_tokens": self.max_prompt_tokens,
                **settings["sample"], "model": policy, "seed": 1000 * seed,
            }),
            Stage("bootstrap_annotate", "annotate", {
                **settings["annotate"], **groups_of("bootstrap_sample"), "model": self.scorer,
            }),
            _labelled("bootstrap_label", "bootstrap_annotate", settings["label"], seed),
        ]  # fmt: skip
        train = {**overrides_of(self.steerlm), **settings["train"]}
        trained, policy = self._conditioned(
            "steerlm_bootstrap", "_bootstrap", "bootstrap_label", policy, train, seed
        )
        return [*stages, *trained], policy

    def _conditioned(
        self,
        name: str,
        suffix: str,
        labelled: str,
        start: Model,
        train: Mapping[str, Any],
        seed: int,
    ) -> tuple[list[Stage], Model]:
        """Supervised fine-tuning on labelled answers."""
        read = groups_of(labelled, "train.jsonl")
        start = train.get("backbone.path", start)
        training = self.training(name, "sft", train, read, start, seed)
        return self.followed(training, suffix, seed)


@dataclass(frozen=True)
class SteerLM2(SteerLM):
    """SteerLM, then iterations that bring the policy to P(y|a,x) ∝ P(a|x,y)·P(y|x).

    An iteration samples n answers a prompt behind its label from the policy so far, Q′. The reward
    model says how likely the label is for each, P(a|x,y); the policy without labels how likely the
    answer, P(y|x); Q′ likewise. Their weights are then learned. Further arguments are those of
    ``SteerLM``.

    Args:
        steerlm2_iterations: How many.
        targets: Where the labels of the prompts come from: ``data`` (prompts and labels are those
            of the labelled answers), ``distribution`` (the labels of those answers, dealt out anew
            to ``label_prompts``) or ``fixed`` (``sample_steered.steering`` for all of them).
        label_prompts: Which prompts, as ``choose.data`` and its settings; not read for ``data``.
        sample_steered: Settings of ``sample``. Neither prompts nor samples may be longer than the
            training takes them.
        annotate_steered: Settings of ``annotate`` for the samples.
        sequence_logprobs: Settings of ``reference``, for prior and proposal.
        weigh: Settings of ``weigh``.
        steerlm2: Settings of ``train`` for the iterations; ``module=steerlm2`` unless ``choose``
            names an experiment.

    Source: arXiv 2406.08673, section 4.5.
    """

    steerlm2_iterations: int = 2
    targets: Literal["data", "distribution", "fixed"] = "distribution"
    label_prompts: dict[str, Any] = field(default_factory=dict)
    sample_steered: dict[str, Any] = field(default_factory=dict)
    annotate_steered: dict[str, Any] = field(default_factory=dict)
    sequence_logprobs: dict[str, Any] = field(default_factory=dict)
    weigh: dict[str, Any] = field(default_factory=dict)
    steerlm2: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steerlm2_iterations < 1:
            raise ConfigError(
                "pipeline.steerlm2_iterations: has to be 1 or more, got "
                f"{self.steerlm2_iterations}; without any it is pipeline=steerlm"
            )
        if self.targets != "data" and "data" not in overrides_of(self.label_prompts):
            raise ConfigError(
                f"pipeline.label_prompts: targets={self.targets} needs prompts to ask: "
                "pipeline.label_prompts.choose.data=NAME, or pipeline.targets=data"
            )
        steering = self.sample_steered.get("steering")
        if (self.targets == "fixed") != (steering is not None):
            raise ConfigError(
                "pipeline.sample_steered.steering: is for targets=fixed, which needs it, and for "
                f"no other; targets is {self.targets}"
            )
        self.check_sampled_lengths("sample_steered", overrides_of(self.sample_steered))

    def stages(self, seed: int) -> Sequence[Stage]:
        """The stages of ``SteerLM``, and those of each iteration.

        Args:
            seed: Seed of every training; iterations draw other labels and samples.
        """
        return [*self.start_stages(seed), *self.reward_stages(seed), *self.all_steered(seed)]

    def all_steered(self, seed: int) -> list[Stage]:
        """The stages behind the policy to start from and the reward model.

        Args:
            seed: Seed of every training.
        """
        stages, policy = self.steered_stages(seed)
        for number in range(1, self.steerlm2_iterations + 1):
            weighed = self._weighed(f"_{number}", policy, 1000 * seed + number)
            trained, policy = self._trained(f"_{number}", policy, seed)
            stages += [*weighed, *trained]
        return stages

    def _weighed(self, suffix: str, policy: Model, seed: int) -> list[Stage]:
        """Samples of a policy behind labels, the three log-probabilities of each, its weights."""
        stages, prompts = self._asked(suffix, seed)
        samples, scores = f"steered{suffix}", f"annotate_steered{suffix}"
        logprobs = {
            **overrides_of(self.sequence_logprobs), **groups_of(samples), "splits": ["train"],
            "lengths.max_prompt_tokens": self.max_prompt_tokens,
            "lengths.max_response_tokens": self.max_response_tokens,
            "precision": self.precision,
        }  # fmt: skip
        return [
            *stages,
            Stage(samples, "sample", {
                "max_prompt_tokens": self.max_prompt_tokens, **overrides_of(self.sample_steered),
                **prompts, "model": policy, "seed": seed,
            }),
            Stage(scores, "annotate", {
                **overrides_of(self.annotate_steered), **groups_of(samples), "model": self.scorer,
            }),
            Stage(f"prior{suffix}", "reference", {
                **logprobs, "model": self.start, "labels": False,
            }),
            Stage(f"proposal{suffix}", "reference", {**logprobs, "model": policy}),
            Stage(f"weigh{suffix}", "weigh", {
                **overrides_of(self.weigh), **groups_of(scores), "model": policy,
                "prior": Output(f"prior{suffix}", "reference"),
                "proposal": Output(f"proposal{suffix}", "reference"),
            }),
        ]  # fmt: skip

    def _asked(self, suffix: str, seed: int) -> tuple[list[Stage], dict[str, Any]]:
        """Prompts with their labels: what makes them, and where ``sample`` reads them."""
        if self.targets == "data":
            return [], groups_of("label", "train.jsonl")
        prompts = overrides_of(self.label_prompts)
        if self.targets == "fixed":
            return [], prompts
        name = f"targets{suffix}"
        drawn = {
            "by": "distribution",
            "data@labels": "groups",
            "labels.path": Output("label", "train.jsonl"),
        }
        stage = Stage(name, "label", {**prompts, **drawn, "splits": ["train"], "seed": seed})
        return [stage], groups_of(name, "train.jsonl")

    def _trained(self, suffix: str, policy: Model, seed: int) -> tuple[list[Stage], Model]:
        """Training on the weights."""
        train, proposal = overrides_of(self.steerlm2), Output(f"proposal{suffix}", "reference")
        read = {**groups_of(f"weigh{suffix}"), "reference": proposal}
        training = self.training(f"steerlm2{suffix}", "steerlm2", train, read, policy, seed)
        return self.followed(training, f"_steerlm2{suffix}", seed)


def groups_of(stage: str, file: str = "groups.jsonl") -> dict[str, Any]:
    """Overrides that read what a stage has written."""
    return {"data": "groups", "data.path": Output(stage, file)}


def _labelled(name: str, scored: str, settings: Mapping[str, Any], seed: int) -> Stage:
    """Labels of answers, by their scores."""
    by_scores = {"by": "scores", "splits": ["train"], "seed": seed}
    return Stage(name, "label", {**settings, **groups_of(scored), **by_scores})
