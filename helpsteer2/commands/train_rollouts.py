"""What an on-policy run learns from: prompts, a reward model and a reference."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from helpsteer2.attributes import AttributeWeights
from helpsteer2.callbacks.checkpoints import LAST, Cadence
from helpsteer2.commands.resume import CONFIG, INPUTS, may_change
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.commands.train_data import DataSettings
from helpsteer2.data.chat import BoundChat
from helpsteer2.data.datamodule import Batching
from helpsteer2.data.tokenizer import tokenizer_hash
from helpsteer2.errors import UserError
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.reference import policy_hash
from helpsteer2.models.start import PolicyStart, RewardStart
from helpsteer2.modules.on_policy import OnPolicyModule
from helpsteer2.modules.step import StepModule
from helpsteer2.records import differing_keys
from helpsteer2.rollouts.datamodule import RolloutDataModule
from helpsteer2.rollouts.maker import Report, RolloutMaker
from helpsteer2.rollouts.prompts import PromptReport, Prompts, read_training_prompts
from helpsteer2.rollouts.scoring import RewardFunction
from helpsteer2.rollouts.settings import RolloutSettings

logger = logging.getLogger(__name__)

ROLLOUTS = "rollouts"
"""Folder of a run that holds its rollouts."""


@dataclass(frozen=True)
class RolloutData:
    """What the rollouts of a run are made of.

    Attributes:
        settings: How they are made.
        chat: The policy's chat format.
        prompts: What is answered.
        report: What was read of them.
        reward: What scores the answers.
        watched: Other scorers, by name.
        description: What the prompts are, in words.
        start: Folder of the weights that training starts from, which are the reference, unless
            another is named; None if they are random, or frozen beside adapters and checked there.
    """

    settings: RolloutSettings
    chat: BoundChat
    prompts: Prompts
    report: PromptReport
    reward: RewardFunction
    watched: dict[str, RewardFunction]
    description: str
    start: str | None

    @classmethod
    def read(
        cls,
        settings: RolloutSettings,
        data: DataSettings,
        start: RewardStart | PolicyStart,
        backbone: Backbone,
        weights: AttributeWeights | None,
        seed: int,
    ) -> RolloutData:
        """Read the prompts and open the reward model.

        Args:
            settings: How rollouts are made.
            data: Where prompts are read, and under which limit.
            start: The policy's.
            backbone: The policy's decoder, with its tokenizer.
            weights: Weighting that makes one reward of the scores.
            seed: Seed of the order of the prompts.

        Raises:
            UserError: If the prompts or the reward model cannot be used.
        """
        chat = start.chat(data.chat, backbone, data.texts, data.cache_dir)
        groups, report = read_training_prompts(data.source, chat, data.limits.max_prompt_tokens)
        prompts = Prompts(groups, settings.prompts, seed)
        reward = RewardFunction.of(settings.rewarder(), weights, settings.statistics)
        watched = {
            name: RewardFunction.of(watcher(), weights) for name, watcher in settings.watch.items()
        }
        if settings.offload:
            for function in (reward, *watched.values()):
                function.wait_on_cpu()
        description = f"prompts of {type(data.source).__name__} ({report.fingerprint[:12]})"
        is_loaded = backbone.init == "pretrained" and backbone.lora is None
        start_path = backbone.path if is_loaded else None
        return cls(settings, chat, prompts, report, reward, watched, description, start_path)

    @property
    def label_attributes(self) -> tuple[str, ...]:
        """What the labels behind the prompts are of."""
        return self.report.label_attributes

    def fingerprints(self) -> dict[str, Any]:
        """Hashes of all that rollouts depend on."""
        standard = self.reward.standardisation
        return {
            "prompts": self.report.fingerprint,
            "tokenizer": tokenizer_hash(self.chat.tokenizer),
            "template": self.chat.template_hash,
            "reward_model": self.reward.rewarder.model_hash,
            "watched": {name: by.rewarder.model_hash for name, by in self.watched.items()},
            "standardisation": None if standard is None else [standard.mean, standard.std],
            "reference": self._reference_hash,
        }

    @cached_property
    def _reference_hash(self) -> str | None:
        """Of weights that are read whole, which takes a while for large ones."""
        path = self.settings.reference or self.start
        return None if path is None else policy_hash(path)

    def reports(self) -> dict[str, Any]:
        """What was counted."""
        return {
            "prompts": self.report.prompts,
            "prompts_too_long": self.report.prompts_too_long,
        }

    def datamodule(
        self, folder: Path, batching: Batching, seed: int, report: Report
    ) -> RolloutDataModule:
        """Make what makes the rollouts.

        Args:
            folder: Where they shall lie.
            batching: How groups become steps.
            seed: Seed of samples and order.
            report: Told how far an iteration is.

        Raises:
            UserError: If the parts do not fit each other.
        """
        maker = RolloutMaker(
            folder,
            self.prompts,
            self.settings,
            reward=self.reward,
            watched=self.watched,
            tokens_per_pass=batching.tokens_per_microbatch,
            seed=seed,
        )
        return RolloutDataModule(maker, batching, seed, self.report.longest_prompt_tokens, report)


def check_goes_with(
    module: type[StepModule], rollouts: RolloutSettings | None, schedule: Cadence
) -> None:
    """Refuse an on-policy module without rollouts, or with validation, and another one with them.

    Args:
        module: The class of the module.
        rollouts: How rollouts are made; None for data that are there.
        schedule: When to validate.

    Raises:
        UserError: If they do not go together.
    """
    is_on_policy = issubclass(module, OnPolicyModule)
    if is_on_policy and rollouts is None:
        raise UserError(f"{module.__name__} samples what it learns from: rollouts has to be given")
    if not is_on_policy and rollouts is not None:
        raise UserError(f"{module.__name__} samples nothing: leave rollouts out")
    if is_on_policy and schedule.validate_every is not None:
        raise UserError(
            f"{module.__name__} learns from new samples all the time, there is nothing to validate "
            "on: set schedule.validate_every=null; schedule.export_every and helpsteer2 select "
            "choose among its policies"
        )


def discard_stale(
    folder: RunFolder, config: Mapping[str, Any] | None, fingerprints: Mapping[str, Any]
) -> None:
    """Throw away rollouts of other settings, in a run that has made no step yet.

    With a checkpoint, other settings are refused before.

    Args:
        folder: The run's folder, locked.
        config: The settings.
        fingerprints: As made by ``RolloutData.fingerprints``.
    """
    made = folder.path / ROLLOUTS
    if (folder.checkpoints / LAST).exists() or not made.exists():
        return
    kept = folder.kept(CONFIG) or {}
    changed = [key for key in differing_keys(kept, config or {}) if not may_change(key, kept)]
    if changed or differing_keys(folder.kept(INPUTS) or {}, fingerprints):
        logger.info("samples of other settings are thrown away: no step was made on them")
        shutil.rmtree(made)
    # Later ones are of weights that a run without its checkpoint may not reach again.
    for path in sorted(made.glob("iteration_*"))[1:]:
        shutil.rmtree(path)
