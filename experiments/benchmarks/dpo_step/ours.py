"""Contenders: this project's DPO step, and its stage that computes the reference log-probs."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from experiments.benchmarks.dpo_step.job import BETA, DPOJob
from experiments.benchmarks.reward_step.cost import Tally
from experiments.benchmarks.reward_step.job import LEARNING_RATE
from experiments.benchmarks.reward_step.ours import train_in_turns
from experiments.benchmarks.reward_step.turns import Turns
from helpsteer2.data.packing import pack
from helpsteer2.data.planner import consecutive_bins
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.losses.dpo import DPOLoss
from helpsteer2.models.policy import Policy
from helpsteer2.models.reference import reference_split
from helpsteer2.modules.dpo import DPOModule


def run(turns: Turns, job: DPOJob, reference_alone: bool = False) -> None:
    """Train, one step a turn; or compute the reference log-probs of a step's groups, a step a turn.

    Args:
        turns: The turns.
        job: What to train on.
        reference_alone: Whether to do the latter.
    """
    policy, groups = job.policy(), job.groups()
    if reference_alone:
        _refer_in_turns(turns, job, policy.eval(), groups)
        return
    reference = _reference(job, policy.eval(), groups)
    module = DPOModule(
        policy,
        loss=DPOLoss(BETA),
        optimizer=partial(torch.optim.AdamW, lr=LEARNING_RATE, fused=True),
    )
    train_in_turns(turns, job, module, groups.with_ref_logprobs(reference.sums()))


def _reference(job: DPOJob, policy: Policy, groups: TokenisedGroups) -> Any:
    autocast = torch.bfloat16 if job.dtype == "bf16" else None
    return reference_split(policy, groups, job.tokens_per_microbatch, autocast)


def _refer_in_turns(turns: Turns, job: DPOJob, policy: Policy, groups: TokenisedGroups) -> None:
    steps = job.order().reshape(job.total_steps, -1)
    turns.wait_first()
    for step in steps:
        chosen = groups.select(step, {})
        _reference(job, policy, chosen)
        turns.end(partial(_tally, job, chosen))


def _tally(job: DPOJob, groups: TokenisedGroups) -> dict[str, Any]:
    """What one pass costs. A forward pass has a third of the FLOPs of training."""
    tally = Tally()
    for members in consecutive_bins(groups.lengths, job.tokens_per_microbatch):
        tally.add_packed(job.size, pack([groups[i] for i in members]).layout)
    tally.model_flops /= 3
    tally.executed_flops /= 3
    return asdict(tally)
