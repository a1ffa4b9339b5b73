"""Contender: TRL's PPOTrainer, which has its last home in TRL 1.12."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PrinterCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

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


def run(job: Job, turns: Turns, microbatch: int, rollout_batch: int) -> None:
    """Train, one iteration a turn.

    Args:
        job: What is done.
        turns: The turns.
        microbatch: Responses of a training pass.
        rollout_batch: Responses of everything else: sampling, scores, values, log-probs.
    """
    prepare()
    iterations = Iterations(turns, job, steps=1)  # of TRL's counter, an iteration is one step
    scores, names = reward_model(job).eval(), tokenizer(job)
    rows = [list(ids) for prompts in job.prompts for ids in prompts for _ in range(job.samples)]
    dataset = Dataset.from_dict({"input_ids": rows})
    trainer = PPOTrainer(
        args=PPOConfig(
            **settings(job, microbatch),
            gradient_accumulation_steps=whole(job.responses, microbatch),
            num_mini_batches=job.minibatches,
            num_ppo_epochs=job.epochs,
            local_rollout_forward_batch_size=min(rollout_batch, job.responses),
            total_episodes=len(rows),
            response_length=job.max_tokens,
            stop_token="eos",
            kl_coef=job.kl_coefficient,
            num_sample_generations=0,
        ),
        processing_class=names,
        model=policy(job),
        ref_model=policy(job).eval(),
        reward_model=scores,
        value_model=reward_model(job),
        train_dataset=dataset,
        eval_dataset=dataset.select([0]),
        callbacks=[iterations],
    )
    # The trainer's own would mix the prompts of all iterations.
    trainer.dataloader = DataLoader(
        dataset, batch_size=job.responses, collate_fn=DataCollatorWithPadding(names)
    )
    _time(iterations, scores, names.pad_token_id)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _time(iterations: Iterations, scores: Any, pad: int) -> None:
    """Time the phases: the trainer has one method, so the functions it calls are wrapped."""
    timed, generate = iterations.clock.timed, ppo_trainer.batch_generation

    def generate_and_count(model: Any, queries: torch.Tensor, *rest: Any) -> Any:
        rows, logits = generate(model, queries, *rest)
        iterations.lengths += (rows[:, queries.shape[1] :] != pad).sum(dim=1).tolist()
        return rows, logits

    def without_gradients(*args: Any, **kwargs: Any) -> str | None:
        return None if torch.is_grad_enabled() else "logprobs"

    def of_which_model(model: Any, *args: Any, **kwargs: Any) -> str:
        return "scoring" if model is scores else "values"

    ppo_trainer.batch_generation = timed("sampling", generate_and_count)
    ppo_trainer.get_reward = timed(of_which_model, ppo_trainer.get_reward)
    for name in ("forward", "selective_log_softmax"):
        function = getattr(ppo_trainer, name)
        setattr(ppo_trainer, name, timed(without_gradients, function))
