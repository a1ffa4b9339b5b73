"""What TRL's two trainers share here. Neither ``helpsteer2`` nor TRL itself is imported."""

from __future__ import annotations

from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from experiments.benchmarks.reward_step.turns import Turns
from experiments.benchmarks.rl_iteration.contender import PhaseClock
from experiments.benchmarks.rl_iteration.job import SEED, Job

_LOADING = {"dtype": torch.float32, "attn_implementation": "sdpa"}


def prepare() -> None:
    """Keep transformers quiet."""
    disable_progress_bars()
    disable_progress_bar()
    set_verbosity_error()


def policy(job: Job) -> Any:
    """A new copy of the policy."""
    return AutoModelForCausalLM.from_pretrained(job.policy, **_LOADING)


def reward_model(job: Job) -> Any:
    """A new copy of the reward model, which the value model starts from as well."""
    return AutoModelForSequenceClassification.from_pretrained(job.scalar_reward_model, **_LOADING)


def tokenizer(job: Job) -> Any:
    """The tokenizer, padding on the left as TRL asks for."""
    return AutoTokenizer.from_pretrained(job.policy, padding_side="left")


def whole(total: int, *parts: int) -> int:
    """How often parts make up the total.

    Raises:
        ValueError: If a part would be left over.
    """
    for part in parts:
        total, rest = divmod(total, part)
        if rest or not total:
            raise ValueError("the responses of an iteration have to be whole micro-batches")
    return total


def settings(job: Job, microbatch: int) -> dict[str, Any]:
    """Arguments of both configs: in fp32, no gradient checkpointing, nothing saved or shown.

    Args:
        job: What is done.
        microbatch: Responses of a forward and backward pass.
    """
    return {
        "output_dir": str(job.folder / "trl"),
        "per_device_train_batch_size": microbatch,
        "learning_rate": job.learning_rate,
        "temperature": 1.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "seed": SEED,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


class Iterations(TrainerCallback):
    """A turn ends when the last optimizer step of an iteration has.

    Args:
        turns: The turns.
        job: What is done.
        steps: Trainer steps of an iteration.
    """

    def __init__(self, turns: Turns, job: Job, steps: int) -> None:
        self.clock = PhaseClock()
        self.lengths: list[int] = []
        self._turns, self._job, self._steps = turns, job, steps

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the first turn."""
        self._turns.wait_first()

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """Report an iteration that is complete."""
        if state.global_step % self._steps == 0:
            self._turns.end(self._details)

    def _details(self) -> dict[str, Any]:
        lengths, self.lengths = self.lengths, []
        return {
            "samples": len(lengths),
            "completion_tokens": sum(lengths),
            "ended": sum(length < self._job.max_tokens for length in lengths),
            "phases": self.clock.take(),
        }
