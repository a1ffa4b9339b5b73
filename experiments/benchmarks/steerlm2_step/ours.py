"""Contender: this project's reference pass, and its training step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from experiments.benchmarks.reward_step.job import LEARNING_RATE
from experiments.benchmarks.reward_step.ours import train_in_turns
from experiments.benchmarks.reward_step.turns import Report, Turns
from experiments.benchmarks.steerlm2_step.job import SteerLM2Job
from experiments.benchmarks.steerlm2_step.summary import SCORING
from helpsteer2.data.packing import PackedBatch
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.losses.steerlm2 import SteerLM2Loss
from helpsteer2.models.reference import reference_split
from helpsteer2.modules.steerlm2 import SteerLM2Module


def run(turns: Turns, job: SteerLM2Job, phase: str) -> None:
    """Score or train, one step a turn.

    Args:
        turns: The turns.
        job: What to work on.
        phase: Which of the two.
    """
    if phase == SCORING:
        _score(turns, job)
        return
    module = _Watched(
        job.policy(),
        loss=SteerLM2Loss(),
        optimizer=partial(torch.optim.AdamW, lr=LEARNING_RATE, fused=True),
    )
    groups = job.groups()
    train_in_turns(_Telling(turns, job, groups, module), job, module, groups)


def _score(turns: Turns, job: SteerLM2Job) -> None:
    """Log P(y|x), then log Q'(y|a,x), as ``helpsteer2 reference`` computes them."""
    policy, both = job.policy().eval(), (job.plain_groups(), job.groups())
    turns.wait_first()
    for step in job.steps():
        chosen = [groups.select(step, {}) for groups in both]
        passes = [reference_split(policy, of, job.tokens_per_microbatch) for of in chosen]
        logprobs = np.concatenate([found.logprobs for found in passes])
        turns.end(partial(_report, job, chosen, logprobs=logprobs))


def _report(job: SteerLM2Job, passes: list[TokenisedGroups], **numbers: Any) -> Report:
    """What a turn has read and found. Nothing is padded, and prompts are read once."""
    executed = sum(int(groups.lengths.sum()) for groups in passes)
    return {
        "responses": job.responses_per_step,
        "executed_tokens": executed,
        "real_tokens": executed,
        **numbers,
    }


class _Watched(SteerLM2Module):
    """Keeps what its latest step has computed."""

    def training_step(self, batches: list[PackedBatch], batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batches, batch_idx)
        self.latest: dict[str, float] = result["metrics"]
        return result


class _Telling(Turns):
    """Turns whose reports tell what the steps have computed."""

    def __init__(
        self, turns: Turns, job: SteerLM2Job, groups: TokenisedGroups, module: _Watched
    ) -> None:
        self._turns, self._job, self._groups, self._module = turns, job, groups, module
        self._steps = iter(job.steps())

    def wait_first(self) -> None:
        self._turns.wait_first()

    def end(self, details: Callable[[], Report]) -> None:
        def told() -> Report:
            metrics = self._module.latest
            return _report(
                self._job,
                [self._groups.select(next(self._steps), {})],
                loss=metrics["train/loss"],
                gradient_norm=metrics["train/grad_norm"],
            )

        self._turns.end(told)
