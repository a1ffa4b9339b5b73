"""SteerLM 2.0: a policy learns how likely answers are that have the wanted attributes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from helpsteer2.errors import UserError
from helpsteer2.functional.importance import effective_sample_size, group_log_softmax

Form = Literal["kl", "score"]
"""What is differentiated: the divergence, or weighted log-probabilities. The gradient is one."""

LengthNormalisation = Literal["none", "group_mean"]
"""What a group's loss is divided by: nothing, or the mean length of its responses."""

COLLAPSED = 0.9
"""A group's weights have collapsed if one response has more than this share of them."""

FEW_SAMPLES = 1.5
"""Mean of effective samples a prompt below which weights have collapsed."""

MANY_COLLAPSED = 0.5
"""Share of prompts with one response of nearly all weight above which they have, too."""


@dataclass(frozen=True)
class WeighedResponses:
    """R responses to G prompts, sampled from a proposal Q′(y|a,x): what is known of them.

    A group counts if the target of all its responses is known and finite for one of them. What
    stands at the others is not looked at.

    Attributes:
        logprobs: ``(R,)`` float32 nats, log Qθ(y|a,x) under the policy, summed over the tokens.
        ref_logprobs: ``(R,)`` under the proposal.
        log_targets: ``(R,)`` log P(a|x,y) + log P(y|x), up to a constant a prompt; NaN where
            unknown, −∞ where the answer cannot have the attributes.
        n_tokens: ``(R,)`` int64, tokens of each response.
        owners: ``(R,)`` int64, the group 0 … G−1 of each.
        n_groups: G, each with at least one response.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    log_targets: Tensor
    n_tokens: Tensor
    owners: Tensor
    n_groups: int

    @cached_property
    def counted(self) -> Tensor:
        """``(G,)`` bool, the groups that count."""
        return counted_groups(self.log_targets, self.owners, self.n_groups)

    @cached_property
    def sizes(self) -> Tensor:
        """``(G,)`` int64, responses of each group."""
        return self.owners.bincount(minlength=self.n_groups)

    @property
    def log_ratios(self) -> Tensor:
        """``(R,)`` log Qθ − log Q′ in nats; 0 in groups that do not count."""
        return self._where_counted(self.logprobs - self.ref_logprobs)

    @cached_property
    def log_target_weights(self) -> Tensor:
        """``(R,)`` log w′, w ∝ P(a|x,y)·P(y|x) / Q′(y|a,x): constants."""
        log_weights = self._where_counted((self.log_targets - self.ref_logprobs).detach())
        return group_log_softmax(log_weights, self.owners, self.n_groups)

    @property
    def log_policy_weights(self) -> Tensor:
        """``(R,)`` log b′, b ∝ Qθ(y|a,x) / Q′(y|a,x)."""
        return group_log_softmax(self.log_ratios, self.owners, self.n_groups)

    def by_group(self, values: Tensor) -> Tensor:
        """``(G,)`` sums of ``(R,)`` values."""
        return values.new_zeros(self.n_groups).index_add(0, self.owners, values)

    def _where_counted(self, values: Tensor) -> Tensor:
        """Zeros in groups that do not count, so that no NaN of theirs gets into a gradient."""
        return torch.where(self.counted[self.owners], values, 0.0)


def counted_groups(log_targets: Tensor, owners: Tensor, n_groups: int) -> Tensor:
    """Which groups have targets to learn from.

    Args:
        log_targets: ``(R,)``, NaN where unknown.
        owners: ``(R,)`` int64, the group of each.
        n_groups: G.

    Returns:
        ``(G,)`` bool.
    """
    zeros = torch.zeros(n_groups, dtype=torch.int64, device=owners.device)
    unknown = zeros.index_add(0, owners, log_targets.isnan().long())
    possible = zeros.index_add(0, owners, log_targets.isfinite().long())
    return (unknown == 0) & (possible > 0)


class SteerLM2Loss:
    """``D = Σ_i w′_i log(w′_i / b′_i)`` of every group of responses, w′ constant.

    The policy Qθ(y|a,x) shall become the posterior P(y|a,x) ∝ P(a|x,y)·P(y|x). Both are told by
    weights of n responses that a proposal Q′(y|a,x) has sampled: w′ of what they should be and b′
    of what the policy makes of them, each normalised over the n. At first, where the policy is the
    proposal, b′ is 1/n; where it is the posterior D is 0, whatever the responses. The gradient,
    −Σ (w′_i − b′_i) ∇ log Qθ(y_i), estimates that of KL(P ‖ Qθ) with a bias of the order of 1/n.

    Over an optimizer step the loss is the sum over all micro-batches of all ranks, divided by the
    groups of the step.

    Args:
        form: ``kl`` differentiates D through b′; ``score`` takes the gradient as the paper writes
            it, (b′ − w′) · log Qθ with constant factors. The values and the gradients are the same.
        length_normalisation: ``none`` is the paper's. ``group_mean`` divides the loss of each
            group by the mean number of its responses' tokens, as NeMo-Aligner does: prompts with
            long answers weigh less.

    Raises:
        UserError: If an argument is not one of those named.

    Source: arXiv 2406.08673, section 4.5; NVIDIA/NeMo-Aligner at af2b3bd9, gpt_steerlm_model.py.
    """

    def __init__(
        self, form: Form = "kl", length_normalisation: LengthNormalisation = "none"
    ) -> None:
        for name, value, known in (
            ("form", form, get_args(Form)),
            ("length_normalisation", length_normalisation, get_args(LengthNormalisation)),
        ):
            if value not in known:
                raise UserError(f"module.loss.{name} has to be {' or '.join(known)}, got {value}")
        self.form = form
        self.length_normalisation = length_normalisation

    @property
    def objective(self) -> str:
        """The loss in words, for the model card."""
        formula = "SteerLM 2.0 loss Σ w′ log(w′/b′) towards P(a|x,y)·P(y|x) on sampled responses"
        by_length = self.length_normalisation == "group_mean"
        return f"{formula}, over the mean length of a prompt's responses" if by_length else formula

    def count(self, log_targets: Tensor, owners: Tensor, n_groups: int) -> Tensor:
        """Number of groups that count, the denominator of the loss: ``()`` int64.

        Args:
            log_targets: ``(R,)``, NaN where unknown.
            owners: ``(R,)`` int64, the group of each response.
            n_groups: G.
        """
        return counted_groups(log_targets, owners, n_groups).sum()

    def __call__(self, responses: WeighedResponses) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the losses of the groups that count, whatever autocast says.

        Args:
            responses: What is known of the responses of G groups.

        Returns:
            The loss sum ``()``, and detached sums over the groups that count: ``groups``;
            ``distance`` (D in nats, whatever the normalisation); ``start_distance`` (D of a policy
            that is the proposal: log n less the entropy of w′); ``ess`` (effective samples of w′)
            and ``ess_share`` (of the group's n); ``policy_ess_share`` (of b′: 1 where the policy
            is the proposal); ``collapsed`` (groups in which one response has more than .9 of w′);
            ``kl_to_reference`` (mean of log Q′ − log Qθ over the responses of the group, nats).
        """
        with torch.autocast(responses.logprobs.device.type, enabled=False):
            terms = self._terms(responses)
            losses = responses.by_group(terms)
            figures = _figures(responses, losses.detach())
            if self.length_normalisation == "group_mean":
                tokens = responses.by_group(responses.n_tokens.to(losses.dtype))
                losses = losses * responses.sizes / tokens
            counted = responses.counted
            sums = {name: torch.where(counted, of, 0.0).sum() for name, of in figures.items()}
        return losses.sum(), {"groups": counted.sum(), **sums}

    def _terms(self, responses: WeighedResponses) -> Tensor:
        """``(R,)`` part of each response in its group's D, with the gradient of the form."""
        log_weights, log_policy = responses.log_target_weights, responses.log_policy_weights
        weights = log_weights.exp()
        terms = _weighed(weights, log_weights - log_policy)
        if self.form == "kl":
            return terms
        score = (log_policy.exp() - weights).detach() * responses.log_ratios
        return terms.detach() + (score - score.detach())


def _weighed(weights: Tensor, values: Tensor) -> Tensor:
    """Products, 0 where the weight is: the logarithm of such a weight is −∞."""
    return torch.where(weights > 0, weights * values, 0.0)


def weight_figures(log_weights: Tensor, owners: Tensor, n_groups: int) -> dict[str, Tensor]:
    """How evenly the weight of each group is spread over its responses.

    Args:
        log_weights: ``(R,)`` nats, up to a constant a group.
        owners: ``(R,)`` int64, the group 0 … G−1 of each.
        n_groups: G.

    Returns:
        ``(G,)`` each: ``ess`` (effective samples), ``ess_share`` (of the group's n) and
        ``collapsed`` (1 where one response has more than .9 of the weight).
    """
    weights = group_log_softmax(log_weights, owners, n_groups).exp()
    largest = weights.new_zeros(n_groups).scatter_reduce(0, owners, weights, "amax")
    ess = effective_sample_size(log_weights, owners, n_groups)
    return {
        "ess": ess,
        "ess_share": ess / owners.bincount(minlength=n_groups),
        "collapsed": (largest > COLLAPSED).to(ess.dtype),
    }


@torch.no_grad()
def _figures(responses: WeighedResponses, distances: Tensor) -> dict[str, Tensor]:
    """``(G,)`` figures of each group, as ``SteerLM2Loss`` sums them."""
    owners, n_groups, sizes = responses.owners, responses.n_groups, responses.sizes
    log_weights = responses.log_target_weights
    entropy = -responses.by_group(_weighed(log_weights.exp(), log_weights))
    policy_ess = effective_sample_size(responses.log_policy_weights, owners, n_groups)
    return {
        "distance": distances,
        "start_distance": sizes.to(entropy.dtype).log() - entropy,
        **weight_figures(log_weights, owners, n_groups),
        "policy_ess_share": policy_ess / sizes,
        "kl_to_reference": -responses.by_group(responses.log_ratios) / sizes,
    }


def have_collapsed(effective_samples: float, collapsed: float) -> bool:
    """Whether weights are so uneven that most samples were drawn in vain.

    Args:
        effective_samples: Mean over prompts.
        collapsed: Share of the prompts with one response that has more than ``COLLAPSED`` of their
            weight.
    """
    return effective_samples < FEW_SAMPLES or collapsed > MANY_COLLAPSED
