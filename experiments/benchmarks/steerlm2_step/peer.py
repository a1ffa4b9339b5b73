"""Contender: plain transformers on padded sequences, fed with the same ids."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from experiments.benchmarks.reward_step.job import LEARNING_RATE
from experiments.benchmarks.reward_step.turns import Report, Turns
from experiments.benchmarks.steerlm2_step.job import SteerLM2Job
from experiments.benchmarks.steerlm2_step.padded import (
    Count,
    Prompt,
    Row,
    Setting,
    backward,
    token_logprobs,
)
from experiments.benchmarks.steerlm2_step.summary import SCORING
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.models.policy import Policy

CLIP = 1.0
"""As ours has it by default."""


def run(turns: Turns, job: SteerLM2Job, phase: str, setting: Setting) -> None:
    """Score or train, one step a turn.

    Args:
        turns: The turns.
        job: What to work on.
        phase: Which of the two.
        setting: How rows go through the model.
    """
    model = plain_model(job.policy())
    if phase == SCORING:
        _score(turns, job, model, setting)
    else:
        _train(turns, job, model, setting)


def plain_model(policy: Policy) -> Any:
    """The same weights under transformers' own attention."""
    config = copy.deepcopy(policy.causal_lm.config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.load_state_dict(policy.causal_lm.state_dict())
    return model


def rows_of(group: TokenGroup) -> list[Row]:
    """A row a response, its prompt in front."""
    prompt = torch.from_numpy(group.prompt_ids).long()
    responses = (torch.from_numpy(ids).long() for ids in group.response_ids)
    return [Row(torch.cat([prompt, ids]), len(prompt)) for ids in responses]


def prompt_of(group: TokenGroup) -> Prompt:
    """A group as the padded computation takes it."""
    if group.ref_logprobs is None or group.rewards is None:
        raise ValueError("training needs targets and log-probabilities of the proposal")
    ref_logprobs, targets = map(torch.from_numpy, (group.ref_logprobs, group.rewards))
    return Prompt(rows_of(group), ref_logprobs, targets)


def _score(turns: Turns, job: SteerLM2Job, model: Any, setting: Setting) -> None:
    both: tuple[TokenisedGroups, ...] = (job.plain_groups(), job.groups())
    model.eval()
    turns.wait_first()
    for step in job.steps():
        count, found = Count(), list[Tensor]()
        for groups in both:
            rows = [row for index in step for row in rows_of(groups[int(index)])]
            with torch.inference_mode():
                found += token_logprobs(model, rows, setting, count)
        logprobs = torch.cat(found).numpy()
        turns.end(lambda n=count, of=logprobs: _report(job, n, logprobs=of))  # type: ignore[misc]


def _train(turns: Turns, job: SteerLM2Job, model: Any, setting: Setting) -> None:
    groups = job.groups()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    turns.wait_first()
    for step in job.steps():
        count = Count()
        optimizer.zero_grad()
        loss = backward(model, [prompt_of(groups[int(index)]) for index in step], setting, count)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.step()
        report = _report(job, count, loss=loss, gradient_norm=norm)
        turns.end(lambda told=report: told)  # type: ignore[misc]


def _report(job: SteerLM2Job, count: Count, **numbers: Any) -> Report:
    """What a turn has read and found."""
    return {
        "responses": job.responses_per_step,
        "executed_tokens": count.executed,
        "real_tokens": count.real,
        **numbers,
    }
