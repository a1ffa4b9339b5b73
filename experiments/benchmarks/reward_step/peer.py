"""Contender: TRL's RewardTrainer, on the same ids."""

from __future__ import annotations

import copy
import warnings
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import (
    AutoModelForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import RewardConfig, RewardTrainer

from experiments.benchmarks.reward_step.cost import Tally
from experiments.benchmarks.reward_step.job import LEARNING_RATE, SEED, Job
from experiments.benchmarks.reward_step.turns import Turns
from helpsteer2.data.tokens import TokenGroup

Config = TypeVar("Config", bound=TrainingArguments)


@dataclass(frozen=True)
class _Forward:
    """One micro-batch as the model saw it."""

    lengths: tuple[int, ...]
    padded_to: int


def run(turns: Turns, job: Job, grouped: bool, options: dict[str, Any]) -> None:
    """Train, one step a turn.

    Args:
        turns: The turns.
        job: What to train on.
        grouped: Length-grouped order.
        options: Arguments of ``RewardConfig`` that are not TRL's defaults.
    """
    prepare()
    groups, order = job.groups(), job.grouped_order() if grouped else job.order()
    arguments = RewardConfig(**settings(job), **options)
    trainer = RewardTrainer(
        model=_model(job),
        args=accumulated(arguments, job),
        train_dataset=Dataset.from_list([_pair(groups[int(index)]) for index in order]),
        processing_class=job.tokenizer,
    )
    train_in_turns(trainer, turns, job)


def prepare() -> None:
    """Keep TRL and its libraries quiet."""
    disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)  # TRL still sets options that have new names


def settings(job: Job) -> dict[str, Any]:
    """Arguments of every TRL config that are not TRL's defaults."""
    return {
        "output_dir": str(job.folder / "trl"),
        "max_steps": job.total_steps,
        "learning_rate": LEARNING_RATE,
        "bf16": job.dtype == "bf16",
        "use_cpu": True,
        # The order is made beforehand, so that every contender sees the groups that it shall see.
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def accumulated(arguments: Config, job: Job) -> Config:
    """Set how many micro-batches make a step.

    Raises:
        ValueError: If a step is not a whole number of them.
    """
    accumulate, rest = divmod(job.size.groups_per_step, arguments.per_device_train_batch_size)
    if rest or not accumulate:
        raise ValueError("a step has to be whole micro-batches")
    arguments.gradient_accumulation_steps = accumulate
    return arguments


def train_in_turns(trainer: Trainer, turns: Turns, job: Job) -> None:
    """Train, one step a turn.

    Args:
        trainer: Of TRL; its data are the groups of the job in the order of training.
        turns: The turns.
        job: What it trains on.

    Raises:
        ValueError: If TRL has dropped rows.
    """
    forwards: list[_Forward] = []
    trainer.model.register_forward_pre_hook(_recorder(forwards), with_kwargs=True)
    trainer.add_callback(_OneStepATurn(turns, job, forwards))
    if len(trainer.train_dataset) != job.total_steps * job.size.groups_per_step:
        raise ValueError("TRL dropped rows: they are too long")
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _pair(group: TokenGroup) -> dict[str, list[int]]:
    """A row of TRL's: which of the two counts as better does not matter for speed."""
    first, second = (np.concatenate([group.prompt_ids, ids]) for ids in group.response_ids)
    return {"chosen_ids": first.tolist(), "rejected_ids": second.tolist()}


def _model(job: Job) -> torch.nn.Module:
    """The same backbone weights under transformers' classification head."""
    backbone = job.backbone().build(job.tokenizer, SEED)
    config = copy.deepcopy(backbone.config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")
    model.model.load_state_dict(backbone.state_dict())
    return model


def _recorder(forwards: list[_Forward]) -> Any:
    def hook(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        lengths = kwargs["attention_mask"].sum(dim=1).tolist()
        forwards.append(_Forward(tuple(lengths), kwargs["input_ids"].shape[1]))

    return hook


class _OneStepATurn(TrainerCallback):
    """A turn ends when an optimizer step has."""

    def __init__(self, turns: Turns, job: Job, forwards: list[_Forward]) -> None:
        self._turns, self._job, self._forwards = turns, job, forwards

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._turns.wait_first()

    def on_step_end(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        def details() -> dict[str, Any]:
            tally = Tally()
            for forward in self._forwards:
                tally.add_padded(
                    self._job.size,
                    forward.lengths,
                    forward.padded_to,
                    recomputed=args.gradient_checkpointing,
                )
            self._forwards.clear()
            return asdict(tally)

        self._turns.end(details)
