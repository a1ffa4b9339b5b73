"""Which numbers make sense: ranges by where they stand, and numbers of sampling taken together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helpsteer2.config.rules import Finding, Settings


@dataclass(frozen=True)
class Range:
    """Which numbers a setting may be.

    Attributes:
        words: The same in words, after «has to be».
        holds: Whether a number is one of them; NaN never is.
    """

    words: str
    holds: Callable[[float], bool]


COUNT = Range("1 or more", lambda number: number >= 1)
POSITIVE = Range("a number above 0", lambda number: 0 < number < math.inf)
NOT_NEGATIVE = Range("0 or more", lambda number: 0 <= number < math.inf)
SHARE = Range("0 to 1", lambda number: 0 <= number <= 1)
PART = Range("0 or more and below 1", lambda number: 0 <= number < 1)
MINORITY = Range("0 or more and below 0.5", lambda number: 0 <= number < 0.5)
BETWEEN = Range("between 0 and 1", lambda number: 0 < number < 1)
CONCENTRATION = Range("0.5 to 2000", lambda number: 0.5 <= number <= 2000)

BY_PATH: Mapping[str, Range] = {
    **dict.fromkeys((
        "batching.global_batch", "batching.tokens_per_microbatch", "batching.max_steps",
        "schedule.validate_every", "schedule.checkpoint_every", "schedule.export_every",
        "tokens_per_microbatch", "max_prompts", "max_prompt_tokens",
        "lengths.max_prompt_tokens", "lengths.max_response_tokens", "backbone.lora.rank",
        "module.critic.lora.rank", "rollouts.rewarder.tokens_per_microbatch",
        "pipeline.steerlm2_iterations",
    ), COUNT),
    **dict.fromkeys((
        "batching.epochs", "module.optimizer.lr", "module.gradient_clip", "backbone.lora.alpha",
        "module.loss.beta", "module.loss.eta", "module.critic_lr", "module.critic_gradient_clip",
        "module.critic.lora.alpha",
    ), POSITIVE),
    **dict.fromkeys((
        "seed", "module.warmup_steps", "module.optimizer.weight_decay", "module.sft_weight",
        "min_gap", "module.critic_first_steps", "module.critic_warmup_steps", "rollouts.penalty",
    ), NOT_NEGATIVE),
    **dict.fromkeys(("backbone.lora.dropout", "module.critic.lora.dropout"), PART),
    "module.loss.label_smoothing": MINORITY,
}  # fmt: skip
"""Of numbers that stand in one place."""

SAMPLING: Mapping[str, Range] = {
    "n": COUNT,
    "temperature": Range("0 (greedy) to 100", lambda number: 0 <= number <= 100),
    "top_p": Range("above 0, at most 1 (all tokens)", lambda number: 0 < number <= 1),
    "top_k": Range("0 (all tokens) or more", lambda number: number >= 0),
    "max_tokens": COUNT,
    "seed": Range("0 to 2^63 - 1", lambda number: 0 <= number < 2**63),
}

BY_CLASS: Mapping[str, Mapping[str, Range]] = {
    "helpsteer2.generation.sampling.SamplingParams": SAMPLING,
    "helpsteer2.generation.local.LocalEngine": dict.fromkeys(
        ("max_rows", "cache_tokens", "prefill_tokens", "prompts_per_block"), COUNT
    ),
    "helpsteer2.rollouts.settings.RolloutSettings": {
        "prompts": COUNT, "epochs": COUNT, "max_kl": POSITIVE,
    },
    "helpsteer2.rollouts.advantages.GAE": {"gamma": SHARE, "lam": SHARE},
    "helpsteer2.losses.kl_penalty.KLPenalty": {
        "coefficient": NOT_NEGATIVE, "target": POSITIVE, "horizon": COUNT,
    },
    "helpsteer2.losses.policy_gradient.PolicyGradientLoss": {"entropy": NOT_NEGATIVE},
    "helpsteer2.losses.policy_gradient.ClippedLoss": {
        "clip": BETWEEN, "clip_high": POSITIVE, "entropy": NOT_NEGATIVE,
    },
    "helpsteer2.losses.value.ValueLoss": {"clip": POSITIVE},
    "helpsteer2.world.source.WorldSource": {
        **dict.fromkeys(("groups", "validation_groups", "responses"), COUNT),
        "marked": SHARE,
    },
    "helpsteer2.rewards.likelihood.BetaLikelihood": {
        "concentration": CONCENTRATION,
        "clamp": Range("above 0 and below 0.1", lambda number: 0 < number < 0.1),
        "floor": Range("-708 or more and below 0", lambda number: -708 <= number < 0),
    },
    "helpsteer2.evaluation.ratings.RatingEvaluation": {
        "resamples": COUNT, "calibration_bins": COUNT,
    },
    "helpsteer2.evaluation.preferences.PreferenceEvaluation": {"resamples": COUNT},
    "helpsteer2.evaluation.rewardbench.RewardBench": {"resamples": COUNT},
    "helpsteer2.evaluation.rm_bench.RMBench": {"resamples": COUNT},
    "helpsteer2.evaluation.judge_bench.JudgeBench": {"resamples": COUNT},
    "helpsteer2.evaluation.world_policy.WorldPolicyEvaluation": {"resamples": COUNT},
    "helpsteer2.evaluation.alpha_search.AlphaSearch": {"resamples": COUNT},
    "helpsteer2.evaluation.label_likelihood.LabelLikelihoodEvaluation": {
        "resamples": COUNT, "concentration": CONCENTRATION,
    },
    "helpsteer2.evaluation.steerability.SteerabilityEvaluation": {"resamples": COUNT},
}  # fmt: skip
"""Of arguments of a class, wherever a node builds one; the classes refuse the same numbers."""


def numbers_are_in_range(settings: Settings) -> Iterator[Finding]:
    """Counts, rates, shares and cadences have to be possible ones."""
    for path, wanted in BY_PATH.items():
        yield from _outside(settings, path, wanted)
    for path, target in settings.nodes():
        for name, wanted in BY_CLASS.get(target, {}).items():
            yield from _outside(settings, f"{path}.{name}", wanted)


def _outside(settings: Settings, path: str, wanted: Range) -> Iterator[Finding]:
    value = settings.number(path)
    if value is not None and not wanted.holds(value):
        yield path, f"has to be {wanted.words}, got {value}"


def greedy_samples_differ(settings: Settings) -> Iterator[Finding]:
    """The likeliest response is the same one however often it is taken."""
    for path, target in settings.nodes():
        if not target.endswith(".SamplingParams") or path == ROLLOUT_SAMPLING:
            continue  # a policy that trains is not sampled greedily, whatever n is
        n = settings.number(f"{path}.n") or 1
        if settings.number(f"{path}.temperature") == 0 and n > 1:
            yield f"{path}.n", f"temperature 0 gives {n} times the same response: set {path}.n=1"


AS_IT_IS: Mapping[str, int] = {"temperature": 1, "top_p": 1, "top_k": 0}
"""How a policy is sampled if nothing is done to its distribution."""

ROLLOUT_SAMPLING = "rollouts.sampling"
"""Where the sampling of a policy that trains stands."""


def policies_are_sampled_as_they_are(settings: Settings) -> Iterator[Finding]:
    """A policy gradient, and a KL divergence, are estimated on samples of the policy itself."""
    if settings["rollouts"] is not None:
        yield from _not_as_it_is(settings, ROLLOUT_SAMPLING, "the loss is of the policy as it is")
    for path, target in settings.nodes():
        if target.endswith(".WorldPolicyEvaluation") and settings[f"{path}.reference"] is not None:
            use = "the KL divergence from a reference is of the policy as it is"
            yield from _not_as_it_is(settings, f"{path}.sampling", use)


def _not_as_it_is(settings: Settings, path: str, use: str) -> Iterator[Finding]:
    for name, wanted in AS_IT_IS.items():
        value = settings.number(f"{path}.{name}")
        if value is not None and value != wanted:
            yield f"{path}.{name}", f"has to be {wanted}, got {value}: {use}"
