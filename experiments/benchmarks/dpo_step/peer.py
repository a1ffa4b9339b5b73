"""Contender: TRL's DPOTrainer, on the same ids."""

from __future__ import annotations

import copy
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from experiments.benchmarks.dpo_step.job import BETA, DPOJob
from experiments.benchmarks.reward_step.peer import accumulated, prepare, settings, train_in_turns
from experiments.benchmarks.reward_step.turns import Turns
from helpsteer2.data.tokens import TokenGroup


def run(
    turns: Turns, job: DPOJob, grouped: bool, precomputed: bool, options: dict[str, Any]
) -> None:
    """Train, one step a turn.

    Args:
        turns: The turns.
        job: What to train on.
        grouped: Length-grouped order.
        precomputed: Compute the reference log-probs before training; otherwise a second model runs
            beside the policy, as is TRL's default.
        options: Arguments of ``DPOConfig`` that are not TRL's defaults.
    """
    prepare()
    groups, order = job.groups(), job.grouped_order() if grouped else job.order()
    arguments = DPOConfig(
        **settings(job), beta=BETA, precompute_ref_log_probs=precomputed, **options
    )
    model = _model(job)
    trainer = _OnIds(
        model=model,
        ref_model=None if precomputed else copy.deepcopy(model),
        args=accumulated(arguments, job),
        train_dataset=Dataset.from_list([_pair(groups[int(index)]) for index in order]),
        processing_class=job.tokenizer,
    )
    train_in_turns(trainer, turns, job)


class _OnIds(DPOTrainer):  # type: ignore[misc]
    """Takes the ids as they are: left to itself it would make others of texts."""

    def _prepare_dataset(self, dataset: Dataset, *rest: Any) -> Dataset:
        return dataset


def _pair(group: TokenGroup) -> dict[str, list[int]]:
    """A row of TRL's."""
    rejected, chosen = group.response_ids
    return {
        "prompt_ids": group.prompt_ids.tolist(),
        "chosen_ids": chosen.tolist(),
        "rejected_ids": rejected.tolist(),
    }


def _model(job: DPOJob) -> torch.nn.Module:
    """The same weights under transformers' own attention."""
    ours = job.policy().causal_lm
    config = copy.deepcopy(ours.config)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.load_state_dict(ours.state_dict())
    return model
