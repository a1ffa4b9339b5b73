"""Contender: TRL's RLOOTrainer."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import RLOOConfig, RLOOTrainer

from experiments.benchmarks.reward_step.turns import Turns
from experiments.benchmarks.rl_iteration.job import Job
from experiments.benchmarks.rl_iteration.trl_common import (
    Iterations,
    policy,
    prepare,
    reward_model,
    settings,
    tokenizer,
    whole,
)


def run(job: Job, turns: Turns, microbatch: int) -> None:
    """Train, one iteration a turn.

    Args:
        job: What is done.
        turns: The turns.
        microbatch: Responses of a pass, whether log-probs, scores or training.
    """
    prepare()
    steps = job.epochs * job.minibatches
    iterations = Iterations(turns, job, steps)
    trainer = _OnIds(
        job,
        iterations,
        model=policy(job),
        reward_funcs=_scorer(job, microbatch),
        args=RLOOConfig(
            **settings(job, microbatch),
            gradient_accumulation_steps=whole(job.responses, microbatch, job.minibatches),
            steps_per_generation=whole(job.responses, microbatch),
            num_iterations=job.epochs,
            num_generations=job.samples,
            max_completion_length=job.max_tokens,
            max_steps=len(job.prompts) * steps,
            beta=job.kl_coefficient,
            disable_dropout=True,
            shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": _names(job)}),
        processing_class=tokenizer(job),
        callbacks=[iterations],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _names(job: Job) -> list[str]:
    """What stands for the prompts where TRL wants texts."""
    return [str(index) for index in range(sum(map(len, job.prompts)))]


def _ids(job: Job) -> list[list[int]]:
    """The prompts that the names stand for."""
    return [list(ids) for prompts in job.prompts for ids in prompts]


class _OnIds(RLOOTrainer):  # type: ignore[misc]
    """Takes the prompts' ids as they are, and its phases are timed."""

    def __init__(self, job: Job, iterations: Iterations, **arguments: Any) -> None:
        self._prompts, self._iterations = _ids(job), iterations
        super().__init__(**arguments)
        phases: dict[str, Any] = {
            "_generate": "sampling",
            "_calculate_rewards": "scoring",
            "_get_per_token_logps_and_entropies": _unless_training,
        }
        for name, phase in phases.items():
            setattr(self, name, iterations.clock.timed(phase, getattr(self, name)))

    def _tokenize_prompts(self, prompts: list[str]) -> Any:
        return [self._prompts[int(name)] for name in prompts], None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        completion_ids = super()._generate_single_turn(*args, **kwargs)
        self._iterations.lengths += [len(ids) for ids in completion_ids]
        return completion_ids


def _unless_training(*args: Any, **kwargs: Any) -> str | None:
    """The phase of log-probs; in the update they are computed with gradients."""
    return None if torch.is_grad_enabled() else "logprobs"


def _scorer(job: Job, microbatch: int) -> Any:
    """The reward model on the sampled ids.

    Given the model itself, TRL would decode the responses of a random policy, encode them to other
    and more ids, and score all of them in one pass.
    """
    model, prompts = reward_model(job).eval(), _ids(job)
    pad = model.config.pad_token_id

    def reward(
        prompts: list[str], completion_ids: list[list[int]], _ids: Any = prompts, **rest: Any
    ) -> list[float]:
        rows = [[*_ids[int(name)], *ids] for name, ids in zip(prompts, completion_ids, strict=True)]
        scores: list[float] = []
        for first in range(0, len(rows), microbatch):
            some = rows[first : first + microbatch]
            longest = max(map(len, some))
            ids = torch.tensor([row + [pad] * (longest - len(row)) for row in some])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in some])
            with torch.inference_mode():
                scores += model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
        return scores

    return reward
