"""What a run learns from: the splits of its data as token ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl

from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.groups import GroupSource, read_all
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.data.tokenise import tokenise
from helpsteer2.data.tokenizer import tokenizer_hash
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.start import PolicyStart, RewardStart
from helpsteer2.modules.step import StepModule


@dataclass(frozen=True)
class TrainingData:
    """The splits as ids.

    Attributes:
        chat: The chat format bound to the tokenizer that made the ids.
        train: The training split.
        validation: The validation split; None if the run never validates.
        description: What the training split is, in words.
    """

    chat: BoundChat
    train: TokenisedGroups
    validation: TokenisedGroups | None
    description: str

    def fingerprints(self) -> dict[str, Any]:
        """Hashes of everything that the ids depend on."""
        return {
            "train": self.train.fingerprint,
            "validation": None if self.validation is None else self.validation.fingerprint,
            "tokenizer": tokenizer_hash(self.chat.tokenizer),
            "template": self.chat.template_hash,
        }

    def reports(self) -> dict[str, Any]:
        """What tokenising and the module's choice of groups counted, by split."""
        return {
            "train": self.train.report,
            "validation": None if self.validation is None else self.validation.report,
        }


@dataclass(frozen=True)
class DataSettings:
    """How data become ids; the attributes are those of ``train``'s arguments."""

    source: GroupSource
    chat: ChatFormat
    limits: LengthLimits
    attributes: tuple[str, ...]
    cache_dir: str

    def tokenise(
        self,
        start: RewardStart | PolicyStart,
        backbone: Backbone,
        module: type[StepModule],
        validates: bool,
        trainer: pl.Trainer,
    ) -> TrainingData:
        """Make the ids, or open those made before; rank zero makes what the others read.

        Args:
            start: Decides which tokenizer and attributes are read, and how responses are cut.
            backbone: The decoder, with its tokenizer.
            module: Chooses the groups that it can use.
            validates: Whether there are validations.
            trainer: Knows the ranks.

        Raises:
            UserError: If the data cannot be read, or are not what the module learns from.
        """
        attributes = start.attributes(self.attributes)
        module.check_source(self.source, attributes)
        with _rank_zero_first(trainer):
            chat = start.chat(self.chat, backbone, self._texts, self.cache_dir)
            splits = {
                split: tokenise(
                    self.source,
                    split,
                    chat,
                    self.limits,
                    attributes,
                    self.cache_dir,
                    close_cut=start.closes_cut_responses,
                )
                for split in ("train", "validation")
                if split == "train" or validates
            }
        used = {split: module.usable(groups, split) for split, groups in splits.items()}
        train = used["train"]
        description = f"{type(self.source).__name__} ({train.fingerprint[:12]})"
        return TrainingData(chat, train, used.get("validation"), description)

    def _texts(self) -> Iterator[str]:
        """Texts of the training data, for a tokenizer that is trained on them."""
        for group in read_all(self.source, "train"):
            yield from (message["content"] for message in group.prompt)
            yield from group.responses


@contextmanager
def _rank_zero_first(trainer: pl.Trainer) -> Iterator[None]:
    """Run a block on rank zero, then on the others."""
    if not trainer.is_global_zero:
        trainer.strategy.barrier("rank zero first")
    yield
    if trainer.is_global_zero:
        trainer.strategy.barrier("rank zero first")
