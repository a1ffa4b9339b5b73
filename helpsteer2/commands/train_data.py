"""What a run learns from: the splits of its data as token ids."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl

from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.groups import GroupSource, read_all
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.reference import Reference, ReferenceInputs
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.data.tokenise import tokenise
from helpsteer2.data.tokenizer import tokenizer_hash
from helpsteer2.errors import UserError
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.reference import policy_hash
from helpsteer2.models.start import PolicyStart, RewardStart
from helpsteer2.modules.step import StepModule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """The splits as ids.

    Attributes:
        chat: The chat format bound to the tokenizer that made the ids.
        train: The training split.
        validation: The validation split; None if the run never validates.
        description: What the training split is, in words.
        reference: Which policy the reference log-probabilities are of; None without them.
    """

    chat: BoundChat
    train: TokenisedGroups
    validation: TokenisedGroups | None
    description: str
    reference: Mapping[str, Any] | None = None

    def fingerprints(self) -> dict[str, Any]:
        """Hashes of everything that the ids depend on."""
        return {
            "train": self.train.fingerprint,
            "validation": None if self.validation is None else self.validation.fingerprint,
            "tokenizer": tokenizer_hash(self.chat.tokenizer),
            "template": self.chat.template_hash,
            "reference": self.reference,
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
    reference: str | None = None

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
        reference = self._open_reference(module)
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
        record = None
        if reference is not None:
            precision = str(trainer.precision)
            reference.require(ReferenceInputs.of(chat, self.limits, backbone.dtype, precision))
            splits = {split: reference.join(groups, split) for split, groups in splits.items()}
            if trainer.is_global_zero:
                record = _record(reference, backbone)
        used = {split: module.usable(groups, split) for split, groups in splits.items()}
        train = used["train"]
        description = f"{type(self.source).__name__} ({train.fingerprint[:12]})"
        return TrainingData(chat, train, used.get("validation"), description, record)

    def _open_reference(self, module: type[StepModule]) -> Reference | None:
        """Open the reference log-probabilities, if the module reads any."""
        if module.needs_reference and self.reference is None:
            raise UserError(
                f"{module.__name__} compares the policy with a reference: compute its "
                "log-probabilities with helpsteer2 reference model=POLICY run_dir=DIR, on the same "
                "data, and set reference=DIR/reference"
            )
        if self.reference is None:
            return None
        if not module.needs_reference:
            raise UserError(f"{module.__name__} reads no reference: leave reference out")
        return Reference.open(self.reference)

    def _texts(self) -> Iterator[str]:
        """Texts of the training data, for a tokenizer that is trained on them."""
        for group in read_all(self.source, "train"):
            yield from (message["content"] for message in group.prompt)
            yield from group.responses


def _record(reference: Reference, backbone: Backbone) -> dict[str, Any]:
    """Say and record of which policy the reference log-probabilities are."""
    unchanged = backbone.init == "pretrained" and not backbone.config
    is_initial = (
        unchanged and backbone.path is not None and policy_hash(backbone.path) == reference.weights
    )
    logger.info(
        "the reference is %s",
        "the policy that training starts from"
        if is_initial
        else f"another policy than training starts from (weights {reference.weights[:12]})",
    )
    return {"weights": reference.weights, "is_initial_policy": is_initial}


@contextmanager
def _rank_zero_first(trainer: pl.Trainer) -> Iterator[None]:
    """Run a block on rank zero, then on the others."""
    if not trainer.is_global_zero:
        trainer.strategy.barrier("rank zero first")
    yield
    if trainer.is_global_zero:
        trainer.strategy.barrier("rank zero first")
