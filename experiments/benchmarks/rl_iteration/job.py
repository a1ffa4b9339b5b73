"""What all contenders do. Standard library alone: a peer's Python has no other package of ours."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

Kind = Literal["rloo", "ppo"]
Ids = tuple[int, ...]

SEED = 1
JOB_FILE = "job.json"


@dataclass(frozen=True)
class Job:
    """One measurement. An iteration samples, scores, computes log-probs, and updates.

    The folder holds ``policy`` (a causal LM, the reference as well), ``reward_model`` (five
    attributes, an export of ours), ``scalar_reward_model`` (one label on the same decoder, for
    TRL), each with the tokenizer, ``groups`` (the tokenised prompts in the order of training, with
    the responses of the data set) and this record.

    Attributes:
        folder: Where all of it lies.
        kind: ``rloo``: leave-one-out baselines; ``ppo``: with a value model as large as the policy.
        size: Name of the model size, of ``reward_step.cost.SIZES``.
        prompts: Ids of the prompts of every iteration, warm-up first.
        warmup: Iterations before the measured ones.
        samples: Responses to a prompt.
        max_tokens: Longest response, in tokens with its end.
        epochs: Passes of the update over an iteration's responses.
        minibatches: Optimizer steps of an epoch.
        kl_coefficient: Weight of the KL penalty in the reward, so a reference model is needed.
        learning_rate: Of AdamW.
    """

    folder: Path
    kind: Kind
    size: str
    prompts: tuple[tuple[Ids, ...], ...]
    warmup: int
    samples: int
    max_tokens: int
    epochs: int
    minibatches: int
    kl_coefficient: float = 0.05
    learning_rate: float = 1e-6

    @property
    def responses(self) -> int:
        """Responses of an iteration."""
        return len(self.prompts[0]) * self.samples

    @property
    def policy(self) -> Path:
        """Folder of the causal LM."""
        return self.folder / "policy"

    @property
    def reward_model(self) -> Path:
        """Folder of the reward model with five attributes."""
        return self.folder / "reward_model"

    @property
    def scalar_reward_model(self) -> Path:
        """Folder of the reward model with one label."""
        return self.folder / "scalar_reward_model"

    @property
    def groups(self) -> Path:
        """Folder of the tokenised groups."""
        return self.folder / "groups"

    def write(self) -> None:
        """Write the record into the folder."""
        record = {**asdict(self), "folder": ""}  # the reader knows where it read
        (self.folder / JOB_FILE).write_text(json.dumps(record), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Job:
        """Read the record of a folder."""
        record = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
        prompts = tuple(tuple(tuple(ids) for ids in prompts) for prompts in record["prompts"])
        return replace(cls(**record), folder=folder, prompts=prompts)
