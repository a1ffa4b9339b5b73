"""What a training run starts from: the ``model`` of its configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from helpsteer2.attributes import AttributeWeights
from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.data.tokenizer import PretrainedTokenizer, Texts
from helpsteer2.errors import UserError
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.loading import RewardFolder, open_reward
from helpsteer2.models.policy import Policy
from helpsteer2.models.policy_export import PolicySpec
from helpsteer2.models.reward import RewardModel, RewardSpec
from helpsteer2.models.spec import POLICY_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelSetup:
    """What a model is built for.

    Attributes:
        backbone: The decoder to start from; of one that is loaded, how it is set up.
        chat: The chat format, bound to the tokenizer whose ids the data are.
        limits: Longest prompt and response.
        train: The training data, whose attributes are the scores of a reward model; None where a
            policy samples its own.
        data: What it is, in words.
        weights: Weighting stored with a reward model as its usual one.
        seed: Seed of new weights.
        device: Where the model will run.
        autocast: What autocast will compute in; None without it.
        label_attributes: What the labels behind the prompts are of; none without any label.
    """

    backbone: Backbone
    chat: BoundChat
    limits: LengthLimits
    train: TokenisedGroups | None
    data: str
    weights: AttributeWeights | None
    seed: int
    device: torch.device | str = "cpu"
    autocast: torch.dtype | None = None
    label_attributes: tuple[str, ...] = ()

    def base_model(self, model: PreTrainedModel) -> str:
        """Where the weights of a model came from before training: a path, or that they are random.

        Args:
            model: Built from the backbone.
        """
        if self.backbone.init == "pretrained" and self.backbone.path is not None:
            return self.backbone.path
        return f"random {model.config.model_type}"


@dataclass(frozen=True)
class RewardStart:
    """A reward model: a new head on the backbone, or a trained model that training goes on from.

    Args:
        init_from: Folder or Hub id of a reward model. Its weights, head, tokenizer and chat
            template are taken, and ``backbone`` only says how they are trained (dtype, attention,
            checkpointing, adapters). None puts a new head on ``backbone``.
    """

    init_from: str | None = None

    closes_cut_responses: ClassVar[bool] = True
    """The score is read at the closing tokens, so a response that was cut keeps them."""

    def attributes(self, wanted: Sequence[str]) -> tuple[str, ...]:
        """Names of the scores, in their order.

        Args:
            wanted: The attributes to train.

        Raises:
            UserError: If none is wanted, or the model to go on from has no score for one of them.
        """
        if not wanted:
            raise UserError("attributes is empty: a reward model needs the name of a score")
        if self.init_from is not None:
            names = self._opened.spec.attribute_names
            lacking = [name for name in wanted if name not in names]
            if lacking:
                raise UserError(
                    f"model.init_from={self.init_from} scores {', '.join(names)}, but attributes "
                    f"asks for {', '.join(lacking)}: set attributes=[{','.join(names)}] or some of "
                    "them"
                )
        return tuple(wanted)

    def chat(self, chat: ChatFormat, backbone: Backbone, texts: Texts, cache_dir: str) -> BoundChat:
        """The chat format bound to the model's tokenizer.

        Args:
            chat: The chat format asked for.
            backbone: Whose tokenizer is taken, unless there is a model to go on from.
            texts: The training texts, for a tokenizer that is trained on them.
            cache_dir: Folder for trained tokenizers.

        Raises:
            UserError: If there is no such tokenizer, or the model to go on from was trained with
                another tokenizer or chat format than those asked for.
        """
        if self.init_from is None:
            return chat.bind(backbone.tokenizer.build(texts, cache_dir))
        trained = self._opened.chat
        if isinstance(backbone.tokenizer, PretrainedTokenizer):
            asked = backbone.tokenizer.build(texts, cache_dir)
            if asked.get_vocab() != trained.tokenizer.get_vocab():
                raise UserError(
                    f"model.init_from={self.init_from} has another vocabulary than "
                    f"backbone.tokenizer.path={backbone.tokenizer.path}: choose the backbone that "
                    f"it was trained from ({self._opened.spec.base_model})"
                )
        bound = chat.bind(trained.tokenizer)
        if bound.template_hash != trained.template_hash:
            raise UserError(
                f"model.init_from={self.init_from} was trained with the chat template "
                f"{trained.template_name!r}, which is not that of chat.template={chat.template}: "
                "set chat.template=auto to keep the model's own"
            )
        if bound.system_prompt != trained.system_prompt:
            raise UserError(
                f"model.init_from={self.init_from} was trained with the system prompt "
                f"{trained.system_prompt!r}, and chat.system_prompt is {bound.system_prompt!r}: "
                "set it to the same"
            )
        return trained

    def build(self, setup: ModelSetup) -> RewardModel:
        """Make the model.

        Args:
            setup: What it is built for.

        Returns:
            The model on the CPU, in train mode, with one score for each attribute of the data.

        Raises:
            UserError: If the weights cannot be found, packed or trusted.
        """
        tokenizer = setup.chat.tokenizer
        assert setup.train is not None
        names = setup.train.attribute_names
        head, before = None, None
        if self.init_from is None:
            decoder = setup.backbone.build(tokenizer, setup.seed, setup.device, setup.autocast)
        else:
            implementation = setup.backbone.implementation(setup.device, setup.autocast)
            loaded = self._opened.load(setup.backbone.weights_dtype, implementation)
            decoder, before = loaded.backbone, loaded.spec
            head = _selected(loaded.head, before.attribute_names, names)
            setup.backbone.prepare(decoder, tokenizer, setup.seed, self.init_from)
        data = "" if before is None else before.data
        spec = RewardSpec.of(
            names,
            setup.chat,
            tokenizer,
            setup.limits,
            setup.base_model(decoder) if before is None else before.base_model,
            data=f"{data}, then {setup.data}" if data else setup.data,
            objective="" if before is None else before.objective,
            weights=setup.weights,
            rating_means=tuple(setup.train.rating_means().tolist()),
            rating_stds=tuple(setup.train.rating_stds().tolist()),
        )
        return RewardModel(decoder, spec, head)

    @cached_property
    def _opened(self) -> RewardFolder:
        """The model to go on from, but for its backbone's weights."""
        assert self.init_from is not None
        opened = open_reward(self.init_from)
        if opened.head.bias is not None:
            raise UserError(
                f"model.init_from={self.init_from}: its head has a bias, which an export has no "
                "place for: it can be scored with, not trained further"
            )
        return opened


def _selected(head: nn.Linear, names: Sequence[str], wanted: Sequence[str]) -> nn.Linear:
    """The rows of a head that belong to the attributes wanted, in their order."""
    rows = [list(names).index(name) for name in wanted]
    selected = nn.Linear(head.in_features, len(rows), bias=False)
    selected.weight = nn.Parameter(head.weight.detach()[rows].clone())
    return selected


@dataclass(frozen=True)
class PolicyStart:
    """A policy: the backbone with its LM head.

    To go on from a trained policy, give its folder as ``backbone.path``: an export is an ordinary
    causal LM.
    """

    closes_cut_responses: ClassVar[bool] = False
    """A response that was cut does not end where the cut is: nobody shall learn to stop there."""

    def attributes(self, wanted: Sequence[str]) -> tuple[str, ...]:
        """No names: ratings are not read, so data without any will do."""
        return ()

    def chat(self, chat: ChatFormat, backbone: Backbone, texts: Texts, cache_dir: str) -> BoundChat:
        """The chat format bound to the backbone's tokenizer; arguments as in ``RewardStart.chat``.

        Raises:
            UserError: If there is no such tokenizer, the template does not close its answers, or
                the policy to go on from was trained with another system prompt.
        """
        bound = chat.bind(backbone.tokenizer.build(texts, cache_dir))
        if not bound.closing_ids:
            raise UserError(
                f"chat template {bound.template_name!r} writes nothing behind an answer, so a "
                "policy could not learn where to stop: choose another, such as plain"
            )
        record = Path(backbone.path or "") / POLICY_FILE
        if backbone.init == "pretrained" and record.is_file():
            content = json.loads(record.read_text(encoding="utf-8"))
            trained = content.get("system_prompt")
            if bound.system_prompt != trained:
                raise UserError(
                    f"backbone.path={backbone.path} was trained with the system prompt "
                    f"{trained!r}, and chat.system_prompt is {bound.system_prompt!r}: set it to "
                    "the same"
                )
            form = content.get("label_form")
            if content.get("label_attributes") and bound.labels.form != form:
                raise UserError(
                    f"backbone.path={backbone.path} was trained with labels written as {form!r}, "
                    f"and here they are {bound.labels.form!r}: set chat.label_form to the same"
                )
        return bound

    def build(self, setup: ModelSetup) -> Policy:
        """Make the model.

        Args:
            setup: What it is built for.

        Returns:
            The policy on the CPU, in train mode.

        Raises:
            UserError: If the weights cannot be found or packed, or the logits are more than a
                linear layer of the hidden states.
        """
        tokenizer = setup.chat.tokenizer
        causal_lm = setup.backbone.build(
            tokenizer, setup.seed, setup.device, setup.autocast, lm_head=True
        )
        base = Path(setup.base_model(causal_lm))
        name = base.name if base.is_absolute() else str(base)  # exports are published
        spec = PolicySpec(
            setup.chat,
            setup.limits,
            name,
            setup.data,
            label_attributes=setup.label_attributes,
        )
        return Policy(causal_lm, spec)
