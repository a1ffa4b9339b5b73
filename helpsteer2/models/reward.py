"""The reward model: a decoder and a linear head on the last token of each response."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from helpsteer2.data.packing import PackedBatch
from helpsteer2.errors import UserError
from helpsteer2.models.adapter import load_adapter
from helpsteer2.models.attention import (
    AttentionChoice,
    check_packable,
    choose_backend,
    implementation_name,
    packed_hidden_states,
)
from helpsteer2.models.export import write_export
from helpsteer2.models.loading import local_folder, open_reward
from helpsteer2.models.lora import is_adapter
from helpsteer2.models.spec import RewardSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpsteer2.data.chat import BoundChat

__all__ = ["Dtype", "RewardModel", "RewardSpec"]

Dtype = Literal["float32", "bfloat16"]


class RewardModel(nn.Module):
    """Scores every response of a packed row on A attributes, in the unit of the ratings (0–4).

    Args:
        backbone: Decoder without LM head, built with a packed attention implementation.
        spec: What the scores depend on beside the weights; its names give the width of the head.
        head: A trained head; None draws a new one (normal, the backbone's ``initializer_range``)
            from torch's global generator.

    Source: arXiv 2406.08673, section 3 (linear layer on the hidden state of the last token).
    """

    def __init__(
        self, backbone: PreTrainedModel, spec: RewardSpec, head: nn.Linear | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.spec = spec
        if head is None:
            config = backbone.config.get_text_config()
            head = nn.Linear(config.hidden_size, len(spec.attribute_names), bias=False)
            nn.init.normal_(head.weight, std=getattr(config, "initializer_range", 0.02))
        self.head = head.to(backbone.device)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Score a packed row.

        Args:
            batch: G groups with R responses, on the model's device.

        Returns:
            ``(R, A)`` float32, whatever the dtype of the backbone or the autocast around.
        """
        hidden = packed_hidden_states(self.backbone, batch)[batch.last_tokens]
        # A head in bf16 gives near responses the same score; autocast would make it bf16.
        with torch.autocast(hidden.device.type, enabled=False):
            scores: Tensor = self.head(hidden.float())
        return scores

    def save_pretrained(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Export as a plain transformers sequence classifier with everything that scoring needs.

        The backbone is written in the dtype it has, the head in fp32. Adapters are merged into it;
        if others can load their base, they also lie unmerged in the folder's ``adapter``.

        Args:
            folder: Where to; an older export there is replaced at the end, or not at all.
            tokenizer: The backbone's tokenizer.

        Raises:
            UserError: If the model has no plain form or the folder cannot be written.
        """
        write_export(folder, self.backbone, self.head, self.spec, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: Dtype = "float32",
        attention: AttentionChoice = "auto",
        device: torch.device | str = "cpu",
        base: str | Path | None = None,
    ) -> tuple[RewardModel, PreTrainedTokenizerBase, BoundChat]:
        """Load an export, its adapter alone, or any decoder sequence classifier of transformers.

        Args:
            path: Folder or Hub id. Without ``reward_model.json`` it must have one label (called
                ``score``) or named ones; its own chat template is used.
            dtype: Of the backbone. The head is fp32 in any case.
            attention: Attention backend.
            device: Where the model shall run.
            base: Folder or Hub id of an adapter's base, if it has moved since the training.

        Returns:
            The model in eval mode with every dropout 0, its tokenizer and its chat format.

        Raises:
            UserError: If the folder cannot be trusted to score right; the message says why.
        """
        folder = local_folder(path)
        if is_adapter(folder):
            parts = load_adapter(folder, base, dtype, attention, device)
        elif base is not None:
            raise UserError(f"{path} is a whole model: base is for an adapter alone")
        else:
            weights_dtype: torch.dtype = getattr(torch, dtype)
            implementation = implementation_name(choose_backend(attention, device, weights_dtype))
            parts = open_reward(folder).load(weights_dtype, implementation)
            check_packable(parts.backbone)
        model = cls(parts.backbone, parts.spec, parts.head).to(device).eval()
        return model, parts.tokenizer, parts.chat
