"""What a run learns from: the splits of its data as token ids."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl

from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.groups import GroupSource, read_all
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.overlap import name_twins, text_hashes
from helpsteer2.data.reference import Reference, ReferenceInputs
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.data.tokenise import tokenise
from helpsteer2.data.tokenizer import tokenizer_hash
from helpsteer2.errors import DataError, Problem, UserError
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.reference import policy_hash
from helpsteer2.models.start import PolicyStart, RewardStart
from helpsteer2.modules.step import StepModule

logger = logging.getLogger(__name__)

FOLDS = "data=folds data@data.of=NAME"
"""How a data set is cut by prompt, whatever its own splits are."""

SHOWN = 5
"""Ids of groups that a warning names."""


@dataclass(frozen=True)
class TrainingData:
    """The splits as ids.

    Attributes:
        chat: The chat format bound to the tokenizer that made the ids.
        train: The training split.
        validation: The validation split; None if the run never validates.
        description: What the training split is, in words.
        reference: Which policy the reference log-probabilities are of; None without them.
        validation_prompts_in_train: Validation groups whose prompt is also learned from; None
            without validation.
    """

    chat: BoundChat
    train: TokenisedGroups
    validation: TokenisedGroups | None
    description: str
    reference: Mapping[str, Any] | None = None
    validation_prompts_in_train: int | None = None

    @property
    def label_attributes(self) -> tuple[str, ...]:
        """What the labels behind the prompts are of."""
        return self.train.label_attributes

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
        """What tokenising and the module's choice of groups counted, by split and over both."""
        return {
            "train": self.train.report,
            "validation": None if self.validation is None else self.validation.report,
            "validation_prompts_in_train": self.validation_prompts_in_train,
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
            UserError: If the data cannot be read, are not what the module learns from, or hold
                the same groups in both splits.
        """
        reference = self._open_reference(module)
        attributes = start.attributes(self.attributes)
        module.check_source(self.source, attributes)
        with _rank_zero_first(trainer):
            chat = start.chat(self.chat, backbone, self.texts, self.cache_dir)
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
        validation = used.get("validation")
        shared = None if validation is None else _shared_prompts(self.source, train, validation)
        description = f"{type(self.source).__name__} ({train.fingerprint[:12]})"
        return TrainingData(chat, train, validation, description, record, shared)

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

    def texts(self) -> Iterator[str]:
        """Texts of the training data, for a tokenizer that is trained on them."""
        for group in read_all(self.source, "train"):
            yield from (message["content"] for message in group.prompt)
            yield from group.responses


def _shared_prompts(
    source: GroupSource, train: TokenisedGroups, validation: TokenisedGroups
) -> int:
    """Count and tell of validation groups whose prompt also stands in train.

    Raises:
        DataError: If groups of validation stand in train with their responses; names their rows.
    """
    found = validation.hashes().found_in(train.hashes())
    if found.whole:
        # Limits of length make the same ids of different texts, so the texts decide.
        _refuse_repeated(source, train, validation)
    shared = [validation.ids[i] for i in sorted([*found.whole, *found.prompt_alone])]
    if shared:
        logger.warning(
            "%d of %d validation groups have a prompt that also stands in train, as a model reads "
            "it (%s): figures on them may be better than on new prompts; %s cuts the splits anew "
            "by prompt",
            *(len(shared), len(validation), _first_of(shared), FOLDS),
        )
    return len(shared)


def _refuse_repeated(
    source: GroupSource, train: TokenisedGroups, validation: TokenisedGroups
) -> None:
    """Read the texts once more, and refuse validation groups that stand in train with theirs."""
    learned = text_hashes(source, "train", train.indices)
    held_out = text_hashes(source, "validation", validation.indices)
    whole = held_out.found_in(learned).whole
    if not whole:
        return
    summary = (
        f"{len(whole)} of {len(validation)} validation groups also stand in train, prompt and "
        "responses: figures on them tell what was learned by heart. Delete these rows from one "
        f"split, cut the splits anew by prompt with {FOLDS}, or train without validation: "
        "schedule.validate_every=null"
    )
    twins = {
        int(validation.indices[here]): int(train.indices[there]) for here, there in whole.items()
    }
    place = str(getattr(source, "path", type(source).__name__))
    problems = name_twins(source, "validation", twins, "stands in train too")
    raise DataError([Problem(place, None, None, summary), *problems])


def _first_of(ids: Sequence[str]) -> str:
    """A list of ids that is never long."""
    return ", ".join(ids[:SHOWN]) + (", …" if len(ids) > SHOWN else "")


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
