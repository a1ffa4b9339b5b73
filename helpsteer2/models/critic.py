"""The critic: what a policy may still expect to earn, before each token of a response."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from helpsteer2.data.packing import PackedBatch
from helpsteer2.errors import UserError
from helpsteer2.models.attention import check_packable, packed_hidden_states
from helpsteer2.models.loading import open_reward
from helpsteer2.models.lora import Lora
from helpsteer2.models.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Critic(nn.Module):
    """Values of the states in which the tokens of a packed row were chosen.

    Args:
        backbone: Decoder without LM head, built with a packed attention implementation.

    Source: arXiv 1707.06347; the head is new and zero, so that the first values are 0: the mean of
    standardised rewards.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.get_text_config().hidden_size, 1)
        self.head.to(backbone.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Value before every response token: that of the first is read at the end of its prompt.

        Args:
            batch: G groups with N response tokens, on the model's device.

        Returns:
            ``(N,)`` float32, response after response, whatever the dtype of the backbone or the
            autocast around.
        """
        predictors = torch.from_numpy(batch.layout.response_tokens.predictors)
        hidden = packed_hidden_states(self.backbone, batch)
        hidden = hidden[predictors.to(hidden.device, non_blocking=True)]
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.head(hidden.float()).squeeze(-1)
        return values


@dataclass(frozen=True)
class CriticStart:
    """What the critic starts from.

    Args:
        init_from: Folder or Hub id of a reward model with the policy's tokenizer, whose decoder is
            taken, as in NeMo-Aligner. None takes a copy of the policy's.
        lora: Adapters beside the frozen weights of that reward model; None trains the weights. A
            copy of a policy with adapters has its own.
        gradient_checkpointing: Recompute each layer in the backward pass, for memory.
    """

    init_from: str | None = None
    lora: Lora | None = None
    gradient_checkpointing: bool = False

    def build(self, policy: Policy, seed: int) -> Critic:
        """Make the critic.

        Args:
            policy: At its start.
            seed: Seed of new adapters.

        Returns:
            The critic on the policy's device, in train mode.

        Raises:
            UserError: If the reward model cannot be used, or has another tokenizer.
        """
        if self.init_from is None:
            backbone = copy.deepcopy(policy.backbone)
        else:
            backbone = self._of_reward_model(self.init_from, policy)
            if self.lora is not None:
                self.lora.inject(backbone, seed, self.init_from)
        if self.gradient_checkpointing:
            backbone.gradient_checkpointing_enable({"use_reentrant": False})
        return Critic(backbone.to(policy.backbone.device)).train()

    def _of_reward_model(self, path: str, policy: Policy) -> PreTrainedModel:
        opened = open_reward(path)
        own = policy.spec.chat.tokenizer
        if opened.chat.tokenizer.get_vocab() != own.get_vocab():
            raise UserError(
                f"module.critic.init_from={path} has another tokenizer than the policy, whose ids "
                "the critic reads: set module.critic.init_from=null (it may still score: that goes "
                "by text)"
            )
        config = policy.backbone.config
        weight = policy.lm_head.weight
        # Frozen weights beside adapters may be in half precision, trained ones never.
        dtype = weight.dtype if self.lora is not None else torch.float32
        loaded = opened.load(dtype, config._attn_implementation)
        check_packable(loaded.backbone)
        return loaded.backbone
