"""SteerLM 2.0: a policy that reads attributes learns which answers have them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from helpsteer2.data.packing import PackedBatch
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.errors import UserError
from helpsteer2.losses.steerlm2 import (
    SteerLM2Loss,
    WeighedResponses,
    have_collapsed,
    weight_figures,
)
from helpsteer2.modules.step import Decay, OptimizerFactory, StepModule

if TYPE_CHECKING:
    from helpsteer2.models.policy import Policy

logger = logging.getLogger(__name__)

SUMS = (
    "groups", "distance", "start_distance", "ess", "ess_share", "collapsed", "policy_ess_share",
    "kl_to_reference",
)  # fmt: skip
"""What ``SteerLM2Loss`` sums, in the order in which a step adds it up over ranks."""


class SteerLM2Module(StepModule):
    """Teaches a policy the posterior P(y|a,x) ∝ P(a|x,y)·P(y|x), on responses of a proposal.

    Every group is a prompt with its attribute label, and responses that the proposal has sampled
    for them. The ``rewards`` of the responses are log P(a|x,y) + log P(y|x) (``helpsteer2 weigh``
    makes them), and the reference is the proposal: its log-probabilities are columns of the data
    (``helpsteer2 reference`` computes them), so no second model is in memory.

    Groups with one response, or of equal ones, teach nothing: whatever the policy, both weights
    of what they say are the same. They are left out before the first step.

    Args:
        model: The policy.
        loss: The loss of a group.
        optimizer: Makes the optimizer from parameter groups.
        warmup_steps: Step s (0-based) runs at ``lr · min(1, (s + 1) / warmup_steps)``.
        decay: The rate after the warm-up: ``constant`` as in the paper, or ``linear`` to 0.
        gradient_clip: Largest gradient norm; None does not clip.

    Source: arXiv 2406.08673, section 4.5.
    """

    needs_reference: ClassVar[bool] = True
    model: Policy

    def __init__(
        self,
        model: Policy,
        *,
        loss: SteerLM2Loss,
        optimizer: OptimizerFactory,
        warmup_steps: int = 10,
        decay: Decay = "constant",
        gradient_clip: float | None = 1.0,
    ) -> None:
        super().__init__(
            model,
            optimizer=optimizer,
            warmup_steps=warmup_steps,
            decay=decay,
            gradient_clip=gradient_clip,
        )
        self.loss = loss
        self.objective = loss.objective

    @classmethod
    def usable(cls, groups: TokenisedGroups, split: str) -> TokenisedGroups:
        """The groups with targets and different responses; says how even their weights are."""
        return weighed_groups(groups, split)

    def count(self, batch: PackedBatch) -> Tensor:
        """Groups of a micro-batch that have targets."""
        return self.loss.count(batch.rewards, batch.response_groups, len(batch.group_indices))

    def loss_sums(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Losses of the groups; logged are the figures of the loss."""
        loss, sums = self.loss(self._responses(batch))
        return loss.reshape(1), torch.stack([sums[name].float() for name in SUMS])

    def step_metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Means over the groups of the step; see ``weight_metrics``."""
        return {f"train/{name}": value for name, value in weight_metrics(sums).items()}

    def _responses(self, batch: PackedBatch) -> WeighedResponses:
        """What is known of the responses of a packed row."""
        tokens = self.model.response_logprobs(batch)
        lengths = list(chain.from_iterable(batch.layout.response_lengths))
        return WeighedResponses(
            logprobs=tokens.sum_by_response(tokens.logprobs),
            ref_logprobs=batch.ref_logprobs,
            log_targets=batch.rewards,
            n_tokens=torch.tensor(lengths, device=batch.input_ids.device),
            owners=batch.response_groups,
            n_groups=len(batch.group_indices),
        )

    def validation_columns(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """A row a response: the columns of ``WeighedResponses``; none of a filler."""
        found = self._responses(batch)
        columns = (
            batch.group_indices[found.owners], found.logprobs, found.ref_logprobs,
            found.log_targets, found.n_tokens,
        )  # fmt: skip
        # A filler repeats a group, and its rows would be taken for more responses of that one.
        return tuple(column[:0] if batch.filler else column for column in columns)

    def validation_metrics(self, groups: np.ndarray, *columns: np.ndarray) -> dict[str, float]:
        """Loss, and the figures of ``weight_metrics``."""
        indices, owners = np.unique(groups, return_inverse=True)
        own, reference, targets, n_tokens, of_group = map(torch.from_numpy, (*columns, owners))
        responses = WeighedResponses(own, reference, targets, n_tokens, of_group, len(indices))
        loss, sums = self.loss(responses)
        metrics = weight_metrics([float(sums[name]) for name in SUMS])
        mean = float(loss / sums["groups"])
        return {f"val/{name}": value for name, value in {"loss": mean, **metrics}.items()}


def weight_metrics(sums: Sequence[float]) -> dict[str, float]:
    """Means over groups.

    Args:
        sums: What ``SteerLM2Loss`` sums over at least one group, in the order of ``SUMS``.

    Returns:
        ``distance`` (D, nats) and ``start_distance`` (what D would be if the policy were the
        proposal still); ``ess`` (effective samples of a group) and ``ess_share`` (of its n);
        ``policy_ess_share`` (1 where the policy is the proposal, small where it has gone so far
        that few of the samples tell what it does); ``collapsed`` (share of groups in which one
        response has nearly all weight); and ``kl_to_reference``: the mean of log Q′ − log Qθ, in
        nats a response, the k1 estimator of KL(Q′ ‖ Qθ).
    """
    groups, *figures = sums
    return {name: value / groups for name, value in zip(SUMS[1:], figures, strict=True)}


def weighed_groups(groups: TokenisedGroups, split: str) -> TokenisedGroups:
    """Keep the groups that teach something; say and record how many others there were.

    Args:
        groups: A split, with the log-probabilities of the proposal.
        split: Its name, for messages.

    Returns:
        Those with responses that differ in their ids. Their report has ``groups_weighed``,
        ``groups_of_one_response`` and ``groups_of_equal_responses``, the last two left out.

    Raises:
        UserError: If the target of a response is not known, or no group is left.
    """
    owners = np.repeat(np.arange(len(groups)), groups.n_responses)
    lacking = np.unique(owners[~np.isfinite(groups.rewards)])
    if len(lacking):
        raise UserError(
            f"{len(lacking)} of {len(groups)} groups of the {split} data lack the rewards of their "
            f"responses, log P(a|x,y) + log P(y|x) (the first is {groups.ids[int(lacking[0])]!r}): "
            "make groups that have them with helpsteer2 weigh, and set data=groups data.path=…"
        )
    alone = groups.n_responses == 1
    equal = np.zeros(len(groups), dtype=bool)
    for i in range(len(groups)):
        first, *others = groups[i].response_ids
        equal[i] = not alone[i] and all(np.array_equal(first, other) for other in others)
    kept = ~alone & ~equal
    counts = {
        "groups_weighed": int(kept.sum()),
        "groups_of_one_response": int(alone.sum()),
        "groups_of_equal_responses": int(equal.sum()),
    }
    if not kept.any():
        raise UserError(
            f"no group of the {split} data has two different responses, so there is nothing to "
            "learn or to measure: sample more of them with helpsteer2 sample sampling.n=10"
        )
    if not kept.all():
        logger.info(
            "%s: %d groups; %d of one response and %d of equal responses are left out",
            split,
            *counts.values(),
        )
    log_weights = groups.rewards - groups.ref_logprobs
    _tell_of_weights(log_weights[kept[owners]], groups.n_responses[kept], split)
    return groups.select(np.flatnonzero(kept), counts)


def _tell_of_weights(log_weights: np.ndarray, sizes: np.ndarray, split: str) -> None:
    """Say how many samples of a prompt count, and warn if it is hardly more than one."""
    owners = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
    figures = weight_figures(torch.from_numpy(log_weights).double(), owners, len(sizes))
    ess, collapsed = float(figures["ess"].mean()), float(figures["collapsed"].mean())
    told = (
        f"{split}: of {sizes.mean():.1f} responses a prompt {ess:.1f} count effectively; in "
        f"{collapsed:.0%} of the groups one response has more than 90 % of the weight"
    )
    if have_collapsed(ess, collapsed):
        logger.warning(
            "%s. Training will learn little more than one response a prompt: weigh with a lower "
            "likelihood.concentration or likelihood.combine=mean, or sample more responses a "
            "prompt (sampling.n), from a proposal that is nearer to the labels",
            told,
        )
    else:
        logger.info("%s", told)
