"""What all contenders train on: the pairs of the reward-model benchmark under a language model."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from experiments.benchmarks.reward_step.cost import VOCABULARY
from experiments.benchmarks.reward_step.job import FINGERPRINT, SEED, Corpus, Job
from experiments.benchmarks.reward_step.job import make_job as make_reward_job
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.token_store import TokenWriter
from helpsteer2.models.policy import Policy
from helpsteer2.models.policy_export import PolicySpec

BETA = 0.1
"""TRL's default."""


@dataclass(frozen=True)
class DPOJob(Job):
    """One measurement.

    Attributes:
        vocabulary: Rows of the LM head, which may be more than the tokenizer has.
    """

    vocabulary: int = VOCABULARY

    def config(self) -> dict[str, Any]:
        """The transformers config."""
        return {**super().config(), "vocab_size": self.vocabulary}

    @property
    def n_parameters(self) -> int:
        """Parameters with embedding and LM head; norms are too few to matter."""
        return self.size.linear_parameters + 2 * self.vocabulary * self.size.hidden

    def policy(self) -> Policy:
        """The policy that all contenders start from."""
        causal_lm = self.backbone().build(self.tokenizer, SEED, lm_head=True)
        chat = ChatFormat().bind(self.tokenizer)
        return Policy(causal_lm, PolicySpec(chat, self.spec.limits, "random llama"))


def make_job(corpus: Corpus, folder: Path, vocabulary: int, **options: Any) -> DPOJob:
    """Draw the groups as the reward-model benchmark does; the second response is the better one.

    Which one it is does not matter for speed.

    Args:
        corpus: Where to draw from.
        folder: To create.
        vocabulary: Rows of the LM head.
        **options: The others of ``reward_step.job.make_job``.
    """
    with tempfile.TemporaryDirectory() as aside:
        job = make_reward_job(corpus, Path(aside) / "groups", **options)
        groups = job.groups()
        with TokenWriter(folder, groups.attribute_names) as writer:
            for index in range(len(groups)):
                group = replace(groups[index], preference_strength=1.0)
                writer.add(group, groups.ids[index])
            writer.finish(FINGERPRINT, {})
    values = {field.name: getattr(job, field.name) for field in fields(job)}
    return DPOJob(**{**values, "folder": folder}, vocabulary=vocabulary)
